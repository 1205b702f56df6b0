"""Check that ranks built on the meta device hold exactly the bytes that ``memory.py`` says,
whatever the layout."""

from dataclasses import replace
from pathlib import Path

import pytest

from megalora.config import LoRAConfig, ModelConfig, ParallelConfig
from megalora.fake_world import fake_world
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.trained_weight import trained_weights
from megalora.lora.whole import with_biases, with_trained
from megalora.model.families import FAMILIES, layer_projections
from megalora.model.fields import model_shape
from megalora.planner.dryrun import RankCount, dry_run
from megalora.planner.layouts import ParallelLayout
from megalora.planner.memory import memory_of
from megalora.planner.models import read_architecture
from megalora.planner.workload import Workload
from tests.parity.models import SIZES

MODELS = Path(__file__).parents[2] / "configs" / "models"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NAMES = [*ATTENTION, "gate_proj", "up_proj", "down_proj", "gate", "lm_head"]
# The default; ranks that differ between modules and are multiples of nothing; layers with gaps.
ALL = LoRAConfig()
ODD = LoRAConfig(rank=5, expert_rank=3, target_modules=NAMES, rank_pattern={"k_proj": 7})
SHARED = LoRAConfig(rank=5, expert_rank=3, share_outer=True)
BEGUN = LoRAConfig(rank=5, expert_rank=3, init="pissa", target_modules=NAMES[:-1])
SOME = LoRAConfig(
    target_modules=["q_proj", "o_proj", "up_proj"],
    layers="3-10,20-",
    exclude_modules=[r".*layers\.7\..*"],
)

# (model, ranks of the world, which of them are built, sizes, adapter). Building a rank takes a
# second or two, so of each world one or two stand for the others: first, middle or last stage.
CASES = [
    ("qwen3_30b_a3b", 1, (0,), {}, ALL),
    ("qwen3_30b_a3b", 8, (0, 5), {"ep": 8}, ALL),
    # Two ranks share a key/value head.
    pytest.param("qwen3_30b_a3b", 8, (7,), {"tp": 8, "ep": 8}, ODD, marks=pytest.mark.slow),
    ("qwen3_30b_a3b", 16, (0, 9), {"tp": 2, "pp": 2, "ep": 4}, ODD),
    ("qwen3_30b_a3b", 16, (3, 15), {"pp": 4, "vpp": 3, "ep": 2, "etp": 2}, SOME),
    ("qwen3_30b_a3b", 64, (17,), {"tp": 4, "pp": 2, "vpp": 2, "ep": 8, "etp": 4}, ODD),
    ("qwen3_30b_a3b", 16, (6,), {"tp": 2, "pp": 2, "ep": 4}, SHARED),
    pytest.param(
        "qwen3_30b_a3b", 16, (6,), {"tp": 2, "pp": 2, "ep": 4}, BEGUN, marks=pytest.mark.slow
    ),
    pytest.param(
        "qwen3_30b_a3b", 8, (3,), {"tp": 4, "ep": 4, "etp": 2}, SHARED, marks=pytest.mark.slow
    ),
    pytest.param(
        "qwen3_30b_a3b", 96, (40,), {"tp": 16, "pp": 6, "ep": 16}, ALL, marks=pytest.mark.slow
    ),
    pytest.param("qwen3_30b_a3b", 128, (127,), {"ep": 128}, ALL, marks=pytest.mark.slow),
    pytest.param("qwen3_235b_a22b", 8, (6,), {"ep": 8}, ALL, marks=pytest.mark.slow),
    ("qwen3_235b_a22b", 64, (0, 63), {"tp": 4, "pp": 2, "ep": 32}, ODD),
    # 16 ranks share a key/value head.
    ("qwen3_235b_a22b", 64, (33,), {"tp": 64, "etp": 8, "ep": 8}, ODD),
    ("qwen3_235b_a22b", 188, (100,), {"pp": 47, "tp": 4, "vpp": 2, "ep": 2, "etp": 2}, SOME),
    # 94 layers, of which embedding and head make 96.
    ("qwen3_235b_a22b", 64, (5, 63), {"pp": 4, "ep": 16, "stage_layers": (23, 24, 24, 23)}, ALL),
    ("qwen3_30b_a3b", 8, (1, 6), {"pp": 2, "vpp": 2, "ep": 4, "stage_layers": (3, 7, 30, 8)}, ODD),
    # A single layer in every chunk and half an expert on every rank; thousands of ranks.
    ("qwen3_235b_a22b", 512, (511,), {"pp": 2, "vpp": 47, "ep": 128, "etp": 2}, ALL),
    pytest.param(
        "qwen3_235b_a22b", 4096, (777,), {"tp": 8, "pp": 2, "ep": 32}, ALL, marks=pytest.mark.slow
    ),
]


def assert_agrees(
    found: RankCount,
    hf: dict,
    lora: LoRAConfig,
    parallel: ParallelConfig,
    world: int,
    rank: int,
    num_scores: int = 0,
    kept_cycles: int = 0,
    **work,
):
    """Compare what one rank was found to hold with the plan of its stage.

    Ranks are numbered with the pipeline stage outermost.
    """
    sizes = replace(model_shape(hf), num_scores=num_scores, kept_cycles=kept_cycles)
    shape = with_trained(lora, sizes)
    shape = with_biases(lora, shape, resolve(lora, shape))
    layout = ParallelLayout(parallel=parallel, num_ranks=world)
    stage = rank // (world // parallel.pp)
    # Any length and batch will do: weights do not depend on them.
    workload = Workload(sequence_length=64, global_batch_size=4096, **work)
    said = memory_of(shape, lora, layout, workload, stage)
    assert found.base_bytes == said["weights"]
    assert found.adapter_bytes == said["adapters"]
    # The model is cut into pp * vpp pieces, which the stages take in turn.
    num_pieces = parallel.pp * parallel.vpp
    piece_sizes = parallel.stage_layers or [shape.num_layers // num_pieces] * num_pieces
    piece_of: list[int] = []
    for piece, size in enumerate(piece_sizes):
        piece_of += [piece] * size
    pieces = range(stage, num_pieces, parallel.pp)

    def is_here(layer: int) -> bool:
        return piece_of[layer] in pieces

    num_routers = 0
    for layer in shape.moe_layers:
        num_routers += is_here(layer)
    # A correction bias and Megatron's count of tokens, 4 bytes each for every expert.
    buffers = num_routers * 8 * shape.num_experts * shape.correction_bias
    # Ids of trained rows, 8 bytes each; beside a tied head those of this rank's part of the
    # vocabulary, and their columns.
    width = shape.vocab // parallel.tp
    here = [token for token in shape.tokens if token // width == rank % parallel.tp]
    buffers += 8 * len(shape.tokens) * (0 in pieces)
    buffers += 16 * len(here) * shape.tied_embeddings * (num_pieces - 1 in pieces)
    assert found.buffer_bytes == buffers
    held = 0
    for weight in trained_weights(shape):
        if weight.layer is not None:
            held += is_here(weight.layer)
        # The embedding is in the first piece, all else outside of layers in the last one; a tied
        # embedding is in both.
        elif weight.module == "model.embed_tokens":
            held += 0 in pieces or (weight.tied and num_pieces - 1 in pieces)
        else:
            held += num_pieces - 1 in pieces
    for adapted in resolve(lora, shape):
        # The head, which belongs to no layer, is in the last piece.
        here = num_pieces - 1 in pieces if adapted.layer is None else is_here(adapted.layer)
        if here:
            # A and B, perhaps with what they began as, for each of the experts of this rank, or one
            # for all of them.
            own = max(1, adapted.num_experts // parallel.ep)
            held += len(adapted.factors) * own if adapted.shared is None else own + 1
    assert found.num_tensors == held


@pytest.mark.parametrize(("name", "world", "ranks", "sizes", "lora"), CASES)
def test_bytes_of_a_rank(
    name: str, world: int, ranks: tuple[int, ...], sizes: dict, lora: LoRAConfig
) -> None:
    hf = read_architecture(MODELS / f"{name}.yaml")
    parallel = ParallelConfig(**sizes)
    for rank in ranks:
        with fake_world(rank, world):
            found = dry_run(hf, lora, parallel, ModelConfig(path="planned"))
        assert_agrees(found, hf, lora, parallel, world, rank)


# Small models with what the two large ones do not have; all ranks of each are built.
SMALL = [
    ("everything", 1, {}),
    ("everything", 4, {"tp": 4, "ep": 2, "etp": 2}),
    ("everything", 4, {"tp": 2, "pp": 2, "ep": 2}),
    ("tiny", 4, {"pp": 2, "vpp": 2, "etp": 2}),
    ("tiny_dense", 4, {"tp": 2, "pp": 2}),
    ("tiny", 3, {"pp": 3, "stage_layers": (1, 2, 1)}),
]


@pytest.mark.parametrize(("model", "world", "sizes"), SMALL)
def test_shared_experts_dense_layers_biases_and_float32(
    model: str, world: int, sizes: dict, request: pytest.FixtureRequest
) -> None:
    hf = read_hf_config(request.getfixturevalue(model))
    parallel = ParallelConfig(**sizes)
    names = list(NAMES)
    # A dense model has no router, and a name that matches nothing is a mistake.
    if model == "tiny_dense":
        names.remove("gate")
    lora = LoRAConfig(rank=3, target_modules=names)
    for rank in range(world):
        with fake_world(rank, world):
            found = dry_run(hf, lora, parallel, ModelConfig(path="planned", dtype="float32"))
        assert_agrees(found, hf, lora, parallel, world, rank, dtype="float32")


@pytest.mark.parametrize("sizes", [{"tp": 2, "pp": 2}, {"ep": 2, "etp": 2}, {"tp": 4}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, sizes: dict) -> None:
    """With attention, MLPs, experts, routers and head adapted."""
    hf = {**FAMILIES[family].tiny, **SIZES, "model_type": family}
    shape = model_shape(hf)
    # Dense families have no experts to divide.
    if not shape.moe_layers:
        sizes = {name: size for name, size in sizes.items() if name not in ("ep", "etp")}
    parallel = ParallelConfig(**sizes)
    names = {"lm_head"}
    for layer in range(shape.num_layers):
        for projection in layer_projections(shape, layer):
            names.add(projection.name)
    lora = LoRAConfig(rank=3, target_modules=sorted(names))
    for rank in range(4):
        with fake_world(rank, 4):
            found = dry_run(hf, lora, parallel, ModelConfig(path="planned"))
        assert_agrees(found, hf, lora, parallel, 4, rank)


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}, {"pp": 2, "stage_layers": (3, 1)}])
def test_tied_embeddings(sizes: dict, tiny_dense: Path) -> None:
    """One tensor where both are on one rank, a copy where the head is on another."""
    hf = read_hf_config(tiny_dense) | {"tie_word_embeddings": True}
    parallel = ParallelConfig(**sizes)
    for rank in range(parallel.pp):
        with fake_world(rank, parallel.pp):
            found = dry_run(hf, ALL, parallel, ModelConfig(path="planned"))
        assert_agrees(found, hf, ALL, parallel, parallel.pp, rank)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}])
def test_a_score_head(sizes: dict, tied: bool, tiny_dense: Path) -> None:
    """In place of lm_head, whose weight is nowhere but, tied, in the embedding."""
    hf = read_hf_config(tiny_dense) | {"tie_word_embeddings": tied}
    parallel = ParallelConfig(**sizes)
    for rank in range(2):
        with fake_world(rank, 2):
            found = dry_run(hf, ALL, parallel, ModelConfig(path="planned"), num_scores=3)
        assert_agrees(found, hf, ALL, parallel, 2, rank, num_scores=3)


@pytest.mark.parametrize("sizes", [{"tp": 2, "etp": 2}, {"pp": 2, "ep": 2, "tp": 2}])
def test_kept_cycles(sizes: dict, tiny: Path) -> None:
    """Adapters of earlier cycles have room from the beginning."""
    hf = read_hf_config(tiny)
    parallel = ParallelConfig(**sizes)
    world = parallel.tp * parallel.pp
    lora = LoRAConfig(rank=5, expert_rank=3, target_modules=NAMES, rank_pattern={"k_proj": 7})
    for rank in (0, world - 1):
        with fake_world(rank, world):
            found = dry_run(hf, lora, parallel, ModelConfig(path="planned"), kept_cycles=3)
            without = dry_run(hf, lora, parallel, ModelConfig(path="planned"))
        assert_agrees(found, hf, lora, parallel, world, rank, kept_cycles=3)
        assert found.adapter_bytes == 4 * without.adapter_bytes


EVERY_NORM = ["norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm"]
SAVED = LoRAConfig(
    target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "gate", *EVERY_NORM]
)
BIASES = LoRAConfig(target_modules=["q_proj"], bias="all")
ROWS = LoRAConfig(target_modules=["q_proj"], trainable_token_indices=[250, 3])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [SAVED, ROWS], ids=["weights", "rows"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"pp": 2}, {"pp": 2, "ep": 2, "tp": 2}])
def test_what_is_trained_of_the_base(lora: LoRAConfig, tied: bool, sizes: dict, tiny: Path) -> None:
    """On each rank what it has of it, and of a tied embedding a copy on the last stage."""
    hf = read_hf_config(tiny) | {"tie_word_embeddings": tied}
    parallel = ParallelConfig(**sizes)
    world = parallel.tp * parallel.pp
    for rank in range(world):
        with fake_world(rank, world):
            found = dry_run(hf, lora, parallel, ModelConfig(path="planned"))
        assert_agrees(found, hf, lora, parallel, world, rank)


@pytest.mark.parametrize("lora", [ALL, BIASES], ids=["frozen", "trained"])
def test_biased_attention(lora: LoRAConfig, tiny: Path) -> None:
    """q's, k's and v's are cut over TP with their rows; o's is on every rank."""
    hf = read_hf_config(tiny) | {"attention_bias": True}
    parallel = ParallelConfig(tp=2)
    for rank in range(2):
        with fake_world(rank, 2):
            found = dry_run(hf, lora, parallel, ModelConfig(path="planned"))
        assert_agrees(found, hf, lora, parallel, 2, rank)


@pytest.mark.parametrize(
    ("lora", "sizes", "message"),
    [
        (LoRAConfig(target_modules="q_porj"), {}, "did you mean q_proj"),
        (ALL, {"tp": 3}, "parallel.tp=3 does not fit"),
    ],
)
def test_mistakes_come_before_anything_is_built(
    lora: LoRAConfig, sizes: dict, message: str
) -> None:
    hf = read_architecture(MODELS / "qwen3_30b_a3b.yaml")
    with pytest.raises(ValueError, match=message):
        dry_run(hf, lora, ParallelConfig(**sizes), ModelConfig(path="planned"))
