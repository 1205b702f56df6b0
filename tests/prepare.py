"""Prepare a process for tests: environment, imports, host.

Everything is imported once, so that ranks forked by ``tests/distributed/ranks.py`` start in
milliseconds. Whatever imports this module must do so before anything from Megatron."""

import tests.environment  # noqa: I001  before torch and Triton

import gc

import torch
from hypothesis import settings

from megalora import host

torch.set_num_threads(1)
# Autograd starts a thread for each device it knows of at the first backward pass, and a forked rank
# cannot use it after that. FakeTensorMode makes up eight devices: the first pass comes before any
# test can.
torch.zeros(1, requires_grad=True).sum().backward()
host.install()

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot
import megatron.core.models.mimo.optimizer  # noqa: F401  and at its beginning

import tests.parity.everything
import tests.parity.models  # noqa: F401  the rest: transformers, our model, its layers

settings.register_profile("default", max_examples=8, derandomize=True, deadline=None, database=None)
settings.register_profile("parity", max_examples=40, deadline=None, print_blob=True)
settings.load_profile("default")
gc.freeze()  # collecting what was imported would copy its pages into every forked rank
