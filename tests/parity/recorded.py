"""Train with every step's gradients kept, on GPUs where there are any.

torchrun --nproc-per-node N -m tests.parity.recorded CONFIG START
"""

import sys
from pathlib import Path

from megalora import host

# Before anything from megatron is imported: on a machine without GPUs it answers the calls of
# torch.cuda that importing Megatron makes.
host.install()

from megalora.config.file import load_config  # noqa: E402
from tests.parity.case import train_recording_gradients  # noqa: E402

if __name__ == "__main__":
    with host.process_group():
        train_recording_gradients(load_config(sys.argv[1]), Path(sys.argv[2]))
