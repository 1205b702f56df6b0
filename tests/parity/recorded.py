"""``torchrun --nproc-per-node N -m tests.parity.recorded CONFIG START``: a run with its gradients
kept, on GPUs where there are any."""

import sys
from pathlib import Path

from megalora import host

host.install()  # before anything from megatron

from megalora.config.file import load_config  # noqa: E402
from tests.parity.case import train_recording_gradients  # noqa: E402

if __name__ == "__main__":
    with host.process_group():
        train_recording_gradients(load_config(sys.argv[1]), Path(sys.argv[2]))
