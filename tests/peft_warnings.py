"""The marks of tests that load adapters with stock PEFT."""

import pytest

IGNORED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
"""PEFT calls patterns of ``rank_pattern`` unused that it does use."""
