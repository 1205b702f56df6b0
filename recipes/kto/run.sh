#!/usr/bin/env bash
# Train on answers labelled good or bad and see the held-out ones part; then the adapter in stock PEFT.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=runs/kto
rm -rf "$dir"
mkdir -p "$dir"
megalora tiny "$dir/base" >/dev/null
python -m megalora.data.arithmetic "$dir/rated.jsonl" --num 400 --seed 0 --ratings
megalora data recipes/kto/train.yaml
megalora train recipes/kto/train.yaml --nproc 2
megalora verify "$dir/run" --base "$dir/base"
megalora report "$dir/run"
