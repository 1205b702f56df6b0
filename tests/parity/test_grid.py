"""Every layout trains the adapter that plain transformers trains: losses, gradients, norms,
adapters, Adam's moments."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megalora.hf.json_file import read_hf_config
from megalora.model.fields import model_shape
from tests.parity.base_formats import make_folders
from tests.parity.case import (
    Expected,
    deviations,
    exceeded,
    expected_of_clear_routing,
    limits_of,
    read_run,
    run_case,
)
from tests.parity.grid import SHORT, Case
from tests.parity.models import MODELS, make_model, make_teacher, shape_of
from tests.parity.quick_cases import FAST, MORE, MORE_OF_FAMILIES, QUICK, THREE_STAGES

type Reference = Callable[[Case], tuple[Path, Expected]]


# ``make test`` runs ``FAST``, ``make test-all`` ``QUICK``, ``make test-long`` ``MORE``. ``-k dpo``:
# those that learn from pairs; ``-k kto``: from labelled answers; ``-k distill``: from a teacher;
# ``-k grpo``: from rollouts; ``-k routed``: with given experts; ``-k classify``: with a score head;
# ``-k dora``: DoRA; ``-k begun``: a frozen pair beside A and B; ``-k bias``: biases of B;
# ``-k balanced``: those that keep experts evenly used; ``-k saved`` and ``-k tokens``: weights of
# the base that are trained themselves, and rows of it; ``-k "fp8 or nf4"``: frozen weights that
# stay codes.
MARKED = [pytest.param(case, marks=[] if case in FAST else pytest.mark.slow) for case in QUICK]
MARKED += [pytest.param(case, marks=pytest.mark.long) for case in MORE]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> Reference:
    """(base folder, what the oracle makes of it) for a case; each question is answered once."""
    root = tmp_path_factory.mktemp("grid")
    found = {}

    def look_up(case: Case) -> tuple[Path, Expected]:
        base = root / case.model.replace(" ", "-")
        if not base.exists():
            make_model(case.model, base)
            make_teacher(base)
        make_folders(base, case.base)
        if case.question not in found:
            found[case.question] = expected_of_clear_routing(case, SHORT, base, chats)
        return base, found[case.question]

    return look_up


@pytest.mark.parametrize("case", MARKED, ids=lambda case: case.name)
def test_layout_trains_the_adapter_that_transformers_trains(
    case: Case, reference: Reference, chats, tmp_path
):
    base, oracle = reference(case)
    run_case(case, SHORT, base, chats, tmp_path, seed=oracle.seed)
    row = deviations(read_run(tmp_path), oracle)
    assert not exceeded(row, limits_of(case)), row


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_OF_FAMILIES, ids=lambda case: case.name)
def test_a_family_trains_alike_in_more_layouts(case: Case, reference: Reference, chats, tmp_path):
    test_layout_trains_the_adapter_that_transformers_trains(case, reference, chats, tmp_path)


@pytest.mark.slow
def test_three_unequal_stages_train_alike(reference: Reference, chats, tmp_path):
    test_layout_trains_the_adapter_that_transformers_trains(
        THREE_STAGES, reference, chats, tmp_path
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_grid_knows_the_models_sizes(model: str, tmp_path: Path):
    # By ``shape_of`` the grid decides which layouts a model can have, without making the model.
    assert model_shape(read_hf_config(make_model(model, tmp_path / "base"))) == shape_of(model)
