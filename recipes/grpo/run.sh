#!/usr/bin/env bash
# Learn from rewards on two ranks, without a server, and see the mean reward rise from 0.02 to above 0.9.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=runs/grpo
rm -rf "$dir"
mkdir -p "$dir"
megalora tiny "$dir/base" >/dev/null
for number in 0 1 2 3 4 5 6 7 8 9; do echo "{\"prompt\": \"What is $number?\"}"; done >"$dir/prompts.jsonl"
megalora rl recipes/grpo/train.yaml --nproc 2
megalora verify "$dir/run" --base "$dir/base"
megalora report "$dir/run"
