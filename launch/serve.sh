#!/usr/bin/env bash
# Serve adapters with vLLM, whose environment is built on first use.
set -euo pipefail

usage='usage: launch/serve.sh BASE ADAPTER [ADAPTER ...] [-- ARGUMENTS]

  BASE       the base model: a folder or hub name
  ADAPTER    a folder, such as a checkpoint of a run, or NAME=FOLDER
  ARGUMENTS  of megalora serve; after another --, of vLLM

  launch/serve.sh Qwen/Qwen3-30B-A3B math=runs/math/step_000500 -- --port 8000 -- --tensor-parallel-size 2'

case "${1:-}" in
  -h | --help) printf '%s\n' "$usage"; exit 0 ;;
esac
(($# >= 2)) || { printf '%s\n' "$usage" >&2; exit 2; }
base=$1
shift
adapters=()
while (($#)) && [[ $1 != -- ]]; do
  adapters+=("$1")
  shift
done
(($# == 0)) || shift

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ ! -d "$repo/.venv/bin" ]] || PATH="$repo/.venv/bin:$PATH"
command -v megalora >/dev/null || { echo "megalora not found; run 'make setup' in $repo, or activate your environment" >&2; exit 1; }
[[ -n "${MEGALORA_VLLM_PYTHON:-}" ]] || make --no-print-directory -C "$repo" vllm
exec megalora serve "${adapters[@]}" --base "$base" "$@"
