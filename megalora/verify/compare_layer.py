"""Run transformers' parts and ours on the same inputs and compare, on the first rank's host.

``layer.py`` calls the steps in order and brings the weights; nothing here is collective.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megalora_kernels.backend import ENV_BACKEND
from torch import Tensor, nn

from megalora.model.families import FAMILIES
from megalora.model.host_layer import host_layer, host_norm
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.verify import records as r
from megalora.verify.host_memory import free_host_memory_bytes
from megalora.verify.reference import Choices, Reference

OPTION = "train.check_base"
_SUFFIX = ("", " (second input)")
"""Added to a module's name in the records of each of the two runs."""


@dataclass
class _Routing:
    """The choice of the reference's router in one run."""

    probs_TE: Tensor
    map_TE: Tensor
    decided_T: Tensor
    """Tokens whose choice does not depend on rounding."""


@dataclass
class LayerComparison:
    """The first rank's work between collectives; ``open`` comes first. The other ranks make one and
    never call it."""

    folder: Path
    dtype: torch.dtype
    config: Any
    alone: dist.ProcessGroup | None
    nf4: Rounded = UNROUNDED
    largest: float = 0.0
    routing: list[_Routing] = field(default_factory=list)

    def open(self) -> dict[int, str]:
        """Make the reference; return the last layer of each kind with the kind's name."""
        self.reference = Reference(self.folder, self.dtype, nf4=self.nf4)
        self.compared = FAMILIES[self.reference.config.model_type].compared
        # Each layer overwrites the one before it of its kind.
        last_of_kind: dict[Any, int] = {}
        for number in range(len(self.reference.layers)):
            last_of_kind[self._kind(number)] = number
        self.labels = {number: self._label(number) for number in sorted(last_of_kind.values())}
        return self.labels

    def _kind(self, number: int) -> Any:
        """Everything that makes one layer's function another's: modules, their settings, their
        parameters' shapes."""
        layer = self.reference.layers[number]
        settings = []
        for path, module in layer.named_modules():
            for name, value in sorted(vars(module).items()):
                if _is_setting(name, value):
                    settings.append((path, type(module).__name__, name, value))
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        return tuple(settings), shapes, self._attention(number)

    def _attention(self, number: int) -> str | None:
        """Kind of a layer's attention, such as ``sliding_attention``; None where all are alike."""
        types = getattr(self.reference.config, "layer_types", None)
        return types[number] if types else None

    def _label(self, number: int) -> str:
        """What a user calls the layer's kind."""
        types = set(getattr(self.reference.config, "layer_types", None) or ())
        kind = "MoE" if self.reference.experts_path(number) else "dense"
        return kind if len(types) < 2 else f"{kind}, {self._attention(number)}"

    def sizes(self) -> tuple[int, int, int]:
        """Vocabulary, hidden size and number of positions."""
        config = self.reference.config
        # Without a limit in the config, positions of an ordinary text.
        positions = getattr(config, "max_position_embeddings", None) or 2048
        return config.vocab_size, config.hidden_size, positions

    def compare_ends(
        self,
        inputs: r.Inputs,
        embedding: Any,
        head: Any,
        norm: dict[str, Any],
        floats: dict[str, dict[str, float]],
    ) -> None:
        """Embedding rows; final norm and head on the layer's input, for some rows of the
        vocabulary; without the head where it is None."""
        # The reference's tables hold these rows alone: ids become places among them.
        rows = sorted({*inputs.tokens, *inputs.rows})
        self.reference.load_ends(rows)
        place = torch.tensor([rows.index(token) for token in inputs.tokens])
        hidden = self.reference.base.norm(inputs.x_TH)
        embedded, logits_TV = self.reference.run_ends(place, inputs.x_TH)
        logits = logits_TV[:, [rows.index(row) for row in inputs.rows]]
        theirs = [("embedding", embedded), ("final norm", hidden), ("head", logits)]
        ours = [("embedding", embedding.float())]
        normed = host_norm(self.config, norm, floats)(inputs.x_TH)
        ours.append(("final norm", normed))
        if head is not None:
            ours.append(("head", F.linear(normed, head.float())))
        self._compare(None, ours, theirs[: len(ours)])

    def route(self, number: int, inputs: r.Inputs, angles: Any) -> list[int]:
        """Compare rotary tables, run the reference up to its router, and return the experts that
        are needed."""
        reference = self.reference
        reference.load_layer(number)
        self.angles = angles
        angles_TD = angles.flatten(1)
        cos_1TD, sin_1TD = reference.base.rotary_emb(inputs.x_TH[None], inputs.positions_T[None])
        multiple = r.rotary_difference(angles_TD, cos_1TD[0], sin_1TD[0])
        if not multiple <= 1:  # so that NaN does not pass
            how = f"{multiple:.1e} times what rounding explains"
            raise ValueError(self._message(number, "rotary embedding", how))
        # Both sides compute with our angles: within rounding they are the same, but at position
        # 131072 that rounding would be all that the comparison behind sees. The tables keep the
        # reference's scale, such as yarn's, which is compared in attention's output.
        scale = torch.hypot(cos_1TD, sin_1TD)
        self.tables = (angles_TD.cos() * scale, angles_TD.sin() * scale)
        layer = reference.layers[number]
        seen: r.Records = []
        with r.noted(layer, r.THEIRS, self.compared, seen):
            reference.run(number, inputs.x_TH, inputs.positions_T, self.tables)
        h_TH = dict(seen)["post-attention norm"]
        self.driven_TH = r.driven(h_TH)
        self.routing = []
        if not reference.experts_path(number):
            return []
        # Experts of either run: the layer's own input, and the one that drives the gates.
        for h in (h_TH, self.driven_TH):
            self.routing.append(self._routing(layer, number, h))
        first, second = self.routing
        needed = first.map_TE.any(0) | second.map_TE.any(0)
        self.needed = needed.nonzero().flatten().tolist()
        self._check_memory(number)
        return self.needed

    def _check_memory(self, number: int) -> None:
        """Refuse experts that do not fit this host: running out of memory would end the process
        without a word."""
        each = sum(parameter[0].numel() for parameter in self.reference.experts.parameters())
        # Both sides in float32, and what is gathered and what is read, in the dtype of the run.
        element_bytes = 2 * torch.float32.itemsize + 2 * self.dtype.itemsize
        needed = len(self.needed) * each * element_bytes
        free = free_host_memory_bytes()
        if needed > free:
            raise ValueError(
                f"{OPTION}: layer {number} ({self.labels[number]}) of {self.folder}: the"
                f" {len(self.needed)} experts that the check's tokens need take"
                f" {needed / 2**30:.1f} GiB of host memory on the first rank, which has"
                f" {free / 2**30:.1f} GiB free. Free some, or train without the check:"
                f" {OPTION}=off."
            )

    def _routing(self, layer: nn.Module, number: int, h_TH: Tensor) -> _Routing:
        """The router's choice, and which tokens keep it when their hidden states change by
        rounding."""
        choices = layer.get_submodule(str(self.reference.experts_path(number)))
        assert isinstance(choices, Choices)
        generator = torch.Generator().manual_seed(1)
        total = int(self.reference.experts.num_experts)

        def choose(h: Tensor) -> tuple[Tensor, Tensor]:
            layer.mlp(h[None])  # pyright: ignore[reportCallIssue]
            return r.dense_routing(choices.index, choices.weights, total)

        probs_TE, map_TE = choose(h_TH)
        # Four draws of noise as large as the tolerance: two experts that are nearly equally good
        # change places in one of them.
        decided_T = torch.ones(len(h_TH), dtype=torch.bool)
        size_T1 = r.TOLERANCE * h_TH.abs().amax(1, keepdim=True)
        for _ in range(4):
            noise = torch.randn(h_TH.shape, generator=generator) * size_T1
            _, map_with_noise_TE = choose(h_TH + noise)
            decided_T &= (map_with_noise_TE == map_TE).all(1)
        return _Routing(probs_TE, map_TE, decided_T)

    def compare_layer(
        self,
        number: int,
        inputs: r.Inputs,
        weights: dict[str, Tensor],
        floats: dict[str, dict[str, float]],
    ) -> None:
        """Run both layers on both inputs and compare what their modules put out, in the order of
        computing."""
        reference = self.reference
        theirs = []
        if self.routing:
            reference.load_experts(number, self.needed)
        layer = reference.layers[number]
        with r.noted(layer, r.THEIRS, self.compared, theirs):
            reference.run(number, inputs.x_TH, inputs.positions_T, self.tables)
        with r.noted(layer, r.THEIRS, self.compared, theirs, _SUFFIX[1]):
            layer.get_submodule(r.SECOND_NORM[r.THEIRS])(inputs.x_TH)
            layer.mlp(self.driven_TH[None])  # pyright: ignore[reportCallIssue]
        router = layer.mlp.gate if self.routing else None  # pyright: ignore
        # Before ours is built: the host need not hold both.
        reference.drop_layer(number)
        # The router's record was noted in ``route``; undecided tokens are zero on both sides.
        for run, routing in enumerate(self.routing):
            theirs.append((f"router{_SUFFIX[run]}", routing.probs_TE * routing.decided_T[:, None]))
        assert self.alone is not None
        layer = host_layer(self.config, number, self.alone, weights, floats)
        if router is not None:
            self._compare_router_dtype(number, layer.mlp.router, router)  # pyright: ignore
        ours = []
        try:
            with _no_chosen_backend():
                self._run_ours(layer, inputs, ours)
        finally:  # a mistake may also stop a module behind it: the mistake is reported
            self._compare(number, ours, theirs)

    def _compare_router_dtype(self, number: int, ours: Any, theirs: nn.Module) -> None:
        """Raise unless both routers compute their logits in one dtype when the model is in
        bfloat16: some families widen to float32, and the other kind chooses other experts. The
        comparison of values, in float32, cannot tell."""
        h_TH = self.driven_TH.to(torch.bfloat16)
        output = copy.deepcopy(theirs).to(torch.bfloat16)(h_TH)
        wanted = (output[0] if isinstance(output, tuple) else output).dtype
        found = ours.gating(h_TH).dtype
        if found != wanted:
            raise ValueError(
                self._message(number, "router", f"computing logits in {found}, not in {wanted},")
            )

    def _run_ours(self, layer: nn.Module, inputs: r.Inputs, ours: r.Records) -> None:
        """Both runs of our layer, whose tensors are ``[T, 1, H]`` where transformers' are
        ``[1, T, H]``."""
        with r.noted(layer, r.OURS, self.compared, ours), self._router_noted(layer, 0, ours):
            layer(inputs.x_TH[:, None], attention_mask=None, rotary_pos_emb=self.angles)
        with (
            r.noted(layer, r.OURS, self.compared, ours, _SUFFIX[1]),
            self._router_noted(layer, 1, ours),
        ):
            layer.get_submodule(r.SECOND_NORM[r.OURS])(inputs.x_TH)
            layer.mlp(self.driven_TH[:, None])  # pyright: ignore[reportCallIssue]

    @contextmanager
    def _router_noted(self, layer: nn.Module, run: int, records: r.Records) -> Iterator[None]:
        """Note our router's output, and hand the experts the reference's choice, in the numbers of
        those gathered.

        Where the choice differs by a mistake, the router's own record tells; where it differs
        because two experts are equally good within rounding, the experts are compared all the same.
        """
        if not self.routing:
            yield
            return
        theirs = self.routing[run]

        def hook(
            module: nn.Module, args: Any, output: tuple[Tensor, Tensor]
        ) -> tuple[Tensor, Tensor]:
            probs_TE, map_TE = output
            records.append((f"router{_SUFFIX[run]}", probs_TE * theirs.decided_T[:, None]))
            same_T1 = (map_TE == theirs.map_TE).all(1, keepdim=True)
            probs_TE = torch.where(same_T1, probs_TE, theirs.probs_TE)
            return probs_TE[:, self.needed], theirs.map_TE[:, self.needed]

        handle = layer.get_submodule("mlp.router").register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _compare(self, number: int | None, ours: r.Records, theirs: r.Records) -> None:
        """Raise ``ValueError`` for the first module that differs; keep the largest difference."""
        if difference := r.first_difference(ours, theirs):
            name, error = difference
            how = f"{error:.1e} of its largest value (allowed {r.TOLERANCE:.0e})"
            raise ValueError(self._message(number, name, how))
        self.largest = max(self.largest, r.largest_difference(ours, theirs))

    def _message(self, number: int | None, module: str, how: str) -> str:
        where = module if number is None else f"layer {number} ({self.labels[number]}), {module}"
        return (
            f"{OPTION}: {where}: differs from transformers' by {how} for the weights of"
            f" {self.folder}. megalora does not compute this model as it is meant; please report it"
            f" with the model's config.json. Nothing was trained; {OPTION}=off trains all the same."
        )


@contextmanager
def _no_chosen_backend() -> Iterator[None]:
    """Let the kernels' own rule choose: what the environment asks for may run on GPUs alone."""
    chosen = os.environ.pop(ENV_BACKEND, None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ[ENV_BACKEND] = chosen


def _is_setting(name: str, value: Any) -> bool:
    """Whether a module's attribute says what it computes; its own number does not."""
    return name != "layer_idx" and type(value) in (int, float, bool, str)
