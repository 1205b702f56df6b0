"""The rows of a run that samples its own completions: each round of rollouts is trained on for a
few steps, and then makes room for the next."""

import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from megalora.config import RunConfig
from megalora.first_rank import on_first_rank
from megalora.lora.adapted_model import AdaptedModel
from megalora.parallel import Groups
from megalora.rl.collect import Collector, Plan, Round
from megalora.rl.embedded import embedded_in
from megalora.rl.engine import Engine, result_of
from megalora.rl.episode import Ask, Episode, Prompt, Sampled
from megalora.rl.own_servers import own_servers
from megalora.rl.prompts import Prompts
from megalora.rl.rollouts import (
    FOLDER,
    REST,
    is_fresh,
    is_kept,
    numbers_of,
    prompts_done,
    samples_of,
    split_of,
    write_rest,
    write_round,
)
from megalora.rl.served import Served
from megalora.train.batches import Batches, Evaluated
from megalora.train.checkpoint.start import start_of
from megalora.train.signals import Stopped
from megalora.train.step import Stepper

GAP = 1e-5
"""``rl.largest_gap`` in float32. Between vLLM and transformers, both in float32, a mean of 5e-7 was
measured."""
_TURN_BITS = 16
"""Bits of a stream's number for the turns of an episode."""
_EVALUATION = 1 << 62
"""Added to the numbers of streams that evaluations draw from."""

PlayWith = Callable[[Prompt, int, Ask], Awaitable[Episode]]
"""Plays one completion of a prompt, which asks for what is sampled."""
MakePlay = Callable[[RunConfig], AbstractAsyncContextManager[PlayWith]]
"""Opens what judges and plays, on the event loop."""


class SampledBatches(Batches):
    """Rows of rollouts; ``train`` holds those of the current round, and the prompts before the
    first one."""

    def __init__(
        self, config: RunConfig, groups: Groups, prompts: Prompts, make_play: MakePlay
    ) -> None:
        """``make_play``: called on the first rank."""
        super().__init__(config, groups, prompts.train, prompts.eval)
        policy = config.objective.learned_policy
        assert policy is not None, "the objective is grpo"
        self.policy = policy
        self.prompts = prompts
        self.make_play = make_play
        self.engine: Engine | None = None
        self.collector: Collector | None = None
        """On the first rank."""
        self.play: PlayWith | None = None
        """Likewise."""
        self.by_step: list[np.ndarray] = []
        """Of each step of the round, places of its completions."""
        self.first_step = 0
        """Of the round."""
        self.numbers: dict[str, float] = {}
        """What the log says of the round."""
        self.is_fresh = False
        """Whether all completions of the round are of the adapter that it began with."""
        self.rounds_alike = 0
        """Rounds in a row that taught nothing."""

    def _indices(self, step: int) -> np.ndarray:
        return self.by_step[step - self.first_step]

    def may_stop(self, step: int) -> bool:
        """As in ``Batches``: rollouts that are trained on in part would be lost."""
        return step % self.config.rl.steps_per_rollout == 0

    @contextmanager
    def at_work(
        self,
        model: AdaptedModel,
        stepper: Stepper,
        step: int,
        say: Callable[[str], None],
        stop: Callable[[], bool],
    ) -> Iterator[None]:
        """As in ``Batches``: with an engine, and on the first rank with what judges."""
        self.model = model
        self.stepper = stepper
        self.say = say
        # Ends in this order: what plays, then what it asks, then servers of the run's own.
        with ExitStack() as ending:
            if self.config.rl.is_served:
                # The same config, in which servers that are started have their URLs.
                try:
                    served = ending.enter_context(own_servers(self.config, model, say, stop))
                except Stopped:
                    # Before anything is asked: the loop ends at once.
                    yield
                    return
                # Servers of its own compute in the dtype of the run.
                dtype = self.config.model.dtype if self.config.rl.start_servers else None
                self.engine = Served(model, stepper, served, say, stop, dtype)
            else:
                self.engine = embedded_in(model, self.config, stop)
            ending.enter_context(closing(self.engine))
            # A reward that cannot be loaded ends every rank.
            on_first_rank(lambda: self._begin(step, ending), "what judges could not be started")
            yield

    def _begin(self, step: int, ending: ExitStack) -> None:
        """Have the first rank play episodes, from this number of finished steps on, until
        ``ending`` closes."""
        rl = self.config.rl
        # What an earlier process has left there is asked again, or was.
        (self._folder / REST).unlink(missing_ok=True)
        round = step // rl.steps_per_rollout
        done, known = prompts_done(self._folder, round)
        # What an earlier process had begun and not trained on is asked again.
        numbers = (number for number in count() if number not in done)
        prompts = (self.prompts.ask(number, self.config) for number in numbers)
        groups = self.config.train.global_batch_size * rl.steps_per_rollout // rl.group_size
        if known < round:
            # Of a checkpoint that was copied away from its run: as many as rounds take at least.
            done |= set(range(round * groups))
            self.say(
                f"rl: {self._folder} has the rollouts of {known} of {round} rounds: prompts go on"
                f" behind the first {round * groups:,}"
            )
        plan = Plan(groups, rl.group_size, rl.staleness)
        kept = partial(is_kept, policy=self.policy)
        collector = ending.enter_context(Collector(self._train_on, prompts, plan, kept, round))
        ending.callback(self._keep_rest, collector)
        opened = self.make_play(self.config)
        self.play = collector.run(opened.__aenter__()).result()
        ending.callback(lambda: collector.run(opened.__aexit__(None, None, None)).result())
        # Before what judges ends: nothing is asked of it any more.
        ending.callback(collector.cancel)
        self.collector = collector

    def _keep_rest(self, collector: Collector) -> None:
        """Write what no round has taken: where rewards end a run, it is what shows why."""
        rest = collector.rest()
        if not rest:
            return
        try:
            write_rest(self._folder, rest)
        except OSError as error:
            # The run ends anyway, perhaps by an error that says more.
            self.say(f"rl: {self._folder / REST} could not be written ({error})")
            return
        self.say(f"rl: {len(rest):,} groups that no round has taken are in {self._folder / REST}")

    def prepare(self, step: int) -> dict[str, float]:
        """As in ``Batches``: sample the next round where the step begins one."""
        every = self.config.rl.steps_per_rollout
        # What a round has to say is logged with each of its steps: log.every may pick any.
        if step % every:
            return self.numbers
        began = time.perf_counter()
        taken: Round = self._wait_for(
            step, lambda collector: collector.begin_round(step // every), "rollouts failed"
        )
        on_first_rank(
            lambda: write_round(self._folder, step // every, step, taken),
            f"{self._folder}: what was sampled could not be written",
        )
        samples, self.by_step = samples_of(taken.groups, self.policy, every)
        self.first_step = step
        self.train = split_of(samples, self.prompts.train, self.policy)
        self.is_fresh = is_fresh(taken, step)
        if self.policy.proximal == "recompute":
            self.stepper.kept["recompute"] = start_of(None, self.model)
        seconds = time.perf_counter() - began
        self.numbers = {**numbers_of(taken, step), "rollout_seconds": seconds}
        self._look_at_rewards(step)
        return self.numbers

    def _look_at_rewards(self, step: int) -> None:
        """Say it where nothing is learned of a round: its steps look like any others."""
        self.rounds_alike = self.rounds_alike + 1 if self.numbers["groups_alike"] == 1 else 0
        # At the 1st, 2nd, 4th, 8th in a row: a run that learns nothing at all is seen.
        if self.rounds_alike and self.rounds_alike & (self.rounds_alike - 1) == 0:
            self.say(
                f"rl: step {step + 1}: all completions of each prompt have the same reward, of"
                f" which nothing is learned (rounds in a row: {self.rounds_alike}): rewards are too"
                " hard or too easy for this model, or do not depend on the completion"
            )

    def check(self, step: int, reported: dict[str, float]) -> None:
        """As in ``Batches``: the engine's log-probabilities must be those of the adapter that it
        was said to have."""
        gap = reported.get("engine_gap")
        limit = self.config.rl.largest_gap
        if limit is None and self.config.model.dtype == "float32":
            limit = GAP
        # From the second step on, and with older completions, two adapters are compared.
        if gap is None or limit is None or not self.is_fresh or step != self.first_step:
            return
        # Written so that NaN stops the run, too.
        if not gap <= limit:
            raise ValueError(
                f"step {step + 1}: the engine and this model differ by {gap:.1e} on average in the"
                f" log-probabilities of completions that version {step} sampled, and"
                f" rl.largest_gap is {limit:.1e} (largest difference"
                f" {reported.get('engine_gap_max', gap):.1e}). The engine has another adapter or"
                " base than it should, or computes in another dtype"
            )

    def evaluate(self, stepper: Stepper, step: int) -> Evaluated | None:
        """As in ``Batches``: the mean reward of one completion for each held-out prompt. The loss
        is its negative."""
        if self.eval is None:
            return None

        def begin(collector: Collector) -> Future[list[Episode]]:
            return collector.play_all(self.prompts.held_out(), self._evaluate_on)

        episodes = self._wait_for(step, begin, "the evaluation failed")
        judged = [one.reward for one in episodes if one.reward is not None]
        if not judged:
            # A training is worth more than one of its evaluations.
            self.say(
                f"evaluation at step {step}: no reward judged any of {len(episodes):,} completions;"
                " it counts as none"
            )
            return None
        reward = float(np.mean(judged))
        others = {
            "reward": reward,
            "unjudged": 1 - len(judged) / len(episodes),
            "completion_tokens": float(np.mean([sum(one.mask) for one in episodes])),
            "truncated": float(np.mean([one.truncated for one in episodes])),
        }
        return Evaluated(0.0 - reward, f"{len(judged):,} completions", others)

    @property
    def _folder(self) -> Path:
        return Path(self.config.checkpoint.dir) / FOLDER

    def _wait_for[T](self, step: int, begin: Callable[[Collector], Future[T]], failure: str) -> T:
        """What the first rank's episodes lead to, on every rank; collective.

        Args:
            step: finished steps, the version that is sampled from.
            begin: begins them.
        """
        engine = self.engine
        assert engine is not None, "at_work has made it"
        engine.publish(step)
        done = begin(self.collector) if self.collector is not None else None
        return result_of(engine, done, failure)

    def _train_on(self, prompt: Prompt, place: int) -> Awaitable[Episode]:
        return self._played(prompt, place, self.policy.temperature)

    def _evaluate_on(self, prompt: Prompt, place: int) -> Awaitable[Episode]:
        return self._played(prompt, place, self.config.rl.eval_temperature, _EVALUATION)

    def _played(
        self, prompt: Prompt, place: int, temperature: float, apart: int = 0
    ) -> Awaitable[Episode]:
        """One episode, whose turns have streams of draws of their own."""
        engine = self.engine
        assert engine is not None and self.play is not None, "at_work has made both"
        first = apart + ((prompt.number * self.config.rl.group_size + place) << _TURN_BITS)
        turns = count(first)

        async def ask(tokens: Any) -> Sampled:
            return await engine.sample(tokens, next(turns), temperature)

        return self.play(prompt, place, ask)
