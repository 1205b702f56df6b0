"""Run scenarios on the pretended GPU in this process and print what was seen, as JSON.

    python -m tests.pretended.run [NAME ...]

Without names all scenarios run. The mistakes of ``of_mistakes`` run always: they show that the
device notices what it is for.
"""

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.pretended.device import install, note_compiled, pretended_gpu
from tests.pretended.recorder import Recorder, print_and_end
from tests.pretended.scenarios import SCENARIOS


def all_there(shape: tuple[int, ...]) -> np.ndarray:
    """What ``check_coverage`` reads from the device: a bit for each expected tensor, all set, and a
    last one for tensors that should not exist."""
    found = np.ones(shape, dtype=np.uint8)
    found[-1] = 0
    return found


def of_scenarios(recorder: Recorder, wanted: list[str]) -> dict[str, Any]:
    """Name -> what was seen of it, with the traceback where it did not run to its end."""
    from tests.pretended.steps import run  # imports Megatron

    # Behind the import: it looks through the modules of Megatron that are there by now.
    note_compiled(recorder)
    recorder.answers["check_coverage"] = all_there
    seen: dict[str, Any] = {}
    for scenario in SCENARIOS:
        if wanted and scenario.name not in wanted:
            continue
        start = time.process_time()
        error = None
        recorder.forget()
        # One scenario that fails must not hide what the others would have shown.
        try:
            run(scenario, recorder)
        except Exception:
            error = traceback.format_exc()
        seen[scenario.name] = {
            "waits": recorder.waits, "copies": recorder.copies, "kernels": recorder.kernels,
            "error": error,
            "seconds": round(time.process_time() - start, 2),
        }  # fmt: skip
    return seen


def of_mistakes(recorder: Recorder) -> dict[str, list[str]]:
    """Name of a mistake -> what was seen of it alone."""
    from megatron.core.fusions import fused_bias_swiglu

    # What a step may do: copy from page-locked memory, copy back without waiting, and use masks
    # where no size depends on them.
    def nothing_wrong(x: torch.Tensor) -> None:
        pinned = torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
        mask = x > 0
        x.to("cpu", non_blocking=True)
        x[:, torch.arange(2, device="cuda")] = torch.where(mask, x, -x)[:, :2]
        x[mask] = 0.0
        pinned.sum().add_(1)

    mistakes: dict[str, Callable[[torch.Tensor], Any]] = {
        "none": nothing_wrong,
        "item": lambda x: float(x[0, 0]),
        "tolist": lambda x: x.tolist(),
        "nonzero": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 0],
        # non_blocking alone is not enough: the memory must be page-locked as well.
        "pageable": lambda x: torch.zeros(3).to("cuda", non_blocking=True),
        "blocking": lambda x: torch.zeros(3).pin_memory().to("cuda"),
        "compiled": lambda x: fused_bias_swiglu.swiglu(x),
        "mixed devices": lambda x: x + torch.ones(4, 8),
    }
    seen: dict[str, list[str]] = {}
    for name, make in mistakes.items():
        recorder.forget()
        with pretended_gpu(recorder), recorder.phase(name):
            try:
                make(torch.ones(4, 8, device="cuda"))
            # "mixed devices" raises, as it would on a GPU; the message counts as what was seen.
            except RuntimeError as error:
                recorder.wait(str(error))
        seen[name] = list(recorder.waits[name])
    return seen


def main(wanted: list[str]) -> None:
    recorder = Recorder()
    install(recorder)  # before anything of Megatron is imported
    from megalora import host

    host.install()
    seen = of_scenarios(recorder, wanted)
    seen["mistakes"] = of_mistakes(recorder)
    print_and_end(seen)


if __name__ == "__main__":
    main(sys.argv[1:])
