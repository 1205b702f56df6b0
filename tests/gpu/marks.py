"""Mark tests that run on a CUDA device alone."""

import pytest
import torch

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device: run `make gpu` on a machine that has one",
    ),
]
"""``pytestmark`` of a test file."""
