#!/usr/bin/env bash
# Start this node's part of a training run. Call it once on every node, with the same config and overrides everywhere;
# the nodes find each other at MASTER_ADDR:MASTER_PORT. On one machine, launch/local.sh is simpler.
#
# Two nodes with 8 GPUs each:
#   on node-a:  NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a launch/torchrun_node.sh configs/my.yaml
#   on node-b:  NNODES=2 NODE_RANK=1 MASTER_ADDR=node-a launch/torchrun_node.sh configs/my.yaml
# Every node needs the repository, the model and the data; all must see the same checkpoint.dir (a shared file system).
set -euo pipefail

usage='usage: launch/torchrun_node.sh CONFIG.yaml [section.key=value ...]

  From the environment:
  NNODES           how many nodes take part (default 1)
  NODE_RANK        which of them this is, 0 to NNODES-1 (default SLURM_NODEID; needed when NNODES > 1)
  MASTER_ADDR      name or address of node 0, as the other nodes reach it (needed when NNODES > 1)
  MASTER_PORT      a free TCP port on node 0 (default 29500); choose another for a second run on the same nodes
  NPROC_PER_NODE   ranks on each node, one per GPU (default: every GPU of this node, 1 where there is none)
  RDZV_ID          name of the run, the same on all its nodes (default megalora)
  LOCAL_ADDR       how the others reach this node (default: MASTER_ADDR on node 0, elsewhere the address this node
                   uses to talk to node 0); ranks may have to be told the network too: NCCL_SOCKET_IFNAME=eth0
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

check_count() { # name, value
  [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1=$2 is not a number of at least 1"
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

gpus=$(num_gpus)
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}
MASTER_PORT=${MASTER_PORT:-29500}
NPROC_PER_NODE=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}
check_count NNODES "$NNODES"
check_count NPROC_PER_NODE "$NPROC_PER_NODE"
check_count MASTER_PORT "$MASTER_PORT"
((gpus == 0 || NPROC_PER_NODE <= gpus)) ||
  fail "$NPROC_PER_NODE ranks on this node, but it has $gpus GPUs and every rank needs its own; start at most $gpus"

if ((NNODES > 1)); then
  if ! [[ "$NODE_RANK" =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
    fail "NODE_RANK=$NODE_RANK: with NNODES=$NNODES, give every node its own number from 0 to $((NNODES - 1))"
  fi
  [[ -n "${MASTER_ADDR:-}" ]] || fail "MASTER_ADDR is not set: give every node the name or address of node 0"
fi

# A mistake in the config shows here, once and in a line, before any rank starts.
python - $((NNODES * NPROC_PER_NODE)) "$config" "$@" <<'PYTHON'
import sys
from megalora.cli import guarded
from megalora.config_file import load_config
guarded(lambda a: load_config(a[1], a[2:]).check_world(int(a[0])), sys.argv[1:])
PYTHON

if ((NNODES == 1)); then
  rendezvous=(--standalone) # picks a free port
else
  # Rank 0 listens under its node's own name, and which node gets rank 0 is torchrun's choice. That name (by default the
  # host name) often does not resolve between containers; an address works everywhere.
  if [[ -z "${LOCAL_ADDR:-}" ]]; then
    LOCAL_ADDR=$MASTER_ADDR
    ((NODE_RANK == 0)) || LOCAL_ADDR=$(python - "$MASTER_ADDR" "$MASTER_PORT" <<'PYTHON'
import socket, sys
try:
    family, kind, protocol, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:  # UDP: connecting chooses a route and sends nothing
        probe.connect(address)
        print(probe.getsockname()[0])
except OSError as error:
    sys.exit(f"launch: MASTER_ADDR={sys.argv[1]}: {error.strerror}")
PYTHON
    ) || exit 2
  fi
  # Nodes may start minutes apart: read_timeout is how long the others wait for node 0, timeout how long all wait for all.
  rendezvous=(
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-megalora}"
    --rdzv-conf "is_host=$((NODE_RANK == 0)),timeout=900,read_timeout=900" --local-addr "$LOCAL_ADDR"
  )
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks share the cores: torch's default, all cores each, thrashes
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" # torchrun's 30 s is short for a checkpoint

# exec: torchrun takes this shell's place, so that SIGTERM reaches it. It passes the signal on to its ranks and waits; they
# finish their step, save and exit with 0. A torchrun that got a signal then prints a traceback that ends in SignalException
# and exits with 1, also when all went well: "stopped by a signal at step N; the adapter is ..." above it is the proof.
# One signalled node stops the ranks of all, but the torchrun of node 0 then waits up to 5 minutes for the others' to
# report before it exits; signal every node and they end together.
exec torchrun --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${rendezvous[@]}" -m megalora.train "$config" "$@"
