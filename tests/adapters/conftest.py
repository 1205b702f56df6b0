"""Bases for tests of adapters, made once a session."""

from pathlib import Path

import pytest
from peft.utils import transformers_weight_conversion

from tests.adapters.adapters import EXPERTS, Trained, make_bases, train
from tests.adapters.merging import make_bases_to_merge_into


@pytest.fixture(scope="session")
def bases(
    tiny: Path, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bases that adapters are trained on, by what is special about them."""
    return make_bases(tmp_path_factory.mktemp("bases"), tiny, tiny_dense)


@pytest.fixture(scope="session")
def mergeable(
    tiny: Path, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Bases that adapters are merged into, by what is special about them."""
    return make_bases_to_merge_into(tmp_path_factory.mktemp("merge"), tiny, tiny_dense)


@pytest.fixture
def stored(bases: dict[str, Path], tmp_path: Path) -> Trained:
    """An adapter of experts and q_proj, for tests that change its files."""
    return train(
        bases["moe"], tmp_path / "adapter", rank=2, alpha=6.0, target_modules=[*EXPERTS, "q_proj"]
    )


@pytest.fixture(autouse=True)
def peft_knows_qwen2_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 converts per-expert adapters for all that is built like Qwen2-MoE, but its table
    lacks that name itself."""
    monkeypatch.setitem(
        transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, "qwen2_moe", "qwen2_moe"
    )
