#!/usr/bin/env bash
# Train on preferences and see the held-out margin grow; then the adapter in stock PEFT.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=runs/dpo
rm -rf "$dir"
mkdir -p "$dir"
megalora tiny "$dir/base" >/dev/null
python -m megalora.data.arithmetic "$dir/pairs.jsonl" --num 400 --seed 0 --pairs
megalora data recipes/dpo/train.yaml
megalora train recipes/dpo/train.yaml --nproc 2
megalora verify "$dir/run" --base "$dir/base"
megalora report "$dir/run"
