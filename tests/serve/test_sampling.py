"""Sample from vLLM as ``megalora rl`` does: what comes back is what vLLM itself says of it, and a
server that has forgotten everything answers again."""

import asyncio
from pathlib import Path

import pytest

from megalora.generate.options import stop_tokens
from megalora.rl.episode import Sampled
from megalora.rl.servers import Servers
from megalora.serve.live.publisher import Publisher
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.serve.adapters import tokens_of
from tests.serve.conftest import TOKEN
from tests.serve.test_live import trained

pytestmark = pytest.mark.vllm
LENGTH = 48
PROMPTS = [tokens_of(seed, 6) for seed in range(12)]


def test_completions_are_whole_and_of_the_version_that_was_asked(
    server: Server, client: Client, tiny: Path, tmp_path: Path
) -> None:
    # One token in twenty ends a completion, and so does what ends the base's.
    stop = {*range(24), *stop_tokens(tiny)}
    versions = [trained(tmp_path / str(seed), tiny, 80 + seed) for seed in range(2)]
    with Publisher([server.url], "rl", token=TOKEN) as publisher:
        servers = Servers([server.url], publisher, max_new_tokens=LENGTH, stop=stop, concurrency=8)
        publisher.in_use = servers.in_use

        async def rounds() -> list[list[Sampled]]:
            found = []
            for number, version in enumerate(versions):
                # Another thread's work, as in a run.
                await asyncio.to_thread(publisher.publish, number, version.tensors, version.config)
                servers.use(number)
                found.append(await asyncio.gather(*map(servers.sample, PROMPTS)))
            # All of the server's adapters are gone.
            await asyncio.to_thread(client.unload, "rl")
            found.append(await asyncio.gather(*map(servers.sample, PROMPTS)))
            await servers.close()
            return found

        for number, samples in zip((0, 1, 1), asyncio.run(rounds()), strict=True):
            ended = 0
            for prompt, one in zip(PROMPTS, samples, strict=True):
                assert one.versions == [number] * len(one.tokens)
                # The token that ended it is there, and none before it.
                assert one.ended == (one.tokens[-1] in stop)
                assert not set(one.tokens[:-1]) & stop
                ended += one.ended
                said = client.prompt_logprobs(publisher.id_of(number), [*prompt, *one.tokens])
                # Of the same model in one pass.
                assert one.logprobs == pytest.approx(said[len(prompt) - 1 :], abs=1e-5)
            assert ended > len(PROMPTS) / 4
