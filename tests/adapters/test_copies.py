"""Compare weights that PEFT saves beside an adapter with the base's: pass over copies, refuse what
was trained, and name what cannot be compared."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalora.adapters.export import export
from megalora.adapters.files import WEIGHTS
from megalora.adapters.merge import merge
from megalora.adapters.read.copies import ROUND, copies_in, difference
from megalora.adapters.read.weights import AdapterWeights, as_floats
from megalora.adapters.resumable import import_adapter
from megalora.hf.json_file import read_hf_config
from megalora.hf.safetensors import read_header
from megalora.serve.check import Limits, check_adapter
from megalora.serve.errors import AdapterInvalid
from megalora.tiny import make_tiny
from tests.adapters.adapters import logits
from tests.adapters.folders import refused
from tests.adapters.stock import base_model, check_equal, new_adapter, read_logits, shape_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PREFIX = "base_model.model."
HEAD = f"{PREFIX}lm_head.weight"
EMBEDDING = f"{PREFIX}model.embed_tokens.weight"
HEAD_COPY = f"{PREFIX}lm_head.base_layer.weight"
Q_COPY = f"{PREFIX}model.layers.1.self_attn.q_proj.base_layer.weight"


def edit(folder: Path, **tensors: Tensor | None) -> None:
    """Set tensors of the adapter file; None removes one."""
    held = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor.contiguous()
    save_file(held, folder / WEIGHTS)


@pytest.mark.parametrize("base", ["moe", "tied"])
@pytest.mark.parametrize(
    ("targets", "save", "copies"),
    [
        # PEFT saves the layer below an adapter of the head by itself, under its wrapper's name.
        (["q_proj", "lm_head"], {}, [HEAD_COPY]),
        (["q_proj"], {"save_embedding_layers": True}, [HEAD, EMBEDDING]),
    ],
    ids=["lm_head targeted", "embeddings saved"],
)
def test_copies_are_passed_over_and_named(
    bases: dict[str, Path],
    tmp_path: Path,
    base: str,
    targets: list[str],
    save: dict,
    copies: list[str],
) -> None:
    model = new_adapter(bases[base], target_modules=targets)
    model.save_pretrained(tmp_path, **save)
    assert set(copies_in(AdapterWeights(tmp_path), shape_of(bases[base]))) == set(copies)
    (note,) = check_equal(tmp_path, bases[base], logits(model)).notes
    head, _, named = note.partition(": ")
    assert head == "passed over, as it equals the base's"
    # Names come in the file's order.
    assert sorted(named.split(", ")) == sorted(copies)


def test_a_copy_of_any_linear(bases: dict[str, Path], tmp_path: Path) -> None:
    """As a state_dict() of the wrapped model has them."""
    model = new_adapter(bases["moe"], target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    weight = base_model(bases["moe"]).model.layers[1].self_attn.q_proj.weight.detach()
    edit(tmp_path, **{Q_COPY: weight.clone()})
    assert check_equal(tmp_path, bases["moe"], logits(model)).notes == [
        f"passed over, as it equals the base's: {Q_COPY}"
    ]
    # One column of 96 differs, by a ten-thousandth.
    edit(tmp_path, **{Q_COPY: weight + 1e-4 * (torch.arange(96) == 17)})
    assert refusal(tmp_path, bases["moe"]).startswith(
        f"{tmp_path / WEIGHTS}: {Q_COPY} differs from model.layers.1.self_attn.q_proj.weight of"
        f" {bases['moe']}, by up to 0.0001: it was trained, or the adapter is of another base."
    )


def refusal(adapter: Path, base: Path) -> str:
    return refused(lambda: read_logits(adapter, base))


@pytest.fixture
def saved(bases: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter of q_proj and lm_head with the embedding beside it."""
    folder = tmp_path / "adapter"
    new_adapter(bases["moe"], target_modules=["q_proj", "lm_head"]).save_pretrained(folder)
    embedding = base_model(bases["moe"]).model.embed_tokens.weight.detach()
    edit(folder, **{EMBEDDING: embedding.clone()})
    return folder


def with_number(w: Tensor, place: int, number: float) -> Tensor:
    """``w`` with one of its numbers, counted row by row, raised by ``number``."""
    # flatten() alone may be a view, and would change ``w``.
    flat = w.flatten().clone()
    flat[place] += number
    return flat.view_as(w)


# Changes of the embedding [512, 96].
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    # In row 8, which a comparison of samples would miss.
    "one number": lambda w: with_number(w, 777, 1e-3),
    # As of a token that was added last.
    "the last row": lambda w: torch.cat([w[:-1], w[-1:] + 0.01]),
    # The same numbers, so that sums and norms agree.
    "rows exchanged": lambda w: w.flip(0),
    "zeros": torch.zeros_like,
    # No comparison with NaN holds: a check for ``difference > 0`` would pass it over.
    "NaN": lambda w: with_number(w, 5, torch.nan),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_trained_embedding_is_refused_by_every_command(
    bases: dict[str, Path], tmp_path: Path, saved: Path, change: str
) -> None:
    embedding = load_file(saved / WEIGHTS)[EMBEDDING]
    edit(saved, **{EMBEDDING: CHANGES[change](embedding)})
    base = str(bases["moe"])
    out = tmp_path / "out"
    message = f"{EMBEDDING} differs from model.embed_tokens.weight of "
    for command in (
        lambda: import_adapter(saved, out, base),
        lambda: export(saved, out, base=base),
        lambda: merge(saved, base, out),
    ):
        with pytest.raises(ValueError, match=message):
            command()
        assert not out.exists()


def test_a_resized_vocabulary_is_refused_without_the_base_too(
    bases: dict[str, Path], saved: Path, tmp_path: Path
) -> None:
    embedding = load_file(saved / WEIGHTS)[EMBEDDING]
    # Eight more tokens: config.json alone says that the base has 512.
    edit(saved, **{EMBEDDING: torch.cat([embedding, torch.ones(8, 96)])})
    message = (
        r"embed_tokens.weight is \(520, 96\), and the base's weight \(512, 96\): the vocabulary was"
        r" resized, or the adapter"
    )
    with pytest.raises(ValueError, match=message):
        import_adapter(saved, tmp_path / "out", str(without_weights(bases["moe"], tmp_path)))


def without_weights(base: Path, tmp_path: Path) -> Path:
    """The base's config alone, as on a machine that has not downloaded its weights."""
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    return folder


def test_what_cannot_be_compared_is_named(
    bases: dict[str, Path], saved: Path, tmp_path: Path
) -> None:
    base = without_weights(bases["moe"], tmp_path)
    expected = (
        "passed over without a comparison, because the base's weights are not at hand:"
        f" {HEAD_COPY}, {EMBEDDING}; if the vocabulary or the embedding was trained, that is lost"
    )
    notes = import_adapter(saved, tmp_path / "a", str(base)).notes
    (note,) = [note for note in notes if "passed over" in note]
    # Names come in any order.
    assert set(note.replace(";", ",").split(", ")) == set(expected.replace(";", ",").split(", "))
    text = export(saved, tmp_path / "b", base=str(base)).text()
    assert f"not at hand: {HEAD_COPY}" in text or f"not at hand: {EMBEDDING}" in text
    # A merge needs the weights, and so compares.
    text = merge(saved, str(bases["moe"]), tmp_path / "c").text()
    assert "passed over, as it equals the base's: " in text


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WAYS = []
"""(dtype of the base's file, dtype it was loaded in, dtype of the adapter's file)."""
for _stored, _loaded in itertools.product(FLOATS, FLOATS):
    # What was loaded in half precision is only ever widened.
    for _saved in FLOATS if _loaded == torch.float32 else (_loaded, torch.float32):
        WAYS.append((_stored, _loaded, _saved))


@pytest.mark.parametrize(("stored", "loaded", "saved_as"), WAYS)
def test_a_copy_in_the_dtype_that_the_base_was_loaded_in(
    tmp_path: Path, stored: torch.dtype, loaded: torch.dtype, saved_as: torch.dtype
) -> None:
    """A copy whatever it passed through; not one with a bit changed."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 7, generator=generator).to(stored)
    # Rounded twice, as the base was loaded and as the adapter was saved.
    copy = base.to(loaded).to(saved_as)
    save_file({"model.embed_tokens.weight": base}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    _, (place,) = read_header(tmp_path / "model.safetensors")
    for change, equal in ((0, True), (1, False)):
        # Adding 1 to a float's bits makes the next larger number.
        bits = copy.clone().view(torch.int32 if saved_as == torch.float32 else torch.int16)
        bits[123, 3] += change
        save_file({"x": bits.view(saved_as)}, tmp_path / WEIGHTS)
        found = difference(AdapterWeights(tmp_path), "x", tmp_path / "model.safetensors", place)
        assert (found is None) == equal, (found, change)


def test_rounding_is_torch_s() -> None:
    """Ties, the largest numbers and the smallest included."""
    generator = torch.Generator().manual_seed(0)
    # Random bits rather than random numbers: every exponent is as likely.
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    # Every bfloat16 and half a step: exactly between two numbers.
    ties = (torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16) + 0x8000
    values = torch.cat([bits, ties]).view(torch.float32)
    values = values[values.isfinite()]
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float32, "F32")):
        np.testing.assert_array_equal(ROUND[name](values.numpy()), values.to(dtype).float().numpy())
    # NumPy has no bfloat16: it is read as the upper half of a float32.
    half = values.to(torch.bfloat16)
    np.testing.assert_array_equal(
        as_floats(half.view(torch.uint16).numpy(), "BF16"), half.float().numpy()
    )


def test_a_server_s_check(bases: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    """vLLM passes over ``base_layer`` copies and takes its own base; it refuses bare weights."""
    edit(saved, **{EMBEDDING: None})
    # A copy that equals the base's changes nothing that the server would compute.
    needs = check_adapter(saved, Limits(base=bases["moe"]))
    # vLLM's name of the fused q, k and v.
    assert needs.target_modules == {"qkv_proj", "lm_head"}
    # Nor does it change what is found without a base to compare with.
    assert needs == check_adapter(saved)
    copied = load_file(saved / WEIGHTS)[HEAD_COPY]
    edit(saved, **{HEAD_COPY: copied * 1.5})
    with pytest.raises(AdapterInvalid, match=f"{HEAD_COPY} differs from lm_head.weight"):
        check_adapter(saved, Limits(base=bases["moe"]))
    edit(saved, **{HEAD_COPY: None, HEAD: copied})
    with pytest.raises(
        AdapterInvalid,
        match=f"{HEAD} is not a LoRA factor but a whole weight, which vLLM refuses; megalora",
    ):
        check_adapter(saved, Limits(base=bases["moe"]))


def test_a_head_is_compared_with_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    base = make_tiny(tmp_path / "base", tie_word_embeddings=True, num_hidden_layers=2)
    assert read_hf_config(base)["tie_word_embeddings"]
    model = new_adapter(base, target_modules=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    check_equal(tmp_path / "adapter", base, logits(model))
    # A copy that would pass if nothing were found to compare it with.
    edit(tmp_path / "adapter", **{HEAD_COPY: torch.ones(512, 96)})
    assert f"{HEAD_COPY} differs from model.embed_tokens.weight" in refusal(
        tmp_path / "adapter", base
    )
