"""Loss and gradients of every A and B against stock transformers + PEFT, which loads the adapter
from a folder we wrote."""

from dataclasses import replace
from pathlib import Path

import pytest
from peft.utils import transformers_weight_conversion
from safetensors.torch import save_file

from megalora.adapters.files import WEIGHTS, parts_of
from megalora.adapters.write.parts import write_in_parts
from megalora.config import LoRAConfig, ParallelConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import plan
from megalora.model.families import FAMILIES, layer_projections
from megalora.model.fields import model_shape
from megalora.tiny import make_tiny
from tests.distributed.ranks import run_ranks
from tests.oracles.peft import PeftOracle
from tests.parity.built import first_gradients, random_factors
from tests.parity.compare import of_largest, projection
from tests.parity.everything import LORA, config_of, first_batch
from tests.parity.models import SIZES, arch_of

# With rslora the scale is alpha / sqrt(r), 6.9 here in the place of 4.
RSLORA = replace(LORA, use_rslora=True)
DORA = LoRAConfig(
    rank=5, alpha=20.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_dora=True
)
# DoRA on attention, plain LoRA on experts, router and head.
IN_PARTS = replace(LORA, use_dora=DORA.target_modules)
BIAS = LoRAConfig(
    rank=5, alpha=20.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_bias=True
)
# Biases of the base: of all its linears, or of q and v in one layer, behind DoRA's magnitudes.
ALL_BIASES = LoRAConfig(rank=5, alpha=20.0, target_modules=["k_proj", "gate"], bias="all")
OWN_BIASES = replace(DORA, target_modules=["q_proj", "v_proj"], layers="1", bias="lora_only")
OF_QKV = replace(BIAS, target_modules=["q_proj", "v_proj"], use_rslora=True)
CASES = {
    "in parts: single": ("everything", IN_PARTS, 1, {}),
    "dora: tp2-ep2": ("biased", DORA, 2, {"tp": 2, "ep": 2}),
    "dora: tp4-ep4": ("everything", replace(DORA, use_rslora=True), 4, {"tp": 4, "ep": 4}),
    "lora bias: tp2-ep2": ("biased", BIAS, 2, {"tp": 2, "ep": 2}),
    "lora bias: tp4-ep4": ("everything", OF_QKV, 4, {"tp": 4, "ep": 4}),
    "all-biases: tp2": ("biased", ALL_BIASES, 2, {"tp": 2, "ep": 2}),
    "all-biases: tp4": ("everything", ALL_BIASES, 4, {"tp": 4, "ep": 4}),
    # Several query groups on a rank, whose rows alternate in the fused weight.
    "own-biases: pp2": ("biased", OWN_BIASES, 2, {"pp": 2}),
    "lora bias: pp2": ("biased", BIAS, 2, {"pp": 2}),
    "dora: single": ("tiny", DORA, 1, {}),
    "qwen3: single": ("tiny", RSLORA, 1, {}),
    "qwen3: tp2-ep2": ("tiny", RSLORA, 2, {"tp": 2, "ep": 2}),
    "qwen3: pp2": ("tiny", LORA, 2, {"pp": 2}),
    "qwen2: tp2-ep2-etp2": ("everything", LORA, 4, {"tp": 2, "ep": 2, "etp": 2}),
    "qwen2: tp4-ep4": ("everything", RSLORA, 4, {"tp": 4, "ep": 4}),
    "biases: tp2-ep2": ("biased", RSLORA, 2, {"tp": 2, "ep": 2}),
}


FAST = (
    "in parts: single", "dora: tp2-ep2", "lora bias: tp2-ep2", "lora bias: pp2", "qwen3: tp2-ep2",
    "qwen3: pp2", "qwen2: tp2-ep2-etp2", "all-biases: tp2",
)  # fmt: skip
"""Each kind of adapter, and each way of splitting a model; the others are in the long tail."""
MARKED = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in CASES]


IN_PARTS_IN_RANKS = {
    "tp2-ep2": ("tiny", replace(IN_PARTS, use_rslora=True), 2, {"tp": 2, "ep": 2}),
    "tp2-ep2-etp2": ("everything", IN_PARTS, 4, {"tp": 2, "ep": 2, "etp": 2}),
}
NAMED = {arch_of({}), "qwen2_moe"}
"""Families that ``CASES`` has under other names."""
OTHER_FAMILIES = []
for family in FAMILIES:
    if family not in NAMED:
        # Dense, as Llama is, which stays in make test.
        marks = pytest.mark.slow if family in ("mistral", "qwen3") else ()
        OTHER_FAMILIES.append(pytest.param(family, marks=marks))


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k, v and o, and scaled rotary embeddings."""
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = tmp_path_factory.mktemp("models") / "biased"
    return make_tiny(
        folder, num_hidden_layers=2, attention_bias=True, mlp_only_layers=[1], rope_parameters=yarn
    )


@pytest.fixture(autouse=True)
def peft_knows_qwen2_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 converts per-expert adapters for all that is built like Qwen2-MoE, but its table
    lacks that name itself."""
    monkeypatch.setitem(
        transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN, "qwen2_moe", "qwen2_moe"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT calls patterns unused that it does use
@pytest.mark.parametrize("name", MARKED)
def test_gradients_of_stock_peft(
    name: str, chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, lora, world, parallel = CASES[name]
    base: Path = request.getfixturevalue(model)
    check_gradients(base, lora, world, parallel, chats, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", IN_PARTS_IN_RANKS)
def test_gradients_of_two_folders_of_stock_peft(
    name: str, chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, lora, world, parallel = IN_PARTS_IN_RANKS[name]
    base: Path = request.getfixturevalue(model)
    check_gradients(base, lora, world, parallel, chats, tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_gradients_of_stock_peft_in_every_family(family: str, chats: Path, tmp_path: Path) -> None:
    """With two tensor-parallel ranks, and every linear adapted that PEFT can adapt, router and head
    among them."""
    base = make_tiny(tmp_path / "base", arch=family, num_hidden_layers=2, **SIZES)
    shape = model_shape(read_hf_config(base))
    names = set()
    # Both layers: some families begin with a dense one.
    for layer in range(2):
        for linear in layer_projections(shape, layer):
            names.add(linear.name)
    # What stock PEFT would load and ignore has no gradient there to compare with.
    names -= FAMILIES[family].peft.not_honoured.keys()
    lora = replace(LORA, target_modules=[*sorted(names), "lm_head"])
    # A model without experts has no expert grid to divide.
    parallel = {"tp": 2, "ep": 2} if shape.moe_layers else {"tp": 2}
    check_gradients(base, lora, 2, parallel, chats, tmp_path)


def check_gradients(
    base: Path, lora: LoRAConfig, world: int, parallel: dict[str, int], chats: Path, tmp_path: Path
) -> None:
    shape, adapted = plan(lora, ParallelConfig(), base)
    _, factors = random_factors(lora, base)
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_in_parts(folder, adapted, shape, factors, str(base))
    save_file(factors, tmp_path / WEIGHTS)

    folders = parts_of(folder) or [folder]
    expected_loss, expected = PeftOracle(base, *folders).gradients(first_batch(base, chats))
    config = config_of(base, chats, tmp_path / "run", parallel, lora)
    loss, found = run_ranks(first_gradients, world, config, tmp_path / WEIGHTS)[0]
    # The limits of the grid: ``LIMITS`` in tests/parity/case.py says where they come from.
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    # PEFT's wrapper renames the biases of linears that it adapts.
    renamed = {name.replace(".base_layer.", "."): value for name, value in expected.items()}
    # A tied embedding is in the file under both names, and is trained under one.
    expected = {name: value for name, value in renamed.items() if name in factors}
    assert of_largest(found, expected) <= 1e-5
    # Zeros equal zeros: every projection must have a gradient for the comparison to mean something.
    trained = set()
    for name, gradient in expected.items():
        if gradient.any():
            trained.add(projection(name))
    assert trained == {projection(name) for name in factors}
