"""Sample from vLLM servers, which get each version of the adapter from this training's memory.

The first rank alone speaks to them. The others meet it in a collective every few seconds, so that
no time limit of a collective counts how long sampling takes.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalora.adapters.write.form import adapter_contents
from megalora.config import RunConfig
from megalora.data.probe_text import probe_tokens
from megalora.data.tokenizer import load_tokenizer
from megalora.first_rank import on_first_rank
from megalora.generate.options import stop_tokens
from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config, stored_dtype
from megalora.lora.adapted_model import AdaptedModel
from megalora.lora.gather import gather_tensors
from megalora.rl.engine import meet_until, result_of
from megalora.rl.episode import Sampled
from megalora.rl.reported_routes import ReportedRoutes
from megalora.rl.scaled_logprobs import check_scaled
from megalora.rl.servers import Servers
from megalora.serve.errors import ServerUnreachable
from megalora.serve.live.publisher import Publisher
from megalora.serve.live_sync import run_name
from megalora.thread_work import in_thread
from megalora.train.probe import Probe
from megalora.train.step import Stepper

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
"""Seconds before a version is brought once more to servers of which one did not answer."""
FOLDER = "published"
"""Folder in the run folder for adapters, where servers take them from folders."""


class Served:
    """The engine of ``rl.servers``."""

    def __init__(
        self,
        model: AdaptedModel,
        stepper: Stepper,
        config: RunConfig,
        say: Callable[[str], None],
        stop: Callable[[], bool],
        dtype: str | None = None,
    ) -> None:
        """
        Args:
            say: called with lines for the user.
            stop: says whether the run was told to stop; collective.
            dtype: that the servers compute in; None for the base's, as ``megalora serve`` starts
                them.
        """
        folder = local_folder(config.model.path)
        self.model = model
        self.stepper = stepper
        self.config = config
        self.say = say
        self.stop = stop
        self.dtype = dtype
        tokens = probe_tokens(load_tokenizer(folder))
        self.probe = Probe(tokens, config.model.dtype, config.parallel)
        self.version: int | None = None
        self.publisher: Publisher | None = None
        """On the first rank."""
        self.servers: Servers | None = None
        """Likewise."""
        # An address that cannot be had ends every rank.
        on_first_rank(lambda: self._connect(folder), "nothing can be published")

    def _connect(self, folder: Path) -> None:
        rl = self.config.rl
        run = Path(self.config.checkpoint.dir)
        hf = read_hf_config(folder)
        policy = self.config.objective.learned_policy
        at_temperature = policy is not None and policy.temperature != 1
        replays = rl.replays(bool(self.model.shape.moe_layers))
        self.publisher = Publisher(
            rl.servers,
            self.config.checkpoint.serve_name or run_name(run),
            transport=rl.sync,
            folder=run / FOLDER if rl.sync in ("auto", "folder") else None,
            # What requests may have begun with, and what is published for the next ones.
            keep=rl.staleness + 2,
            served_dtype=self.dtype or str(stored_dtype(hf)),
            # A server that was started again may have been started otherwise.
            examine=partial(check_scaled, tokens=self.probe.tokens) if at_temperature else None,
        )
        self.servers = Servers(
            rl.servers, self.publisher, max_new_tokens=rl.max_new_tokens,
            stop=stop_tokens(folder), concurrency=rl.concurrency,
            patience_s=60 * rl.server_patience,
            reported=ReportedRoutes(self.model.shape) if replays else None,
        )  # fmt: skip
        # A version is not dropped under a request that was slower than all others.
        self.publisher.in_use = self.servers.in_use

    def publish(self, version: int) -> None:
        """As the protocol says; returns when every server has proved that it has the version."""
        # An evaluation and the round behind it are of the same version.
        if version == self.version:
            return
        model = self.model
        trained = gather_tensors(model.shards, model.values(), model.groups)
        probed = self.probe.run(self.stepper)
        done: Future[str] | None = None
        if dist.get_rank() == 0:
            assert trained is not None, "the first rank has the whole tensors"
            tensors, config, _ = adapter_contents(
                model.adapted, model.shape, trained, self.config.model.path
            )
            done = in_thread(lambda: self._bring(version, tensors, config, probed), "servers")
        result_of(self, done, f"version {version} could not be published")
        self.version = version
        if self.servers is not None:
            self.servers.use(version)

    def _bring(
        self, version: int, tensors: dict[str, Any], config: dict[str, Any], probed: dict[str, Any]
    ) -> str:
        """Publish, and again while a server does not answer: one that was started anew gets what it
        lacks, and proves it, before anything is sampled from it."""
        assert self.publisher is not None, "the first rank has it"
        began = time.monotonic()
        wait_s = FIRST_WAIT_S
        while True:
            try:
                return self.publisher.publish(version, tensors, config, probed)
            except ServerUnreachable as error:
                if time.monotonic() - began > 60 * self.config.rl.server_patience:
                    raise
                # One line, not one for every try.
                if wait_s == FIRST_WAIT_S:
                    self.say(f"rl: version {version} waits: {error}")
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    async def sample(self, tokens: Sequence[int], stream: int, temperature: float) -> Sampled:
        """As the protocol says; vLLM has no streams of draws."""
        assert self.servers is not None, "episodes are played on the first rank"
        return await self.servers.sample(tokens, stream, temperature)

    def work_until(self, done: "Future[Any] | None") -> None:
        """As the protocol says: there is nothing to do but to wait."""
        meet_until(done, self.stop)

    def close(self) -> None:
        """Stop listening; servers keep what they have."""
        if self.publisher is not None:
            self.publisher.close()
