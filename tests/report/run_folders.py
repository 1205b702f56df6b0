"""Make run folders of known numbers, as training leaves them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megalora.train.expert_tokens import ExpertTokens

LAYERS = [1, 3]
EXPERTS = 4
RANK = 2
ALPHA = 6
HOSTILE = "</script><script>alert(1)</script><b>&\"'<img src=http://evil.example/x.png>"


def rows(num_steps: int = 6, shift: float = 0.0) -> list[dict[str, Any]]:
    """Records of steps and two evaluations; every quantity has its own values."""
    found: list[dict[str, Any]] = [
        {"step": 0, "eval_loss": 5 + shift, "eval_accuracy": 0.5, "eval_margin": 0.0}
    ]
    for step in range(1, num_steps + 1):
        found.append(
            {
                "step": step, "loss": 4 / step + shift, "lr": 1e-4 * step,
                "grad_norm": 0.3 + step % 3, "tokens_per_second": 1000.0 + 10 * step,
                "memory_gib": 2 + 0.1 * step, "slots_used": 0.9 + 0.01 * step,
                "expert_entropy": 0.8 + 0.02 * step, "starved_experts": 0.25 / step,
                "ratio": 1 + 0.01 * step, "clipped_share": 0.1 * step, "kept_share": 1 / step,
                "mismatch_weight": 1 + 0.02 * step, "entropy": 2 - 0.1 * step,
                "reward": 0.01 * step, "reward_std": 0.5 + step, "completion_tokens": 40 + step,
                "truncated": 0.25 + step, "groups_alike": 0.125 + step, "staleness_max": 1 + step,
                "engine_gap": 0.3 + step, "engine_gap_max": 0.9 + step, "engine_k3": 0.03 + step,
                "accuracy": 0.5 + 0.05 * step, "margin": 0.3 * step - 0.2,
                "chosen_reward": 0.1 * step, "rejected_reward": 0.2 - 0.2 * step,
                "chosen_cross_entropy": 3 - 0.1 * step,
                "kl": 0.4 * step, "good_reward": 0.15 * step, "bad_reward": 0.1 - 0.3 * step,
                "divergence": 0.7 / step, "cross_entropy": 2.5 - 0.05 * step,
                "balance_loss": 1 + 0.5 / step,
            }
        )  # fmt: skip
    last = {"step": num_steps, "eval_loss": 2 + shift, "eval_accuracy": 0.9, "eval_margin": 1.7}
    return [*found, last]


def counts(step: int) -> np.ndarray:
    """``[layers, experts]``: layer 1 even, of layer 3 the last expert starved."""
    return np.array([[10, 10, 10, 10], [20, 15, 10, 0]]) * step


def answers(step: int, hostile: str) -> dict[str, Any]:
    """Two questions, of which the data has an answer to the first alone."""
    first = {"asked": f"first {hostile}", "expected": f"right {hostile}"}
    second = {"asked": "second", "expected": "", "answer": f"other {step}"}
    return {"step": step, "answers": [{**first, "answer": f"said {step} {hostile}"}, second]}


def factors() -> dict[str, torch.Tensor]:
    """A and B of one dense projection and of three of two experts in layer 3, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in (
        "self_attn.q_proj",
        "mlp.experts.0.gate_proj",
        "mlp.experts.0.up_proj",
        "mlp.experts.2.gate_proj",
    ):
        name = f"base_model.model.model.layers.3.{module}"
        a = torch.randn(RANK, 5, generator=generator)
        b = torch.randn(7, RANK, generator=generator)
        tensors[f"{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"{name}.lora_B.weight"] = b.bfloat16()
    return tensors


def make_run(folder: Path, *, shift: float = 0.0, hostile: str = "fine") -> Path:
    """A whole run folder.

    Args:
        hostile: text that stands wherever a run folder holds text of others.
    """
    folder.mkdir(parents=True)
    lines = [json.dumps(row) for row in rows(shift=shift)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = {
        "model": {"path": f"base {hostile}"}, "data": {"train": hostile},
        "train": {"steps": 6, "lr": 1e-4 + shift}, "lora": {"rank": RANK},
        "parallel": {"tp": 2, "pp": 1}, hostile: {"key": hostile},
    }  # fmt: skip
    # JSON is YAML.
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "environment.json").write_text(
        json.dumps({"python": "3.12.1", "device": hostile, "ranks": 2})
    )
    sample = {"parts": [[f"a question {hostile}", False], ["an answer", True]], "tokens": 9}
    (folder / "samples.json").write_text(json.dumps({"samples": [{**sample, "in_loss": 3}] * 3}))
    lines = [json.dumps(answers(step, hostile)) for step in range(0, 9)]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\n")
    experts = ExpertTokens(folder, LAYERS, EXPERTS)
    experts.open(0, 6, 1)
    for step in (2, 4):
        experts.write(step, counts(step))
    _make_checkpoint(folder / "step_000006", hostile)
    (folder / "latest").write_text("step_000006\n")
    manifest = {
        # Another scale than alpha / rank, as of a pattern.
        "adapted": [{"module": "model.layers.3.mlp.experts.*.gate_proj", "scale": 0.5}]
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _make_checkpoint(folder: Path, hostile: str) -> None:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [hostile]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(factors(), folder / "adapter_model.safetensors")
