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
from megalora.verify import records as r
from megalora.verify.host_memory import free_host_memory_bytes
from megalora.verify.reference import Choices, Reference

OPTION = "train.check_base"
_SUFFIX = ("", " (second input)")
"""Added to a module's name in the records of each of the two runs."""


@dataclass
class _Routing:
    """What the reference's router chose in one run."""

    probs_TE: Tensor
    map_TE: Tensor
    decided_T: Tensor
    """Tokens whose choice does not hang on rounding."""


@dataclass
class LayerComparison:
    """The first rank's work between collectives; ``open`` comes first. The other ranks make one and
    never call it."""

    folder: Path
    dtype: torch.dtype
    config: Any
    alone: dist.ProcessGroup | None
    largest: float = 0.0
    routing: list[_Routing] = field(default_factory=list)

    def open(self) -> dict[int, str]:
        """Make the reference; return the last layer of each kind with the kind's name."""
        self.reference = Reference(self.folder, self.dtype)
        self.compared = FAMILIES[self.reference.config.model_type].compared
        kinds = {self._kind(number): number for number in range(len(self.reference.layers))}
        self.labels = {number: self._label(number) for number in sorted(kinds.values())}
        return self.labels

    def _kind(self, number: int) -> Any:
        """Everything that makes one layer's function another's: modules, their settings, their
        parameters' shapes."""
        layer = self.reference.layers[number]
        settings = tuple(
            (
                path,
                type(module).__name__,
                tuple(sorted((k, v) for k, v in vars(module).items() if _is_setting(k, v))),
            )
            for path, module in layer.named_modules()
        )
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        return settings, shapes, self._attention(number)

    def _attention(self, number: int) -> str | None:
        types = getattr(self.reference.config, "layer_types", None)
        return types[number] if types else None

    def _label(self, number: int) -> str:
        types = set(getattr(self.reference.config, "layer_types", None) or ())
        kind = "MoE" if self.reference.experts_path(number) else "dense"
        return kind if len(types) < 2 else f"{kind}, {self._attention(number)}"

    def sizes(self) -> tuple[int, int, int]:
        """Vocabulary, hidden size and number of positions."""
        config = self.reference.config
        return (
            config.vocab_size,
            config.hidden_size,
            getattr(config, "max_position_embeddings", None) or 2048,
        )

    def compare_ends(
        self,
        inputs: r.Inputs,
        embedding: Any,
        head: Any,
        norm: dict[str, Any],
        floats: dict[str, dict[str, float]],
    ) -> None:
        """Embedding rows; final norm and head on the layer's input, for some rows of the
        vocabulary."""
        rows = sorted({*inputs.tokens, *inputs.rows})
        self.reference.load_ends(rows)
        place = torch.tensor([rows.index(token) for token in inputs.tokens])
        hidden = self.reference.base.norm(inputs.x_TH)
        embedded, logits_TV = self.reference.run_ends(place, inputs.x_TH)
        logits = logits_TV[:, [rows.index(row) for row in inputs.rows]]
        theirs = [("embedding", embedded), ("final norm", hidden), ("head", logits)]
        ours = [("embedding", embedding.float())]
        normed = host_norm(self.config, norm, floats)(inputs.x_TH)
        ours += [("final norm", normed), ("head", F.linear(normed, head.float()))]
        self._compare(None, ours, theirs)

    def route(self, number: int, inputs: r.Inputs, angles: Any) -> list[int]:
        """Compare rotary tables, run the reference up to its router, and return the experts that
        are needed."""
        reference = self.reference
        reference.load_layer(number)
        self.angles = angles
        angles_TD = angles.flatten(1)
        cos, sin = (
            t[0] for t in reference.base.rotary_emb(inputs.x_TH[None], inputs.positions_T[None])
        )
        if not (multiple := r.rotary_difference(angles_TD, cos, sin)) <= 1:
            raise ValueError(
                self._message(
                    number, "rotary embedding", f"{multiple:.1e} times what rounding explains"
                )
            )
        # attention's own factor, such as yarn's: compared in its output
        scale = torch.hypot(cos, sin)
        self.tables = ((angles_TD.cos() * scale)[None], (angles_TD.sin() * scale)[None])
        layer = reference.layers[number]
        seen: r.Records = []
        with r.noted(layer, r.THEIRS, self.compared, seen):
            reference.run(number, inputs.x_TH, inputs.positions_T, self.tables)
        h_TH = dict(seen)["post-attention norm"]
        self.driven_TH = r.driven(h_TH)
        self.routing = []
        if not reference.experts_path(number):
            return []
        self.routing = [self._routing(layer, number, h) for h in (h_TH, self.driven_TH)]
        needed = torch.stack([routing.map_TE.any(0) for routing in self.routing]).any(0)
        self.needed = needed.nonzero().flatten().tolist()
        self._check_memory(number)
        return self.needed

    def _check_memory(self, number: int) -> None:
        """Refuse experts that do not fit this host: running out of memory would end the process
        without a word."""
        each = sum(parameter[0].numel() for parameter in self.reference.experts.parameters())
        # and what is gathered and read, in the dtype of the run
        both_sides = 2 * torch.float32.itemsize
        needed = len(self.needed) * each * (both_sides + 2 * self.dtype.itemsize)
        if needed > (free := free_host_memory_bytes()):
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
        decided_T = torch.ones(len(h_TH), dtype=torch.bool)
        for _ in range(4):
            noise = (
                torch.randn(h_TH.shape, generator=generator)
                * r.TOLERANCE
                * h_TH.abs().amax(1, keepdim=True)
            )
            decided_T &= (choose(h_TH + noise)[1] == map_TE).all(1)
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
        reference.drop_layer(number)
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
        if difference := r.first_difference(ours, theirs):
            name, error = difference
            raise ValueError(
                self._message(
                    number, name, f"{error:.1e} of its largest value (allowed {r.TOLERANCE:.0e})"
                )
            )
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
