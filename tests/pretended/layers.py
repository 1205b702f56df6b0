"""Count what each layer of a model keeps for backward, and the FLOPs of its matrix products.

    python -m tests.pretended.layers NAME ...

The model is the one that training builds, on the pretended GPU: tensors have no data, and autograd
saves what it would save on a GPU. NAME is a case of ``layer_cases.py``. Prints JSON: name of a case
-> place -> counts. Places are ``embedding``, the number of each layer, and ``head`` for all behind
the last layer.
"""

import sys
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from tests.lora.held import norms_of
from tests.pretended.device import install, pretended_gpu
from tests.pretended.flops import AsOnCuda, Work
from tests.pretended.layer_cases import MICRO_BATCH, Case, cases_of, config_of
from tests.pretended.recorder import Recorder, print_and_end
from tests.pretended.run import all_there
from tests.pretended.scenarios import Scenario

Counts = dict[str, dict[str, int]]
"""Place -> ``kept`` (bytes), ``forward`` and ``backward`` (FLOPs, the second with what is computed
again)."""


class Saved:
    """A tensor that a node keeps for backward; gone when the node is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def count(case: Case, recorder: Recorder) -> Counts:
    """Forward and backward of one microbatch on the first rank of the case's layout."""
    from megalora.parallel import parallel_groups
    from tests.pretended.steps import build, even_routing, world

    world_size, sizes = case.layout_sizes
    hf = config_of(case.family)
    scenario = Scenario(
        case.name, hf, sizes, world_size, dtype=case.dtype, recompute=case.recompute,
        tokens=case.sequence + 1, dropout=case.dropout_rate,
    )  # fmt: skip
    config = scenario.config()
    with (
        pretended_gpu(recorder),
        AsOnCuda(),
        world(scenario, recorder),
        even_routing(),
        parallel_groups(config.parallel) as groups,
    ):
        (chunk,) = build(config, hf, groups, case.adapted()).chunks
        chunk.train()
        return count_chunk(chunk, case.sequence, recorder)


def count_chunk(chunk: Any, sequence: int, recorder: Recorder) -> Counts:
    """The same for a whole model on one rank."""
    from megalora import host
    from megalora.data.batch import Batch
    from megalora.model.head import Wanted, project
    from megalora.objectives.sft import SFT
    from megalora.train.inputs import Part, to_device

    work = Work()
    recorder.on_launch = work.launched
    _say_where(chunk, work)
    # Parameters are in memory anyway; backward of a linear saves its weight all the same.
    own = {p.untyped_storage()._cdata for p in chunk.parameters()}
    own |= {norms.untyped_storage()._cdata for norms in norms_of(chunk)}
    # Weak keys: a node that dies within forward, as under recomputation, takes its entry along.
    saved: WeakKeyDictionary[Saved, str] = WeakKeyDictionary()

    def pack(tensor: Tensor) -> Saved:
        holder = Saved(tensor)
        # What recomputation saves during backward is freed layer by layer, and not kept.
        if not work.is_backward:
            saved[holder] = work.place
        return holder

    tokens = torch.zeros(MICRO_BATCH, sequence, dtype=torch.int64)
    row = Batch.of_equal(tokens, tokens, torch.ones(MICRO_BATCH, sequence))
    (batch,) = to_device([row], Part(first=True, last=True))
    assert batch.tokens is not None
    assert batch.labels is not None
    objective = SFT()
    wanted = Wanted(batch.labels, batch.positions, objective.want)
    # Every token is a target.
    columns = {"loss_mask": torch.ones(len(batch.labels), device=host.device())}
    divisors = {"tokens": torch.ones((), device=host.device())}
    # All inputs of a step came in one tensor, which is there for the whole step.
    own.add(batch.documents.bounds[0][0].untyped_storage()._cdata)
    with work, torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        outputs = chunk(
            batch.tokens[None], None, None, packed_seq_params=batch.documents,
            output_processor=project, output_processor_context=wanted,
        )  # fmt: skip
        loss = objective.loss(outputs, columns, divisors).sum
        kept = _bytes_by_place(saved, own)
        work.is_backward = True
        # torch's own backward takes off the mode that answers for the device.
        Variable._execution_engine.run_backward(  # pyright: ignore
            (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True,
            accumulate_grad=True,
        )  # fmt: skip
    recorder.on_launch = None
    found = {}
    for place in ("embedding", *map(str, range(len(chunk.decoder.layers))), "head"):
        # (place, whether in backward) -> FLOPs
        found[place] = {
            "kept": kept[place],
            "forward": work.flops[place, False],
            "backward": work.flops[place, True],
        }
    return found


def _say_where(chunk: Any, work: Work) -> None:
    """Have every layer tell ``work`` when its forward begins and ends and its backward begins."""

    def enter(place: str) -> None:
        work.place = place

    for number, layer in enumerate(chunk.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, place=str(number): enter(place))

        def leave(module: Any, args: Any, output: Any, place: str = str(number)) -> None:
            # Megatron's layers return (hidden states, context); wrapped ones the first alone.
            hidden = output[0] if isinstance(output, tuple) else output
            # The gradient of a layer's output arrives when its backward is about to begin.
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: enter(place))
            # Recomputation in backward runs forward again, and stays under the layer's own name.
            if not work.is_backward:
                is_last = place == str(len(chunk.decoder.layers) - 1)
                enter("head" if is_last else "between layers")

        layer.register_forward_hook(leave)


def _bytes_by_place(saved: WeakKeyDictionary[Saved, str], own: set[int]) -> Counter[str]:
    """Bytes of distinct storages, each under the first place that saved it; parameters left out."""
    found: dict[int, tuple[str, int]] = {}
    for holder, place in saved.items():  # in the order in which they were saved
        storage = holder.tensor.untyped_storage()
        if storage._cdata not in own:
            found.setdefault(storage._cdata, (place, storage.nbytes()))
    total: Counter[str] = Counter()
    for place, num_bytes in found.values():
        total[place] += num_bytes
    return total


def main(names: list[str]) -> None:
    recorder = Recorder()
    install(recorder)  # before anything of Megatron is imported
    from megalora import host

    host.install()
    recorder.answers["check_coverage"] = all_there
    # A name begins with its family; only those asked for are enumerated.
    cases: dict[str, Case] = {}
    for family in {name.split(",")[0] for name in names}:
        for case in cases_of(family):
            cases[case.name] = case
    found = {name: count(cases[name], recorder) for name in names}
    print_and_end(found)


if __name__ == "__main__":
    main(sys.argv[1:])
