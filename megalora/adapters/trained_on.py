"""Name the base that an adapter was trained on: a digest of its weights, how its folder stored them
and how the run held them. No torch.

It lies in the metadata of the adapter's weights, as one JSON object under ``KEY``: PEFT and servers
read only tensors, and a copy of the two files of an adapter keeps it. Checkpoints of earlier
versions say the same in their training state. The values that a base computes with follow from its
folder, and where ``weight_format`` is nf4 or nf4_double, which round what a folder stores plain,
from that too.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalora.adapters.files import AVERAGED, STATE_JSON, parts_of
from megalora.adapters.read.weights import find_weight_files
from megalora.config import ModelConfig
from megalora.config.model import QUANTISING
from megalora.digests import Digests
from megalora.hf.base_identity import weights_digest
from megalora.hf.folder import weight_shards
from megalora.hf.json_file import read_hf_config, read_json_object
from megalora.hf.safetensors import read_header
from megalora.json_text import parse_json
from megalora.model.fields import scheme_of
from megalora.wording import shorten

KEY = "megalora_trained_on"


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """The base of a training."""

    digest: str | None
    """``weights_digest`` of its folder; None where its weights were not there."""
    quantised: str | None = None
    """How its folder stored linears, in words (``Scheme.title``); None for plain ones."""
    weight_format: str = "auto"
    quantised_parts: str = "linears"
    """The run's options of these names, which are ``ModelConfig``'s."""

    @property
    def is_rounded(self) -> bool:
        """Whether plain weights of the folder were quantised while they were read."""
        return self.weight_format in QUANTISING

    @property
    def is_quantised(self) -> bool:
        """Whether any of its values were quantised, by its maker or while they were read."""
        return self.is_rounded or self.quantised is not None

    @property
    def stored(self) -> str:
        """How the folder stored linears, in words."""
        return self.quantised or "plain"

    def words(self) -> str:
        """The form of the base that was trained on."""
        if not self.is_rounded:
            return self.stored
        return (
            f"{self.stored}, quantised to nf4 as it was read"
            f" (model.weight_format={self.weight_format}"
            f" model.quantised_parts={self.quantised_parts})"
        )

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {KEY: json.dumps(asdict(self))}


def base_of_run(
    config: Mapping[str, Any], digest: str | None, options: Mapping[str, Any]
) -> TrainedOn:
    """The base of a run.

    Args:
        config: fields of the base's ``config.json``.
        digest: ``weights_digest`` of its folder.
        options: the run's ``model`` section, by name.
    """
    scheme = scheme_of(config)
    return TrainedOn(
        digest=digest,
        quantised=None if scheme is None else scheme.title,
        # Earlier versions had neither option.
        weight_format=options.get("weight_format", "auto"),
        quantised_parts=options.get("quantised_parts", "linears"),
    )


def trained_on(adapter: Path) -> TrainedOn | None:
    """The base that an adapter's folder says it was trained on; None where it says nothing, as one
    that was made elsewhere.

    Raises:
        ValueError: what it says is damaged.
    """
    # Of an adapter in two parts both say the same.
    for folder in (parts_of(adapter) or [adapter])[:1]:
        for file in find_weight_files(folder)[0]:
            if file.suffix == ".safetensors":
                metadata = read_header(file)[0].get("__metadata__") or {}
                if KEY in metadata:
                    return _parsed(metadata[KEY], file)
    return _of_state(adapter)


def _parsed(text: Any, file: Path) -> TrainedOn:
    try:
        found = TrainedOn(**parse_json(str(text)))
        values = (found.weight_format, found.quantised_parts)
        optional = (found.digest, found.quantised)
        are_texts = all(isinstance(value, str) for value in values)
        if are_texts and all(isinstance(value, str | None) for value in optional):
            return found
    except (TypeError, ValueError):
        # Said below, as is a value of another type.
        pass
    raise ValueError(f"{file}: {KEY} in its metadata is damaged: {shorten(text)}")


def _of_state(adapter: Path) -> TrainedOn | None:
    """What the training state says, of a checkpoint that an earlier version saved."""
    # The moving average lies in its checkpoint.
    folder = adapter.parent if adapter.name == AVERAGED else adapter
    path = folder / STATE_JSON
    if not path.is_file():
        return None
    state = read_json_object(path, exact_numbers=False)
    identity = state.get("identity")
    options = (state.get("config") or {}).get("model")
    # An import has trained nothing; still earlier versions kept no digests.
    if not isinstance(identity, dict) or not isinstance(options, dict):
        return None
    try:
        return base_of_run(identity["config"], identity["weights"], options)
    except (KeyError, TypeError):
        raise ValueError(f"{path} is damaged: its identity names no base") from None


def metadata_of(known: TrainedOn | None) -> dict[str, str]:
    """What the header of an adapter's weights says of its base; nothing where it is not known."""
    return {} if known is None else known.metadata()


def model_options(known: TrainedOn | None) -> dict[str, Any]:
    """Options of ``ModelConfig`` with which a folder has the values that were trained on."""
    if known is None or not known.is_rounded:
        return {}
    return {"weight_format": known.weight_format, "quantised_parts": known.quantised_parts}


def model_config(adapter: Path | None, base: Path, dtype: Any) -> ModelConfig:
    """The ``model`` section that computes with the values that the adapter was trained on.

    Raises:
        ValueError: they cannot be made of ``base``, which is quantised otherwise.
    """
    known = None if adapter is None else trained_on(adapter)
    scheme = scheme_of(read_hf_config(base), str(base))
    if known is not None and known.is_rounded and scheme is not None and scheme.form != "nf4":
        raise ValueError(
            f"{adapter} was trained on a base that was {known.words()}, and {base} is stored as"
            f" {scheme.title}: give the base that was trained on"
        )
    return ModelConfig(path=str(base), dtype=dtype, **model_options(known))


def notes_on_base(adapter: Path, base: Path, *, computed: str | None = None) -> list[str]:
    """Lines about how the weights in the folder ``base`` differ from those that were trained on.

    Args:
        computed: the ``weight_format`` that plain weights are computed with: by a server, which
            quantises nothing, plain. None: that which was trained with.
    Raises:
        ValueError: what the adapter says of its base is damaged, or a weight file is.
    """
    known = trained_on(adapter)
    if known is None:
        return []
    notes: list[str] = []
    # A server may have the weights elsewhere.
    are_here = all((base / name).is_file() for name in weight_shards(base))
    scheme = scheme_of(read_hf_config(base), str(base))
    now = "plain" if scheme is None else scheme.title
    # The same codes are other values in another form.
    is_other = now != known.stored
    if known.digest and are_here:
        is_other = is_other or weights_digest(base, Digests()) != known.digest
    if is_other:
        notes.append(
            f"note: {adapter} was not trained on the weights of {base} (stored {now}; then"
            f" {known.stored}): another model, or the same one stored otherwise"
        )
    quantises = computed in QUANTISING
    if computed not in (None, known.weight_format) and (known.is_rounded or quantises):
        how = f"with model.weight_format={computed}" if quantises else "with as it is stored"
        notes.append(
            f"note: {adapter} was trained on a base that was {known.words()}, and {base} is"
            f" computed {how}: the values differ by the error of quantising them"
        )
    return notes
