#!/usr/bin/env bash
# Have the planner write every config of this folder: make configs. Takes two minutes; needs no GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

sft() { # name of the file, GPUs, kind of GPU, model, samples a step, longest sample, further overrides
  local name=$1 gpus=$2 gpu=$3 model=$4 batch=$5 length=$6
  echo "$name"
  megalora plan configs/sft/template.yaml --gpus "$gpus" --gpu "$gpu" --out "configs/sft/$name.yaml" "model.path=$model" \
    "train.global_batch_size=$batch" "data.max_length=$length" "checkpoint.dir=runs/$name" "${@:7}" >/dev/null
}

# One 80 GB GPU holds the base (57 GiB) with adapters of rank 8; 32k tokens do not fit beside it, on 141 GB they do.
sft qwen3_30b_a3b_1xh100_4k 1 h100 Qwen/Qwen3-30B-A3B 16 4096 lora.rank=8 lora.alpha=16
sft qwen3_30b_a3b_1xh200_32k 1 h200 Qwen/Qwen3-30B-A3B 8 32768
sft qwen3_30b_a3b_8xh100_4k 8 h100 Qwen/Qwen3-30B-A3B 64 4096
sft qwen3_30b_a3b_8xh100_32k 8 h100 Qwen/Qwen3-30B-A3B 16 32768
sft qwen3_30b_a3b_8xh100_128k 8 h100 Qwen/Qwen3-30B-A3B 8 131072
sft qwen3_30b_a3b_16xh100_4k 16 h100 Qwen/Qwen3-30B-A3B 64 4096
sft qwen3_30b_a3b_16xh100_32k 16 h100 Qwen/Qwen3-30B-A3B 16 32768
# The base as codes (docs/quantised.md), where plain weights leave no room. Not yet measured on a GPU.
sft qwen3_30b_a3b_nf4_1xrtx4090_1k 1 rtx4090 unsloth/Qwen3-30B-A3B-bnb-4bit 16 1024 lora.rank=8 lora.alpha=16 lora.expert_rank=1
sft qwen3_30b_a3b_fp8_1xh100_32k 1 h100 Qwen/Qwen3-30B-A3B-FP8 8 32768
sft qwen3_235b_a22b_fp8_8xh100_4k 8 h100 Qwen/Qwen3-235B-A22B-FP8 32 4096
sft qwen3_235b_a22b_nf4_8xh100_4k 8 h100 Qwen/Qwen3-235B-A22B 32 4096 model.weight_format=nf4
sft qwen3_235b_a22b_fp8_4xh200_4k 4 h200 Qwen/Qwen3-235B-A22B-FP8 32 4096
sft qwen3_235b_a22b_nf4_4xh200_4k 4 h200 Qwen/Qwen3-235B-A22B 32 4096 model.weight_format=nf4
sft qwen3_235b_a22b_16xh100_4k 16 h100 Qwen/Qwen3-235B-A22B 64 4096
sft qwen3_235b_a22b_16xh100_32k 16 h100 Qwen/Qwen3-235B-A22B 16 32768
sft qwen3_235b_a22b_64xh100_4k 64 h100 Qwen/Qwen3-235B-A22B 128 4096
sft qwen3_235b_a22b_64xh100_32k 64 h100 Qwen/Qwen3-235B-A22B 32 32768
sft qwen3_235b_a22b_256xh100_4k 256 h100 Qwen/Qwen3-235B-A22B 256 4096
sft qwen3_235b_a22b_256xh100_32k 256 h100 Qwen/Qwen3-235B-A22B 64 32768
