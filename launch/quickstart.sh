#!/usr/bin/env bash
# The whole path on one machine without a GPU: base model, data, LoRA over two ranks, adapter, proof. `make quickstart` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
if ((gpus < 2)); then
  export CUDA_VISIBLE_DEVICES="" # two ranks need two GPUs; without them everything runs on the CPU
fi

dir=runs/quickstart
rm -rf "$dir"
mkdir -p "$dir"

echo "1/5  a tiny random Qwen3-MoE: $dir/base"
megalora tiny "$dir/base" >/dev/null

echo "2/5  2,000 arithmetic chats: $dir/arithmetic.jsonl"
python -m megalora.data.arithmetic "$dir/arithmetic.jsonl" --num 2000 --seed 0

echo "3/5  LoRA on attention and every expert, on two ranks that share the experts (EP=2)"
megalora train configs/quickstart.yaml --nproc 2

checkpoint="$dir/run/$(cat "$dir/run/latest")"
echo "4/5  the same logits from stock transformers + PEFT?"
megalora verify "$checkpoint" --base "$dir/base"

echo "5/5  one question, answered by the base and by the adapter: What is 12 + 30?"
megalora chat "$dir/run" --prompt "What is 12 + 30?" --by both --max-new-tokens 16

cat <<END

Made:
  $checkpoint    a PEFT adapter: PeftModel.from_pretrained(base, "$checkpoint")
  $dir/run/loss.png          the loss curve; metrics.jsonl and tensorboard/ beside it
  $dir/run/manifest.json     every adapted module, its rank and shapes

Next:
  .venv/bin/megalora chat $dir/run    # ask it yourself
  .venv/bin/megalora inspect $checkpoint
  make vllm && .venv/bin/megalora serve sums=$checkpoint --base $dir/base    # served by vLLM, and proved to act
  .venv/bin/megalora train configs/quickstart.yaml --nproc 2 parallel.ep=1 parallel.tp=2 checkpoint.dir=$dir/tp2   # another layout, the same losses
  .venv/bin/megalora train configs/sft/qwen3_30b_a3b_8xh100_4k.yaml --nproc 8 data.train=chats.jsonl    # the real model on 8 GPUs
END
