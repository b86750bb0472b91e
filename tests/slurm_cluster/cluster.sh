#!/usr/bin/env bash
# A virtual cluster with a real Slurm on one machine. A node is a network, UTS, IPC, PID and mount namespace: it has an address,
# ports, a host name, processes, a /tmp and a /dev/shm of its own. Needs root, slurm-wlm and munge (Debian 12: Slurm 22.05), iproute2.
#
#   cluster.sh up N              # nodes n1 .. nN, and ctl: the controller's host, where jobs are submitted
#   cluster.sh exec NODE CMD...  # runs a command there, in this folder
#   cluster.sh poweroff NODE     # its processes vanish and its cable is cut, as when power is lost
#   cluster.sh boot NODE         # it comes back
#   cluster.sh down              # ends all of it; harmless when nothing is up
#
# Everything lies in the folder $CLUSTER, which must not be under /tmp: that is each node's own. A project under /tmp is not visible.

set -euo pipefail

CLUSTER=${CLUSTER:?set CLUSTER to a folder for the cluster state, not under /tmp}
NAME=${NAME:-vimpo}                    # prefix of the network namespaces
NET=${NET:-10.77.0}                    # of the cables; no route leaves it
KILL_WAIT=${KILL_WAIT:-30}             # Slurm's default
SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-150}  # seconds until a silent node counts as down; Slurm's default is 300
ME=$(readlink -f "${BASH_SOURCE[0]}")

address() { if [[ $1 == ctl ]]; then echo "$NET.100"; else echo "$NET.${1#n}"; fi; }
namespace() { echo "$NAME-$1"; }

write_config() {  # number of nodes
    local node
    mkdir -p "$CLUSTER"/{state,spool}
    chmod 755 "$CLUSTER"
    {
        echo "127.0.0.1 localhost"
        for node in ctl $(seq -f n%g "$1"); do echo "$(address "$node") $node"; done
    } >"$CLUSTER/hosts"
    # cred_expire: with Slurm's 120 s a requeued job waits for that long. config_overrides: believe the made-up CPUs and memory.
    cat >"$CLUSTER/slurm.conf" <<CONF
ClusterName=$NAME
SlurmctldHost=ctl($(address ctl))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$CLUSTER/munge.socket,cred_expire=30
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool/%n
SlurmctldPidFile=$CLUSTER/slurmctld.pid
SlurmdPidFile=$CLUSTER/slurmd-%n.pid
SlurmctldLogFile=$CLUSTER/slurmctld.log
SlurmdLogFile=$CLUSTER/slurmd-%n.log
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=$KILL_WAIT
SlurmdTimeout=$SLURMD_TIMEOUT
MinJobAge=86400
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n[1-$1] CPUs=64 RealMemory=16000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    echo "NodeName=n[1-$1] Name=gpu Count=1 File=/dev/null" >"$CLUSTER/gres.conf"
    echo "CgroupPlugin=cgroup/v1" >"$CLUSTER/cgroup.conf"
}

start_munge() {  # one for all nodes: a Unix socket with a path is reachable from every network namespace
    (umask 077; head -c 1024 /dev/urandom >"$CLUSTER/munge.key")
    munged --force --key-file="$CLUSTER/munge.key" --socket="$CLUSTER/munge.socket" --pid-file="$CLUSTER/munged.pid" \
        --log-file="$CLUSTER/munged.log" --seed-file="$CLUSTER/munged.seed"
}

make_switch() {
    local ns
    ns=$(namespace ctl)
    ip netns add "$ns"
    ip -n "$ns" link set lo up
    ip -n "$ns" link add switch type bridge
    ip -n "$ns" addr add "$(address ctl)/24" dev switch
    ip -n "$ns" link set switch up
}

wire() {  # a node's cable, into the switch
    local ns
    ns=$(namespace "$1")
    ip netns add "$ns"
    ip link add "cable-$1" netns "$(namespace ctl)" type veth peer name eth0 netns "$ns"
    ip -n "$(namespace ctl)" link set "cable-$1" master switch up
    ip -n "$ns" link set lo up
    ip -n "$ns" addr add "$(address "$1")/24" dev eth0
    ip -n "$ns" link set eth0 up
}

boot() {  # a node's namespaces and its daemon
    local node=$1 folder=$CLUSTER/$1 unshare child=
    mkdir -p "$folder/tmp" "$CLUSTER/spool/$node" "/etc/netns/$(namespace "$node")"
    chmod 1777 "$folder/tmp"
    cp "$CLUSTER/hosts" "/etc/netns/$(namespace "$node")/hosts"  # ip netns exec mounts what is there over /etc
    : >"/etc/netns/$(namespace "$node")/resolv.conf"             # no name server
    rm -f "$folder/ready"
    export CLUSTER
    setsid ip netns exec "$(namespace "$node")" unshare --uts --ipc --pid --mount --fork --mount-proc \
        bash "$ME" init "$node" </dev/null >"$folder/init.log" 2>&1 &
    unshare=$!
    for ((i = 0; i < 100; i++)); do
        if [[ -e $folder/ready ]]; then break; fi
        sleep 0.1
    done
    child=$(awk '{ print $1 }' "/proc/$unshare/task/$unshare/children")
    [[ -n $child ]] || { echo "cluster.sh: $node does not start:" >&2; cat "$folder/init.log" >&2; exit 1; }
    echo "$child" >"$folder/init.pid"  # process 1 of the node, as it is called out here
}

init() {  # process 1 of a node
    local node=$1
    cd /
    hostname "$node"
    mount --bind "$CLUSTER/$node/tmp" /tmp
    mount -t tmpfs -o size=8g tmpfs /dev/shm
    mount -t tmpfs tmpfs /sys/fs/cgroup  # slurmd refuses to start without, though nothing here uses it
    export SLURM_CONF=$CLUSTER/slurm.conf
    if [[ $node == ctl ]]; then slurmctld -D -c & else slurmd -D & fi
    touch "$CLUSTER/$node/ready"
    while true; do
        wait || true
        sleep 1
    done
}

poweroff() {
    ip -n "$(namespace ctl)" link set "cable-$1" down
    kill -KILL "$(<"$CLUSTER/$1/init.pid")"  # and with process 1 every other of that namespace
}

down() {
    local file ns
    for file in "$CLUSTER"/*/init.pid; do
        if [[ -s $file ]]; then kill -KILL "$(<"$file")" 2>/dev/null || true; fi
    done
    if [[ -s $CLUSTER/munged.pid ]]; then kill "$(<"$CLUSTER/munged.pid")" 2>/dev/null || true; fi
    rm -f "$CLUSTER"/*/init.pid "$CLUSTER/munged.pid"
    for ns in $(ip netns list | awk -v prefix="$NAME-" 'index($1, prefix) == 1 { print $1 }'); do
        ip netns del "$ns"
        rm -rf "/etc/netns/${ns:?}"
    done
}

case ${1:-} in
    up)
        write_config "${2:?how many nodes}"
        start_munge
        make_switch
        boot ctl
        for node in $(seq -f n%g "$2"); do
            wire "$node"
            boot "$node"
        done ;;
    exec)
        node=$2
        shift 2
        exec nsenter --target "$(<"$CLUSTER/$node/init.pid")" --all env -C "$PWD" SLURM_CONF="$CLUSTER/slurm.conf" "$@" ;;
    boot)
        ip -n "$(namespace ctl)" link set "cable-$2" up
        boot "$2" ;;
    poweroff) poweroff "$2" ;;
    init) init "$2" ;;
    down) down ;;
    *) echo "cluster.sh: up N, exec NODE CMD..., poweroff NODE, boot NODE or down, not '${1:-}'" >&2; exit 2 ;;
esac
