#!/usr/bin/env bash
# Ray on one node of a job, in the foreground: ray_node.sh head|worker NAME. Started by train.sbatch on each node by srun, with
# HEAD_IP, PORT_BASE, GPUS, CPUS, RAY, RAY_TEMP and LOGS in the environment. Ends when Ray does, or on SIGTERM; Ray's own logs, which
# lie on the node, are then copied to $LOGS/ray-NAME/.

set -euo pipefail

role=$1 node=$2

# Every port is given, within PORT_BASE .. PORT_BASE + 999: a firewall can be told, and two jobs on a node do not meet.
FLAGS=(
    --block
    --disable-usage-stats
    --num-gpus="$GPUS"
    --num-cpus="$CPUS"
    --node-manager-port="$((PORT_BASE + 1))"
    --object-manager-port="$((PORT_BASE + 2))"
    --runtime-env-agent-port="$((PORT_BASE + 3))"
    --dashboard-agent-listen-port="$((PORT_BASE + 4))"
    --dashboard-agent-grpc-port="$((PORT_BASE + 5))"
    --metrics-export-port="$((PORT_BASE + 6))"
    --min-worker-port="$((PORT_BASE + 20))"
    --max-worker-port="$((PORT_BASE + 999))"
)
case $role in
    head)
        FLAGS+=(
            --head
            --node-ip-address="$HEAD_IP"
            --port="$PORT_BASE"
            --ray-client-server-port="$((PORT_BASE + 7))"
            --dashboard-host=127.0.0.1   # reach it through ssh -L: it runs commands for whoever can open it
            --dashboard-port="$((PORT_BASE + 8))"
            --temp-dir="$RAY_TEMP"       # the workers take it over
        ) ;;
    worker) FLAGS+=(--address="$HEAD_IP:$PORT_BASE") ;;
    *) echo "ray_node.sh: the first argument must be head or worker, not '$role'" >&2; exit 2 ;;
esac

# shellcheck disable=SC2174  # the folders above are not ours to close
mkdir -p -m 700 "$RAY_TEMP"
[[ -O $RAY_TEMP ]] || { echo "ray_node.sh: $RAY_TEMP belongs to somebody else; set RAY_TEMP to another short path" >&2; exit 2; }

save_logs() {
    mkdir -p "$LOGS/ray-$node"
    cp -r "$RAY_TEMP"/session_latest/logs/. "$LOGS/ray-$node/" 2>/dev/null || true
    rm -rf "$RAY_TEMP"
}
trap save_logs EXIT

ulimit -n "$(ulimit -H -n)" || true  # Ray and verl open many sockets
"$RAY" start "${FLAGS[@]}" &
ray=$!
trap 'kill -TERM "$ray" 2>/dev/null || true' TERM INT
status=0
wait "$ray" || status=$?
# A trapped signal interrupts wait: wait again for Ray itself.
while kill -0 "$ray" 2>/dev/null; do wait "$ray" || status=$?; done
echo "ray_node.sh: Ray on $node ended with status $status"
exit "$status"
