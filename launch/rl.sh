#!/usr/bin/env bash
# Start one of the two parts of a run that samples from servers: a vLLM server, or the training.
set -euo pipefail

usage='usage: launch/rl.sh serve BASE TRAINER [ARGUMENTS]
       launch/rl.sh train CONFIG.yaml [section.key=value ...]

  BASE       the base model: a folder or hub name
  TRAINER    http://HOST of the training, from which alone the server takes adapters
  ARGUMENTS  of megalora serve; after another --, of vLLM

  MEGALORA_TRAINER_TOKEN  a secret that both parts have; needed where they are on different machines
  NPROC_PER_NODE          ranks of the training (default: every GPU of this node)

  On several nodes the training is started by MODULE=megalora.rl launch/torchrun_node.sh CONFIG.yaml on each.'

case "${1:-}" in
  serve)
    (($# >= 3)) || { printf '%s\n' "$usage" >&2; exit 2; }
    base=$2
    trainer=$3
    shift 3
    repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    [[ ! -d "$repo/.venv/bin" ]] || PATH="$repo/.venv/bin:$PATH"
    command -v megalora >/dev/null || { echo "megalora not found; run 'make setup' in $repo, or activate your environment" >&2; exit 1; }
    [[ -n "${MEGALORA_VLLM_PYTHON:-}" ]] || make --no-print-directory -C "$repo" vllm
    exec megalora serve --base "$base" --trainer "$trainer" "$@"
    ;;
  train)
    (($# >= 2)) || { printf '%s\n' "$usage" >&2; exit 2; }
    shift
    MODULE=megalora.rl exec "$(dirname "${BASH_SOURCE[0]}")/torchrun_node.sh" "$@"
    ;;
  -h | --help) printf '%s\n' "$usage" ;;
  *) printf '%s\n' "$usage" >&2; exit 2 ;;
esac
