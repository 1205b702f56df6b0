"""Compute the evaluation loss of a checkpoint and of its base in stock transformers + PEFT, and
print them beside megalora's.

    python -m benchmarks.peft_eval_loss CONFIG.yaml CHECKPOINT [section.key=value ...]

Every sample runs alone and unpadded, in one process; the loss is the mean over all target tokens,
as in training.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalora.adapters.write.engines import hide_peft_warnings
from megalora.config.file import load_config
from megalora.data.splits import load_split


@torch.no_grad()
def mean_loss(model: torch.nn.Module, samples: list) -> float:
    """Mean cross entropy over the target tokens of all samples."""
    total = 0.0
    count = 0
    for sample in samples:
        ids = torch.as_tensor(sample.input_ids).long()
        # The mask marks tokens; logits at a place predict the next one.
        mask = torch.as_tensor(sample.loss_mask)[1:]
        losses = F.cross_entropy(model(ids[None, :-1]).logits[0].float(), ids[1:], reduction="none")
        # In float64: a sum over thousands of tokens would round more than the losses themselves.
        total += losses[mask].double().sum().item()
        count += int(mask.sum())
    return total / count


def eval_losses(base: str, adapter: Path, samples: list) -> tuple[float, float]:
    """Losses of the base model and with the adapter, in float32."""
    hide_peft_warnings()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = mean_loss(model, samples)
    return before, mean_loss(PeftModel.from_pretrained(model, str(adapter)).eval(), samples)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    if not isinstance(config.data.eval, str):
        parser.error(
            f"data.eval={config.data.eval!r} is held out of the training data; this needs a source"
            " of its own"
        )
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    data = config.data
    split = load_split(
        data.eval,
        tokenizer,
        format=data.format,
        max_length=data.max_length,
        too_long=data.too_long,
        allow_left_out=data.allow_left_out,
        cache=data.cache,
    )
    before, after = eval_losses(config.model.path, args.checkpoint, split.samples)
    # The first evaluation of a run is before its first step, with the base alone; the last one is
    # at its end.
    ours = []
    for line in (args.checkpoint.parent / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "eval_loss" in row:
            ours.append(row["eval_loss"])
    print(
        f"eval loss over {len(split.samples)} samples     megalora  transformers + PEFT  difference"
    )
    print(
        f"base model                    {ours[0]:>12.6f} {before:>20.6f}"
        f" {abs(ours[0] - before):>11.1e}"
    )
    print(
        f"adapter {args.checkpoint.name:<22}{ours[-1]:>12.6f} {after:>20.6f}"
        f" {abs(ours[-1] - after):>11.1e}"
    )


if __name__ == "__main__":
    main()
