"""Where the samples of ``megalora rl`` come from: prompts, and the completions that are sampled."""

from typing import Any

from megalora.config import RunConfig
from megalora.data.splits import Split
from megalora.parallel import Groups
from megalora.rl.batches import MakePlay, SampledBatches
from megalora.rl.prompts import Prompts, read_prompts
from megalora.train.loop import Feed


def sampling_feed(make_play: MakePlay) -> Feed:
    """A feed that samples from the model that is trained, or from servers.

    Args:
        make_play: see ``SampledBatches``.
    """
    found: list[Prompts] = []

    def read(config: RunConfig, tokenizer: Any) -> tuple[Split, Split | None]:
        found[:] = [read_prompts(config, tokenizer)]
        return found[0].train, found[0].eval

    def batches(
        config: RunConfig, groups: Groups, train: Split, eval: Split | None
    ) -> SampledBatches:
        # The two splits are those of the prompts.
        return SampledBatches(config, groups, found[0], make_play)

    return Feed(read, batches)
