"""Experts that vLLM reports: read as it writes them, refused where they are of something else."""

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from megalora.config import RLConfig
from megalora.rl.episode import Sampled
from megalora.rl.reported_routes import ReportedRoutes
from megalora.rl.servers import Servers
from megalora.serve.errors import ServerError
from tests.lora.shapes import MIXED_SHAPE
from tests.rl.test_servers import ANSWERS, IDS, TOKENS, Kept
from tests.serve.fake_vllm import FakeVLLM, fake_vllm, logprob_of

PROMPT = [1, 2, 3]
NUM_READ = len(PROMPT) + TOKENS - 1
LAYERS = sorted(MIXED_SHAPE.moe_layers)


def encoded(routes: Any) -> str:
    """As ``vllm.utils.serial_utils.numpy2base64``."""
    with io.BytesIO() as buffer:
        np.save(buffer, routes, allow_pickle=False)
        return base64.b64encode(buffer.getbuffer()).decode("ascii")


def chosen() -> np.ndarray:
    """[tokens read, all layers, k] uint8: zeros for the layer without experts, as vLLM has them."""
    generator = np.random.default_rng(0)
    routes = np.zeros((NUM_READ, MIXED_SHAPE.num_layers, MIXED_SHAPE.top_k), np.uint8)
    for token in range(NUM_READ):
        for layer in LAYERS:
            order = generator.permutation(MIXED_SHAPE.num_experts)
            routes[token, layer] = order[: MIXED_SHAPE.top_k]
    return routes


@pytest.fixture
def fake() -> Iterator[FakeVLLM]:
    with fake_vllm() as server:
        server.adapters = {IDS[1]: ("", ANSWERS[1])}
        server.prompt_tokens = len(PROMPT)
        yield server


def asked(fake: FakeVLLM, reported: ReportedRoutes | None) -> Sampled:
    async def ask() -> Sampled:
        kept = Kept([fake])
        servers = Servers([fake.url], kept, max_new_tokens=TOKENS, reported=reported)
        servers.use(1)
        try:
            return await servers.sample(PROMPT)
        finally:
            await servers.close()

    return asyncio.run(ask())


def test_routes_come_with_a_completion(fake: FakeVLLM) -> None:
    fake.routed_experts = encoded(chosen())
    found = asked(fake, ReportedRoutes(MIXED_SHAPE))
    assert found.tokens == ANSWERS[1] and found.versions == [1] * TOKENS
    assert len(found.logprobs) == TOKENS
    assert found.routes is not None and found.routes.dtype == np.int16
    # Of layers with experts alone.
    assert (found.routes == chosen()[:, LAYERS]).all()
    # Whole: vLLM's streamed answers have none.
    assert "stream" not in fake.asked[-1]


def test_nothing_is_asked_where_nothing_is_replayed(fake: FakeVLLM) -> None:
    fake.routed_experts = encoded(chosen())
    found = asked(fake, None)
    assert found.routes is None and fake.asked[-1]["stream"]
    assert found.logprobs == [logprob_of(token) for token in ANSWERS[1]]


def twice() -> np.ndarray:
    routes = chosen()
    routes[1, 2, 1] = routes[1, 2, 0]
    return routes


@pytest.mark.parametrize(
    ("reported", "said"),
    [
        (None, "does not say which experts were chosen. Start vLLM with --enable-return-routed"),
        ("###", "routed_experts cannot be read"),
        (encoded(chosen()[1:]), r"are uint8 \[4, 4, 3\], wanted are integers \[5, 4, 3\]"),
        (encoded(chosen()[:, LAYERS]), r"are uint8 \[5, 3, 3\], wanted"),
        (encoded(chosen().astype(np.float32)), "are float32"),
        (encoded(chosen() + 3), "are not 3 different ones of 5 for each token"),
        (encoded(twice()), "are not 3 different ones of 5 for each token"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    fake: FakeVLLM, reported: str | None, said: str
) -> None:
    fake.routed_experts = reported
    with pytest.raises(ServerError, match=said):
        asked(fake, ReportedRoutes(MIXED_SHAPE))


@pytest.mark.parametrize(
    ("options", "replays"),
    [
        ({}, True),
        ({"replay_routes": "off"}, False),
        # Servers are asked where the user has started them so.
        ({"servers": ["http://a"]}, False),
        ({"servers": ["http://a"], "replay_routes": "on"}, True),
    ],
)
def test_what_is_replayed(options: dict[str, Any], replays: bool) -> None:
    assert RLConfig(rewards="exact", **options).replays(has_experts=True) is replays
