"""Compute parts of a model as stock transformers does: its classes, its reading of the folder, on
this host.

The model is made on the meta device, so that it has no weights; what is needed is then filled in by
transformers' own loader with transformers' own conversion of names. Nothing here knows a name of a
checkpoint, and nothing goes through our bridge. The model's own forward runs one layer at a time,
so that masks and rotary tables are transformers' too.

The loader's steps are private to transformers (``core_model_loading``, names with an underscore):
they are used here because calling anything else would compare with our own reading of the folder.
``pyproject.toml`` bounds the release. Quantised weights are the exception: our decoders read them.

Weights are rounded to the dtype of the run first and computed with in float32. Of embedding and
head only some rows are read, of routed experts only some experts.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig, _get_resolved_checkpoint_files

from megalora.hf.tensor_names import parse_expert
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.progress_bar import no_progress_bar
from megalora.verify.decoded import quantised_weights
from megalora.verify.stock_model import plain_config


class Skipped(nn.Module):
    """A decoder layer that hands on its input, in place of one that is not compared now."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Choices(nn.Module):
    """Notes which experts the router chose, in place of the experts, which are not read yet."""

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self.index = index.detach()
        self.weights = weights.detach()
        return torch.zeros_like(hidden_states)


class Slices:
    """Some slices along the first dimension of a stored tensor, read when transformers asks for the
    tensor."""

    def __init__(self, stored: Any, rows: Sequence[int]) -> None:
        self.stored = stored
        self.rows = rows

    def __getitem__(self, _: Any) -> Tensor:
        # Whatever index the loader uses, it means the whole tensor.
        return torch.cat([self.stored[row : row + 1] for row in self.rows])

    def get_dtype(self) -> str:
        return self.stored.get_dtype()

    def get_shape(self) -> list[int]:
        return [len(self.rows), *self.stored.get_shape()[1:]]


def _without_weights(folder: Path, dtype: torch.dtype) -> Any:
    """Make the model that transformers makes from a folder's ``config.json``, on the meta
    device."""
    try:
        # The file's own dtype need not be one: "auto".
        config = plain_config(folder, dtype=dtype)
        with torch.device("meta"):
            # eager: each family's own definition of attention and experts, which the other
            # implementations follow.
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
            ).eval()
    except Exception as error:  # a file of others: what transformers trips over can be anything
        raise ValueError(
            f"train.check_base: transformers makes no model from {folder}/config.json"
            f" ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Mend the file: where"
            " a field is null, remove it. train.check_base=off trains all the same"
        ) from error


class Reference:
    """A transformers model without weights, and the stored tensors that would fill each of its
    parameters."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        compute: torch.dtype = torch.float32,
        nf4: Rounded = UNROUNDED,
    ) -> None:
        """Weights are rounded to ``dtype``, then computed with in ``compute``. ``nf4``: names of
        plain matrices that are quantised first."""
        self.nf4 = nf4
        self.folder = folder
        self.dtype = dtype
        self.compute = compute
        self.model: Any = _without_weights(folder, dtype)
        self.model.requires_grad_(False)
        self.config: Any = self.model.config
        self.base: Any = self.model.base_model
        self.layers: list[nn.Module] = list(self.base.layers)
        # Made anew on the host: its buffers are computed, not stored, and are on the meta device.
        self.base.rotary_emb = type(self.base.rotary_emb)(config=self.config)
        self._index()

    def _index(self) -> None:
        """Find the stored tensors of every parameter, by the same steps as transformers' loader."""
        self.conversions: Any = get_model_conversion_mapping(self.model)
        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        expected = self.model.state_dict()
        prefix = self.model.base_model_prefix
        files, _ = _get_resolved_checkpoint_files(
            str(self.folder),
            None,
            None,
            True,
            None,
            False,
            download_kwargs={"local_files_only": True},
        )
        self.stored: dict[str, dict[str, Any]] = {}
        decoded = quantised_weights(self.folder, self.nf4)
        for file in files or []:
            handle: Any = safe_open(file, framework="pt")
            for stored_name in handle.keys():  # noqa: SIM118 - not a dict
                # Tensors of quantised weights come below, one for each weight.
                if stored_name in decoded.parts:
                    continue
                # transformers takes model.language_model. for other families only; every other name
                # stays as it is.
                key = stored_name.replace("model.language_model.", "model.", 1)
                name, _ = rename_source_key(key, renamings, converters, prefix, expected)
                if name not in expected and key in expected:
                    name, _ = rename_source_key(key, [], [], prefix, expected)
                self.stored.setdefault(name, {})[key] = handle.get_slice(stored_name)
        for key, weight in decoded.weights.items():
            name, _ = rename_source_key(key, renamings, converters, prefix, expected)
            self.stored.setdefault(name, {})[key] = weight

    def name_of(self, wanted: nn.Module) -> str:
        """A module's name in the whole model, which is what stored names begin with."""
        return next(name for name, module in self.model.named_modules() if module is wanted)

    def load(self, module: nn.Module, pick: Callable[[str, Any], Any] | None = None) -> set[str]:
        """Fill a module's parameters through transformers' loader.

        Args:
            pick: maps a stored name and tensor to what is read of it, or to None where it is not
                read.

        Returns: names that stay without a value.
        """
        prefix = self.name_of(module) + "."
        state = {}
        for name, parts in self.stored.items():
            if not name.startswith(prefix):
                continue
            for key, stored in parts.items():
                value = stored if pick is None else pick(key, stored)
                if value is not None:
                    state[key] = value
        options = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self.conversions,
        )
        with no_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, options, tp_plan=None)
        problems = [*info.mismatched_keys, *info.conversion_errors.values(), *info.error_msgs]
        if problems:
            raise ValueError(
                f"transformers cannot read {prefix[:-1]} of {self.folder}: {problems[0]}"
            )
        # Weights are rounded to the run's dtype by now; widening them changes no value.
        module.to(self.compute)
        return {name for name in info.missing_keys if name.startswith(prefix)}

    def load_ends(self, rows: Sequence[int]) -> None:
        """Embedding and head for some rows of the vocabulary, tied as transformers ties them, and
        the final norm."""
        missing: set[str] = set()
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        for module in ends:
            # A table of these rows alone, [rows, H].
            hidden = module.weight.shape[1]
            table = torch.empty(len(rows), hidden, dtype=self.dtype, device="meta")
            module.weight = nn.Parameter(table, requires_grad=False)
            module.padding_idx = None  # it is a row of the whole table
            missing |= self.load(module, lambda key, stored: Slices(stored, rows))
        # A tied head has no tensor of its own: it is missing until it is tied.
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for module in ends:
            module.to(self.compute)
        self._require(missing | self.load(self.base.norm))

    def load_layer(self, number: int) -> None:
        """All of a layer but its routed experts, for which a ``Choices`` stands in."""
        layer = self.layers[number]
        if path := self.experts_path(number):
            self.experts: Any = layer.get_submodule(path)
            self._put_experts(number, Choices())
        self._require(self.load(layer))

    def load_experts(self, number: int, chosen: Sequence[int]) -> None:
        """Some of a layer's routed experts; the router's numbers are translated to their places."""
        experts = self.experts
        count = len(chosen)
        self._put_experts(number, experts)
        total: int = experts.num_experts
        for name, parameter in list(experts.named_parameters(recurse=False)):
            empty = torch.empty(count, *parameter.shape[1:], dtype=parameter.dtype, device="meta")
            setattr(experts, name, nn.Parameter(empty, requires_grad=False))
        experts.num_experts = count
        wanted = set(chosen)

        # Some files have a tensor for each expert, some one for all experts of a layer.

        def pick(key: str, stored: Any) -> Any:
            of = parse_expert(key.removesuffix(".weight"))
            if of is not None:
                return stored if of.number in wanted else None
            return Slices(stored, chosen)

        self._require(self.load(experts, pick))
        # Expert of the model -> its place among the chosen ones; -1 fails as an index for others.
        place = torch.full((total,), -1)
        place[torch.tensor(list(chosen))] = torch.arange(count)
        experts.register_forward_pre_hook(lambda module, args: (args[0], place[args[1]], *args[2:]))

    def drop_layer(self, number: int) -> None:
        """Free a layer's weights."""
        self.layers[number] = Skipped()

    def experts_path(self, number: int) -> str | None:
        """Name within its layer of the module that holds the routed experts; None in a dense
        layer."""
        for name, _ in self.layers[number].named_modules():
            if name.rpartition(".")[2] == "experts":
                return name
        return None

    def _put_experts(self, number: int, module: nn.Module) -> None:
        """Put a module where the layer's routed experts are."""
        owner, _, leaf = str(self.experts_path(number)).rpartition(".")
        setattr(self.layers[number].get_submodule(owner), leaf, module)

    def _require(self, missing: Iterable[str]) -> None:
        """Raise ``ValueError`` for parameters that no stored tensor fills."""
        if missing := sorted(missing):
            raise ValueError(
                f"{self.folder} has no tensor for {missing[0]} ({len(missing)} missing)"
            )

    @contextlib.contextmanager
    def only(self, number: int | None) -> Iterator[None]:
        """The model with one layer, or none; the others hand on what they get, so that the layer
        keeps its place."""
        for i in range(len(self.layers)):
            self.base.layers[i] = self.layers[i] if i == number else Skipped()
        try:
            yield
        finally:
            for i, layer in enumerate(self.layers):
                self.base.layers[i] = layer

    def run_ends(self, tokens_T: Tensor, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer gets for tokens, and the logits for hidden states that leave the
        last layer.

        By the model's own forward, with all that it does between tables and layers, such as a
        factor or a cap on logits.
        """
        seen: list[Tensor] = []
        with self.only(None):
            self.base.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
            self.base(input_ids=tokens_T[None], use_cache=False)
            output = self.model(inputs_embeds=x_TH[None], use_cache=False, return_dict=True)
        return seen[0], output.logits[0]

    def run(
        self, number: int, x_TH: Tensor, positions_T: Tensor, tables: tuple[Tensor, Tensor]
    ) -> None:
        """Run the model on hidden states with one layer, with the given rotary tables; hooks see
        what happens inside."""
        hook = self.base.rotary_emb.register_forward_hook(lambda *_: tables)
        # Without a mask, transformers takes jumps of the positions for new documents.
        ones = torch.ones(1, len(x_TH), dtype=torch.long)
        try:
            with self.only(number):
                self.base(
                    inputs_embeds=x_TH[None],
                    position_ids=positions_T[None],
                    attention_mask=ones,
                    use_cache=False,
                )
        finally:
            hook.remove()
