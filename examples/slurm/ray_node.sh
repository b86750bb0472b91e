#!/usr/bin/env bash
# Ray on one node of a job, in the foreground: ray_node.sh head|worker NAME. Started by train.sbatch on each node by srun, with
# HEAD_IP, PORT_BASE, GPUS, CPUS, RAY, RAY_TEMP and LOGS in the environment. Ends when Ray does, or on SIGTERM; Ray's own logs, which
# lie on the node, are then copied to $LOGS/ray-NAME/, and what Ray's processes left on the node is removed.

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
        )
        export AUTOSCALER_METRIC_PORT=$((PORT_BASE + 9)) DASHBOARD_METRIC_PORT=$((PORT_BASE + 10)) ;;  # no flag for these two
    worker) FLAGS+=(--address="$HEAD_IP:$PORT_BASE") ;;
    *) echo "ray_node.sh: the first argument must be head or worker, not '$role'" >&2; exit 2 ;;
esac

(umask 077; mkdir -p "$RAY_TEMP")
[[ -O $RAY_TEMP ]] || { echo "ray_node.sh: $RAY_TEMP belongs to somebody else; set RAY_TEMP to another short path" >&2; exit 2; }

touch "$RAY_TEMP/started"
mkdir -p "$RAY_TEMP/tmp"
# Of verl, vLLM and torch, whose files then go with Ray's. Slurm sets /tmp where the user sets nothing.
if [[ ${TMPDIR:-/tmp} == /tmp ]]; then export TMPDIR=$RAY_TEMP/tmp; fi
# Ray would wait 30 s for its workers, which is as long as Slurm waits before it kills Ray itself (KillWait).
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-0}

shared_memory() {  # files of this user that appeared since the start, on stdout
    find /dev/shm -maxdepth 1 -user "$EUID" -newer "$RAY_TEMP/started" \( -name "psm_*" -o -name "verl_weights_*" \)
}
remove_shared_memory() {  # what killed processes left; not what a process, of another job perhaps, still has in its memory
    local file
    for file in $(shared_memory); do
        grep -qsF "$file" /proc/[0-9]*/maps || rm -f "$file"
    done
}
tidy_up() {
    mkdir -p "$LOGS/ray-$node"
    cp -r "$RAY_TEMP"/session_latest/logs/. "$LOGS/ray-$node/" 2>/dev/null || true
    remove_shared_memory
    rm -rf "$RAY_TEMP"
}
trap tidy_up EXIT

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
