"""Say in lines for the user what run begins, and how it ended."""

from pathlib import Path

import torch.distributed as dist

from megalora import host
from megalora.adapters.best_loss import BestLoss
from megalora.adapters.training_state import SavedState
from megalora.config import ObjectiveConfig, RunConfig
from megalora.data.mixture import turns_by
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.coverage import trainable_summary
from megalora.planner.dropout_cost import dropout_cost
from megalora.train import duration
from megalora.train.batches import Batches
from megalora.train.checkpoint.writer import checkpoint_name


def opening(
    config: RunConfig, model: AdaptedModel, batches: Batches, resume_from: Path | None
) -> str:
    """The first lines of a run: model, layout, adapters and data."""
    p = config.parallel
    world = dist.get_world_size()
    dp, edp = p.data_parallel_sizes(world)
    # Few runs have it: the line stays what it was for the others.
    cp = f" cp={p.cp}" if p.cp > 1 else ""
    lines = [
        (
            f"{config.model.path} ({model.shape.model_type}) on {world} x {host.device_name()}:"
            f" tp={p.tp}{cp} pp={p.pp} vpp={p.vpp} dp={dp},"
            f" experts etp={p.etp} ep={p.ep} edp={edp}"
        ),
        trainable_summary(model.adapted, model.shape),
        f"train: {batches.train.summary()}",
    ]
    if weights := config.data.weights:
        num_samples = batches.num_steps * config.train.global_batch_size
        for part, turns in zip(batches.train.parts, turns_by(num_samples, weights), strict=True):
            passes = turns / len(part.samples)
            lines.append(f"  {turns:,} samples of {part.source}, {passes:.2f} passes")
    if config.lora.dropout:
        on_cpu = host.device().type == "cpu"
        cost = dropout_cost(config, model.shape, model.adapted, world, on_cpu=on_cpu)
        lines.append(cost)
    if batches.eval:
        lines.append(f"eval: {batches.eval.summary()}")
    if note := duration.note(config.train, len(batches.train.samples)):
        lines.append(note)
    if resume_from:
        lines.append(f"continuing from {resume_from}")
    return "\n".join(lines)


def reference_notes(objective: ObjectiveConfig, state: SavedState | None) -> list[str]:
    """Lines about a reference that may not be the one the user has in mind."""
    if not objective.num_references:
        return []
    if objective.reference == "start" and state is None:
        return [
            "objective.reference=start: a fresh adapter is the base, with which"
            " objective.reference=base compares without a copy"
        ]
    of_base = objective.reference == "base"
    if (policy := objective.learned_policy) is not None:
        of_base &= policy.kl_coef > 0
    if of_base and state is not None and state.imported_from is not None:
        return [
            f"objective.name={objective.name} compares with the base, not with the imported"
            " adapter; objective.reference=start compares with that"
        ]
    return []


def closing(
    step: int, num_steps: int, saved: Path | None, best: BestLoss, config: RunConfig
) -> str:
    """The last line of a run, whatever has ended it."""
    how = "stopped by a signal"
    if step >= num_steps:
        how = "finished"
    elif best.is_out_of(config.train.patience):
        how = (
            f"ended early by train.patience={config.train.patience} ({best.since} evaluations"
            f" without a new lowest loss; {best.words()})"
        )
    memory = ""
    # 0 on a CPU, where nobody counts it.
    if peak := host.peak_memory_bytes():
        memory = f" (peak memory of a rank: {peak / 2**30:.1f} GiB)"
    result = f"the adapter is {saved}" if saved else "nothing was trained or saved"
    if config.checkpoint.keep_best and best.loss is not None:
        name = checkpoint_name(best.step)
        # A run that went on from another's checkpoint may have had its lowest loss there.
        if (Path(config.checkpoint.dir) / name).is_dir():
            result += f", the one of the lowest eval loss {name} (best)"
        else:
            result += f"; the checkpoint of the lowest eval loss, of step {best.step}, is not there"
    return f"{how} at step {step}{memory}; {result}"
