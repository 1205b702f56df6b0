#!/usr/bin/env bash
# Start this node's part of a training run. Call it once on every node, with the same config and overrides everywhere;
# the nodes find each other at MASTER_ADDR:MASTER_PORT. On one machine, launch/local.sh is simpler.
#
# Two nodes with 8 GPUs each, and so on for any number:
#   on node-a:  NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a launch/torchrun_node.sh configs/my.yaml
#   on node-b:  NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a launch/torchrun_node.sh configs/my.yaml
# A scheduler says all of that itself: launch/slurm.sbatch and launch/pytorchjob.yaml call this script on every node.
# Every node needs the repository, the model and the data; all must see the same checkpoint.dir (a shared file system).
set -euo pipefail

usage='usage: launch/torchrun_node.sh CONFIG.yaml [section.key=value ...]

  From the environment; in brackets where else it is looked for, under Kubernetes and under srun:
  NNODES           how many nodes take part (default 1)                          [PET_NNODES, SLURM_STEP_NUM_NODES]
  NODE_RANK        which of them this is, 0 to NNODES-1; needed when NNODES > 1  [PET_NODE_RANK, SLURM_NODEID]
  MASTER_ADDR      name or address of node 0, as the other nodes reach it; needed when NNODES > 1
                                            [PET_MASTER_ADDR, the host in PET_RDZV_ENDPOINT, SLURM_STEP_NODELIST]
  MASTER_PORT      a free TCP port on node 0 (default 29500); choose another for a second run on the same nodes
                                            [PET_MASTER_PORT, the port in PET_RDZV_ENDPOINT]
  NPROC_PER_NODE   ranks on each node, one per GPU (default: every GPU of this node, 1 where there is none)
                                            [PET_NPROC_PER_NODE]
  RDZV_ID          name of the run, the same on all its nodes (default megalora) [PET_RDZV_ID]
  MODULE           what to run; megalora bench calls this with modules of its own (default megalora.train)
  MAX_RESTARTS     how often the ranks start again, and go on from the last checkpoint, when one has failed (default 3;
                   0: never). Without checkpoint.every nothing is saved on the way               [PET_MAX_RESTARTS]
  RDZV_TIMEOUT     seconds that nodes wait for each other, at the start and after a failure (default 900)
  LOCAL_ADDR       how the others reach this node (default: MASTER_ADDR on node 0, elsewhere the address this node
                   uses to talk to node 0); ranks may have to be told the network too: NCCL_SOCKET_IFNAME=eth0 on
                   GPUs, GLOO_SOCKET_IFNAME=eth0 without
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds the ranks may take to save after SIGTERM, then they are killed (default 600)'

fail() {
  echo "launch: $1" >&2
  exit 2
}

num_gpus() { # that this run may use
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true
  else
    echo 0
  fi
}

lives() { # a process that has ended stays as a zombie, Z, until its parent looks
  grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null
}

# torchrun's connection to node 0 has no time limit: when node 0 vanishes without a word (power, cable), torchrun hangs here
# for a quarter of an hour after its ranks have given up. So: once no rank is left and node 0 does not answer, end it.
end_when_abandoned() { # torchrun's process id
  trap '' TERM INT HUP # a scheduler signals every process of a step; this one ends with torchrun
  local silent=0 started=false child children ranks
  while sleep 2 && lives "$1"; do
    ranks=0
    read -ra children < <(cat "/proc/$1/task/"*/children 2>/dev/null) || true
    for child in "${children[@]}"; do # the ranks, and this watch itself
      [[ "$child" != "$BASHPID" ]] || continue
      ! lives "$child" || ranks=$((ranks + 1))
    done
    if ((ranks > 0)); then
      started=true
    elif $started && ! timeout 5 bash -c "exec 3<>'/dev/tcp/$MASTER_ADDR/$MASTER_PORT'" 2>/dev/null; then
      silent=$((silent + 1))
    else
      silent=0
    fi
    ((silent < 5)) || break
  done
  lives "$1" || return 0
  echo "launch: node $NODE_RANK: node 0 ($MASTER_ADDR) no longer answers and no rank is left here; ending torchrun." \
    "When all nodes are back, start again on each with checkpoint.resume=true" >&2
  kill -KILL "$1"
}

check_count() { # name, value
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 is not a number of at least 1${3:-}"
}

case "${1:-}" in
  "") printf '%s\n' "$usage" >&2; exit 2 ;;
  -h | --help) printf '%s\n' "$usage"; exit 0 ;;
esac
config=$1
shift

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -d "$repo/.venv/bin" ]] || PATH="$repo/.venv/bin:$PATH"
command -v torchrun >/dev/null || fail "torchrun not found; run 'make setup' in $repo, or activate your environment"

# The user's word first, then Kubernetes' training operator (PET_*: what torchrun itself reads), then Slurm's step.
NNODES=${NNODES:-${PET_NNODES:-${SLURM_STEP_NUM_NODES:-1}}}
NODE_RANK=${NODE_RANK:-${PET_NODE_RANK:-${SLURM_NODEID:-}}}
meeting=${PET_RDZV_ENDPOINT:-}
MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-${meeting%:*}}}
[[ "$meeting" == *:* ]] || meeting=
MASTER_PORT=${MASTER_PORT:-${PET_MASTER_PORT:-${meeting##*:}}}
MASTER_PORT=${MASTER_PORT:-29500}
RDZV_ID=${RDZV_ID:-${PET_RDZV_ID:-megalora}}
MODULE=${MODULE:-megalora.train}
# Other modules keep no checkpoints; megalora bench counts a failure as a result.
restarts=0
[[ "$MODULE" != megalora.train ]] || restarts=3
MAX_RESTARTS=${MAX_RESTARTS:-${PET_MAX_RESTARTS:-$restarts}}
RDZV_TIMEOUT=${RDZV_TIMEOUT:-900}
if [[ -z "$MASTER_ADDR" && -n "${SLURM_STEP_NODELIST:-}" ]]; then
  mapfile -t nodes < <(scontrol show hostnames "$SLURM_STEP_NODELIST") # node-[a-c] -> node-a ...
  MASTER_ADDR=${nodes[0]:-}
fi
gpus=$(num_gpus)
NPROC_PER_NODE=${NPROC_PER_NODE:-${PET_NPROC_PER_NODE:-auto}}
[[ "$NPROC_PER_NODE" != auto ]] || NPROC_PER_NODE=$((gpus > 0 ? gpus : 1))

check_count NNODES "$NNODES" "; a run keeps the nodes it started with, so a range like 1:4 has no meaning here"
check_count NPROC_PER_NODE "$NPROC_PER_NODE"
check_count MASTER_PORT "$MASTER_PORT"
check_count RDZV_TIMEOUT "$RDZV_TIMEOUT"
[[ "$MAX_RESTARTS" =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a number of at least 0"
((gpus == 0 || NPROC_PER_NODE <= gpus)) ||
  fail "$NPROC_PER_NODE ranks on this node, but it has $gpus GPUs and every rank needs its own; start at most $gpus"

if ((NNODES > 1)); then
  if ! [[ "$NODE_RANK" =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
    fail "NODE_RANK=$NODE_RANK: with NNODES=$NNODES, give every node its own number from 0 to $((NNODES - 1))"
  fi
  [[ -n "$MASTER_ADDR" ]] || fail "MASTER_ADDR is not set: give every node the name or address of node 0"
fi
# The training operator counts nodes in these; our checks below and torchrun's ranks must not take them for theirs.
unset RANK WORLD_SIZE LOCAL_RANK

# A mistake in the config or in a file shows here, once and in a line, before any rank starts. Other modules check what
# they are given.
if [[ "$MODULE" == megalora.train ]]; then
  python - $((NNODES * NPROC_PER_NODE)) "$config" "$@" <<'PYTHON'
import sys
from megalora.preflight import check_run
from megalora.user_error import guarded
guarded(lambda words: check_run(words[1], words[2:], int(words[0])), sys.argv[1:])
PYTHON
elif [[ "$MODULE" == megalora.rl ]]; then
  # Any node may get rank 0, which starts servers.
  python - $((NNODES * NPROC_PER_NODE)) "$NPROC_PER_NODE" "$config" "$@" <<'PYTHON'
import sys
from pathlib import Path
from megalora.rl.preflight import check_sampled_run
from megalora.user_error import guarded
guarded(
    lambda words: check_sampled_run(Path(words[2]), words[3:], int(words[0]), int(words[1])), sys.argv[1:]
)
PYTHON
fi

if ((NNODES == 1)); then
  rendezvous=(--standalone) # picks a free port
else
  if ((NODE_RANK > 0)); then
    # Nodes may start minutes apart. Waiting here, not in torchrun, lets torchrun be impatient later, when node 0 is gone.
    reached=$(python - "$MASTER_ADDR" "$MASTER_PORT" "$RDZV_TIMEOUT" <<'PYTHON'
import socket, sys, time
host, port, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
deadline = time.monotonic() + patience
while True:
    try:
        with socket.create_connection((host, port), timeout=min(10, patience)) as probe:
            print(probe.getsockname()[0])
            break
    except OSError as error:
        why = error.strerror or str(error)
        if isinstance(error, UnicodeError) or time.monotonic() > deadline:
            sys.exit(f"launch: MASTER_ADDR={host}: no answer from node 0 at port {port} in {patience:g} s ({why}). "
                     "Is node 0 started, the name right and the port open?")
        time.sleep(1)
PYTHON
    ) || exit 2
  fi
  # Rank 0 listens under its node's own name, and which node gets rank 0 is torchrun's choice. That name (by default the
  # host name) often does not resolve between containers; an address works everywhere.
  export LOCAL_ADDR=${LOCAL_ADDR:-${reached:-$MASTER_ADDR}}
  # timeout: how long node 0 waits for all. read_timeout: how long torchrun bears with a node 0 that no longer answers.
  rendezvous=(
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$RDZV_ID"
    --rdzv-conf "is_host=$((NODE_RANK == 0)),timeout=$RDZV_TIMEOUT,read_timeout=30" --local-addr "$LOCAL_ADDR"
  )
fi

if ((NNODES > 1 && NODE_RANK > 0)); then
  end_when_abandoned $$ >/dev/null & # this shell's id, which torchrun keeps
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks share the cores: torch's default, all cores each, thrashes
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" # torchrun's 30 s is short for a checkpoint

# exec: torchrun takes this shell's place, so that SIGTERM and Ctrl-C reach it. It passes the signal on to its ranks and waits;
# they finish their step, save and say "stopped by a signal at step N; the adapter is ...". A torchrun that got a signal exits
# with 128 and its number (143, 130), also when all went well.
# One signalled node stops the ranks of all, but the torchrun of node 0 then waits up to 5 minutes for the others' to
# report before it exits; signal every node and they end together.
exec python -m megalora.launching --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "$MAX_RESTARTS" \
  "${rendezvous[@]}" -m "$MODULE" "$config" "$@"
