"""Mark tests that load adapters with stock PEFT, which warns of what is no fault."""

import pytest

IGNORED = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
"""PEFT calls patterns of ``rank_pattern`` unused that it does use."""
