"""The ``rl`` section: sampling completions and judging them, for megalora rl."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from megalora.config.checks import require

_ABOVE_ZERO = (
    "reward_workers", "reward_timeout", "group_size", "steps_per_rollout", "max_new_tokens",
    "concurrency", "server_patience",
)  # fmt: skip
_SET_BY_RUN = (
    "--model", "--served-model-name", "--host", "--port", "--dtype", "--enable-lora", "--api-key",
    "--max-lora-rank", "--max-loras", "--max-cpu-loras", "--lora-target-modules", "--lora-modules",
    "--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--data-parallel-size",
    "-dp", "--config", "--logprobs-mode",
)  # fmt: skip
"""Arguments of vLLM that follow from a run's config."""


@dataclass(frozen=True, kw_only=True)
class StartServers:
    """vLLM servers that a run starts by itself."""

    count: int = 1
    """Number of servers, each with the whole base."""
    gpus: int = 1
    """GPUs of each, over which it has tensor parallelism; 0 for vLLM's build for CPUs."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments for vLLM."""

    def __post_init__(self) -> None:
        where = "rl.start_servers"
        require(self.count >= 1, f"{where}.count={self.count}: at least 1; null starts none")
        require(self.gpus >= 0, f"{where}.gpus must not be negative, got {self.gpus}")
        for argument in self.arguments:
            # vLLM reads --max_loras as --max-loras.
            option = argument.partition("=")[0].replace("_", "-")
            require(
                option not in _SET_BY_RUN,
                f"{where}.arguments: {option} is set by the run, which knows what fits",
            )


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    rewards: str | dict[str, float] | None = None
    """What judges a completion, or several with their weights: ``last-number``, ``exact``,
    ``regex:PATTERN``, ``math-verify``, or your own ``module:function`` or ``file.py:function`` of
    (prompt, completion, row). With it ``data.train`` holds prompts, and ``megalora rl`` samples
    their completions. null where the data holds rollouts."""
    environment: str | None = None
    """An episode of several turns, such as one with tools: ``module:function`` or
    ``file.py:function``, an async function of (client, row). null is one completion of a prompt."""
    reward_workers: int = 4
    """Processes in which rewards run that are no async functions."""
    reward_timeout: float = 30.0
    """Seconds that a reward may take."""
    reward_failure: Literal["stop", "leave_out"] = "stop"
    """What becomes of a completion whose reward fails or takes too long: it ends the run, or it is
    left out and counted."""
    group_size: int = 8
    """Completions of a prompt, which are compared with each other."""
    steps_per_rollout: int = 1
    """Optimizer steps on what is sampled at once: ``train.global_batch_size`` completions for each.
    From the second one on, they were sampled by an earlier adapter."""
    max_new_tokens: int = 256
    """Tokens of a completion, at most; of each turn in an environment. Prompts that leave no room
    for so many in ``data.max_length`` are left out and counted."""
    concurrency: int = 64
    """Completions that are sampled at the same time: on each data-parallel rank, or by each of
    ``rl.servers``."""
    servers: list[str] = field(default_factory=list)
    """URLs of vLLM servers to sample from, each started by ``megalora serve --trainer``; they get
    every version of the adapter. An empty list samples from the model that is trained, which needs
    no server and waits for itself."""
    start_servers: StartServers | None = None
    """Servers that the run starts on its first host and ends with itself, in place of
    ``rl.servers``: ``{count: 2, gpus: 1, arguments: ["--max-model-len", "8192"]}``. They get the
    GPUs behind those of the host's ranks. What they say is in ``servers`` in the run folder. null
    starts none."""
    staleness: int = 0
    """Of ``rl.servers``: rounds of rollouts that may be begun before the one that is trained on, so
    that servers sample while this trains. 0 samples each round from the newest adapter."""
    sync: Literal["auto", "http", "group", "folder"] = "auto"
    """How ``rl.servers`` get a version: ``http``, each fetches it from this training's memory;
    ``group``, one broadcast to all; ``folder``, from the run folder, which they see under the same
    path. ``auto`` is http, or folder where a server takes nothing by network."""
    server_patience: float = 10.0
    """Minutes that a run waits for ``rl.servers`` of which none answers, and for one that lacks a
    version."""
    eval_temperature: float = 0.0
    """Temperature of evaluations, of one completion for each prompt of ``data.eval``. 0 takes the
    most probable token. Training samples at ``objective.policy.temperature``."""
    replay_routes: Literal["auto", "on", "off"] = "auto"
    """Whether tokens go to the experts that they went to while they were sampled (R3, arXiv
    2510.11370), so that rounding does not make training another function than the engine.
    ``auto``: where the model has experts and samples by itself. ``on`` with servers: vLLM 0.32
    reports them on GPUs, started with ``--enable-return-routed-experts``, which
    ``rl.start_servers`` does. Answers then come whole, and one that breaks off is asked anew."""
    largest_gap: float | None = None
    """Largest mean difference between log-probabilities of the engine and of this model for the
    same adapter; above it the run stops. null is 1e-5 in float32, and no limit in other dtypes,
    where rounding alone gives 1e-2."""

    def __post_init__(self) -> None:
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            # As "above", so that NaN is refused, too.
            require(value > 0, f"rl.{name} must be above 0, got {value}")
        require(
            0 <= self.eval_temperature < float("inf"),
            f"rl.eval_temperature must be 0 or above, got {self.eval_temperature}",
        )
        require(
            self.largest_gap is None or self.largest_gap > 0,
            f"rl.largest_gap must be above 0, got {self.largest_gap}",
        )
        require(
            self.group_size > 1,
            f"rl.group_size={self.group_size}: a completion is compared with others of its prompt;"
            " it must be at least 2",
        )
        self._check_servers()
        if isinstance(self.rewards, dict):
            require(bool(self.rewards), "rl.rewards is an empty mapping; name a reward")
        if not self.is_on:
            self._check_unread()

    def _check_servers(self) -> None:
        for url in self.servers:
            require(
                url.startswith(("http://", "https://")),
                f"rl.servers: {url} is not the URL of a server; write it as http://HOST:PORT",
            )
            # As OpenAI's clients want it: every path would have /v1 twice, and be unknown.
            require(
                not url.rstrip("/").endswith("/v1"),
                f"rl.servers: {url} ends in /v1, which is added to it; write it as"
                " http://HOST:PORT",
            )
        require(
            len(set(self.servers)) == len(self.servers),
            f"rl.servers={self.servers} names a server twice",
        )
        require(self.staleness >= 0, f"rl.staleness must not be negative, got {self.staleness}")
        require(
            not self.servers or self.start_servers is None,
            "rl.start_servers starts servers in place of rl.servers; leave one of them out",
        )
        of_servers = {"staleness": self.staleness, "sync": self.sync != "auto"}
        for option, is_set in of_servers.items():
            require(
                not is_set or self.is_served,
                f"rl.{option}={getattr(self, option)} does nothing without rl.servers or"
                " rl.start_servers: the model that is trained samples by itself",
            )
        require(
            self.start_servers is None or self.start_servers.gpus > 0 or self.replay_routes != "on",
            "rl.replay_routes=on: vLLM's build for CPUs (rl.start_servers.gpus=0) does not report"
            " the experts that it chose; leave it out. The gap to the engine is logged",
        )

    def _check_unread(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            require(
                value == (option.default if option.default is not MISSING else []),
                f"rl.{option.name}={value} does nothing without rl.rewards or rl.environment, which"
                " say how completions are judged",
            )

    @property
    def is_on(self) -> bool:
        """Whether the run samples completions itself."""
        return self.rewards is not None or self.environment is not None

    @property
    def is_served(self) -> bool:
        """Whether servers sample, and not the model that is trained."""
        return bool(self.servers) or self.start_servers is not None

    def replays(self, has_experts: bool) -> bool:
        """Whether routing is replayed.

        Raises:
            ValueError: it was asked for, and the model has no experts.
        """
        require(
            has_experts or self.replay_routes != "on",
            "rl.replay_routes=on: this model has no layers with experts; leave it out",
        )
        # Of servers only where it was asked for: they stream otherwise.
        wanted = ("on",) if self.is_served else ("auto", "on")
        return has_experts and self.replay_routes in wanted

    @property
    def weights(self) -> dict[str, float]:
        """Each reward with its weight."""
        if isinstance(self.rewards, str):
            return {self.rewards: 1.0}
        return dict(self.rewards or {})
