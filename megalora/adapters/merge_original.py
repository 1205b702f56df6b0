"""Find what an adapter of a quantised base is merged into: the model that the base was made from.

Merging into the base itself would quantise its weights again. They lie on the grid already, so a
delta below half a step of it rounds away.
"""

from pathlib import Path

from megalora.adapters.trained_on import trained_on
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config
from megalora.model.account import open_folder
from megalora.model.fields import model_shape, scheme_of
from megalora.model.shape import ModelShape


def _check_plain(folder: Path, original: Path) -> None:
    """Raise ``ValueError`` unless what the quantised base stores plain (norms, embedding, head,
    routers) has the original's values, but for rounding.

    Another model of the same sizes has others. So has a base whose norms were scaled before it was
    quantised, as AWQ and SmoothQuant do: its adapters read other inputs than the original's would.
    """
    import torch

    from megalora.model.base_weights import BaseWeights

    base = open_folder(folder)
    ours = BaseWeights(base)
    theirs = BaseWeights(open_folder(original))
    for name, place in base.places.items():
        if place.quantised or name not in theirs:
            continue
        a = ours[name].float()
        b = theirs[name].float()
        # Each may be stored in bfloat16, whose steps are 2^-8 of a value.
        if not torch.allclose(a, b, rtol=2**-7, atol=1e-6):
            raise ValueError(
                f"--original: {name} in {original} has other values than in {folder}. It is another"
                " model, or the base was scaled before it was quantised (AWQ, SmoothQuant), so that"
                " the adapter does not fit the original. Serve base and adapter side by side"
            )


def is_merged_into_original(
    folder: Path, original: str | None, adapter: Path | None = None
) -> bool:
    """Whether the base is quantised, or was for the training of ``adapter``, and its original is
    given.

    Raises:
        ValueError: only one of the two holds.
    """
    scheme = scheme_of(read_hf_config(folder), str(folder))
    known = None if adapter is None else trained_on(adapter)
    if scheme is None and known is not None and known.is_rounded:
        if original is None:
            raise ValueError(
                f"{adapter} was trained on a base that was {known.words()}: merged into"
                f" {folder} it is not the model that was trained, by the error of quantising."
                f" Serve base and adapter side by side, or ask for it: --original {folder}"
            )
        return True
    if scheme is None and original is not None:
        raise ValueError(f"--original: {folder} is not quantised; leave it out")
    if scheme is not None and original is None:
        # Other forms are not written.
        requantised = "; with --requantise the result is in the base's form"
        if scheme.form not in ("fp8", "nf4"):
            requantised = ""
        raise ValueError(
            f"{folder} is quantised ({scheme.title}): most of a small delta would round away. Serve"
            " base and adapter side by side, or merge into the model that the base was made from:"
            f" --original MODEL{requantised}"
        )
    return scheme is not None


def merged_into(
    folder: Path, shape: ModelShape, original: str | None, adapter: Path | None = None
) -> tuple[Path, list[str]]:
    """The folder that an adapter of the base in ``folder`` is merged into, and lines about it for
    the report; raises ``ValueError`` unless it is plain and has the base's sizes."""
    if not is_merged_into_original(folder, original, adapter):
        return folder, []
    found = local_folder(str(original), "--original")
    hf = read_hf_config(found)
    if scheme := scheme_of(hf, str(found)):
        raise ValueError(f"--original: {found} is quantised itself ({scheme.title})")
    if model_shape(hf) != shape:
        raise ValueError(f"--original: {found} has other sizes than {folder}")
    _check_plain(folder, found)
    about = (
        f"merged into {found}, as asked: the adapter was trained on {folder}, whose weights differ"
        " by the error of quantising them"
    )
    return found, [about]
