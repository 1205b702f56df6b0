"""Give rollouts experts that their tokens went to, and have a run take them: routing replay on a
file of rollouts, as ``megalora rl`` has it on what it samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from megalora.config import RunConfig
from megalora.data.chat import Encoded
from megalora.data.splits import Split
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config
from megalora.lora.adapted_model import AdaptedModel
from megalora.model.fields import model_shape
from megalora.model.replay import Replay
from megalora.model.shape import ModelShape
from megalora.train.batches import Batches
from megalora.train.loop import Feed, read_files
from megalora.train.step import Stepper

ALONE = 5
"""One in so many rollouts comes without experts, and chooses by itself."""


def with_routes(split: Split, shape: ModelShape) -> Split:
    """The samples with experts that no router chose, the same for the same tokens."""
    samples: list[Encoded] = []
    for sample in split.samples:
        generator = np.random.default_rng(sample.input_ids)
        routes = None
        if generator.integers(ALONE):
            # The last token is read by nobody.
            size = (len(sample.input_ids) - 1, len(shape.moe_layers), shape.num_experts)
            order = generator.random(size).argsort(-1)
            routes = order[..., : shape.top_k].astype(np.int16)
        samples.append(replace(sample, routes=routes))
    return replace(split, samples=samples, route_shape=(len(shape.moe_layers), shape.top_k))


class ReplayedBatches(Batches):
    """Rows that say which experts their tokens go to."""

    @contextmanager
    def at_work(
        self,
        model: AdaptedModel,
        stepper: Stepper,
        step: int,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Iterator[None]:
        stepper.replay = Replay(stepper.chunks, sorted(model.shape.moe_layers))
        yield


def read_routed(config: RunConfig, tokenizer: Any) -> tuple[Split, Split | None]:
    """The samples of ``data`` with experts."""
    shape = model_shape(read_hf_config(local_folder(config.model.path)))
    train, eval = read_files(config, tokenizer)
    assert eval is not None, "a case of the grid holds samples out"
    return with_routes(train, shape), with_routes(eval, shape)


ROUTED = Feed(read_routed, ReplayedBatches)
