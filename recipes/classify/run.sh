#!/usr/bin/env bash
# Train a classifier and see it beat the commonest label on held-out questions; then its scores in stock PEFT.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=runs/classify
rm -rf "$dir"
mkdir -p "$dir"
megalora tiny "$dir/base" >/dev/null
python -m megalora.data.arithmetic "$dir/questions.jsonl" --num 600 --seed 0 --labels
megalora data recipes/classify/train.yaml
megalora train recipes/classify/train.yaml --nproc 2
megalora verify "$dir/run" --base "$dir/base"
megalora report "$dir/run"
