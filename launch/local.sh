#!/usr/bin/env bash
# Fine-tune on this machine alone.
set -euo pipefail

usage='usage: launch/local.sh CONFIG.yaml [NPROC] [section.key=value ...]

  CONFIG.yaml         for example configs/quickstart.yaml
  NPROC               ranks to start, one per GPU; default: every GPU of this machine, 1 where there is none
  section.key=value   overrides of the config, for example train.lr=2e-4 parallel.ep=8

  CUDA_VISIBLE_DEVICES=0,1 launch/local.sh CONFIG.yaml    uses these two GPUs.
  MAX_RESTARTS=0 launch/local.sh CONFIG.yaml    does not start the ranks again when one has failed (default: 3 times).
  kill PID (SIGTERM) or Ctrl-C: the ranks finish their step, save a checkpoint and exit; checkpoint.resume=true continues from it.'

case "${1:-}" in
  "") printf '%s\n' "$usage" >&2; exit 2 ;;
  -h | --help) printf '%s\n' "$usage"; exit 0 ;;
esac
config=$1
shift
nproc=
if [[ "${1:-}" =~ ^-?[0-9]+$ ]]; then
  nproc=$1
  shift
fi

# One node is the simple case of several.
NNODES=1 NODE_RANK=0 NPROC_PER_NODE=$nproc exec "$(dirname "${BASH_SOURCE[0]}")/torchrun_node.sh" "$config" "$@"
