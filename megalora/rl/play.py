"""Open what plays and judges episodes, as the ``rl`` section says."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from megalora.config import RunConfig
from megalora.data.template import ChatTemplate
from megalora.data.tokenizer import load_tokenizer
from megalora.hf.folder import local_folder
from megalora.rl.batches import PlayWith
from megalora.rl.environment import Environment
from megalora.rl.rewards.failures import Failures
from megalora.rl.rewards.judge import Rewards


@asynccontextmanager
async def playing(config: RunConfig) -> AsyncIterator[PlayWith]:
    """Yields what plays one completion of a prompt; rewards have their processes meanwhile."""
    rl = config.rl
    template = ChatTemplate(load_tokenizer(local_folder(config.model.path)))
    rewards = Rewards(
        rl.weights, workers=rl.reward_workers, timeout_s=rl.reward_timeout,
        failures=Failures(rl.reward_failure),
    )  # fmt: skip
    environment = Environment(
        rl.environment, rewards, template, max_length=config.data.max_length,
        timeout_s=rl.reward_timeout,
    )  # fmt: skip
    async with rewards:
        yield environment.play
