"""Write into the run folder what a report of the run cannot find elsewhere: the software and device
it ran on, and the first samples as text."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalora import host
from megalora.data.chat import Encoded
from megalora.data.show import parts_of
from megalora.train.run_files import ENVIRONMENT, SAMPLES
from megalora.versions import SHOWN, versions

NUM_SAMPLES = 3


def shown_samples(samples: Sequence[Encoded], tokenizer: Any) -> list[dict[str, Any]]:
    """The first samples: their text in parts with whether each is in the loss, and their tokens."""
    shown: list[dict[str, Any]] = []
    for sample in samples[:NUM_SAMPLES]:
        shown.append(
            {
                "parts": parts_of(sample, tokenizer),
                "tokens": len(sample.input_ids),
                "in_loss": sample.num_target_tokens,
            }
        )
    return shown


def write_about(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Write both files; on the first rank."""
    environment = {
        **versions(SHOWN),
        "device": host.device_name(),
        "ranks": dist.get_world_size(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
    (folder / ENVIRONMENT).write_text(json.dumps(environment, indent=1) + "\n")
    (folder / SAMPLES).write_text(json.dumps({"samples": samples}, indent=1) + "\n")
