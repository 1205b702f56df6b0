"""Give the tests of planned memory a model of full size."""

from pathlib import Path

import pytest

from megalora.config import LoRAConfig
from megalora.planner.models import load_shape
from megalora.planner.weights import PlannedModel

MODELS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture(scope="module")
def model() -> PlannedModel:
    """Qwen3-30B-A3B with the default adapter: 48 layers, hidden 2,048, 128 experts of 768 features,
    8 for each token."""
    return PlannedModel.of(load_shape(MODELS / "qwen3_30b_a3b.yaml"), LoRAConfig())
