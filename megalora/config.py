"""Everything a run can be told, as frozen dataclasses, with every check and its message.

Checks that need no model run in ``__post_init__``; checks against the world size and the model's
shape are methods, so that they run before any process group or weight exists. ``config_file.py``
reads and writes YAML.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from megalora.paths import expand

LeftOutOfText = Literal["reasoning", "name", "tools", "documents"]
"""What a chat template may leave out of the text where ``data.allow_left_out`` names it."""
LeftOut = Literal[
    LeftOutOfText,
    "system", "system_prompt", "input", "instruction", "context", "history", "functions",
    "chat_template_kwargs", "thinking", "reasoning_content", "images", "image", "videos", "audios",
]  # fmt: skip
"""What ``data.allow_left_out`` may name: parts of a conversation, and columns that belong to it."""


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError`` with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_warmup(warmup: int, steps: int, what: str) -> None:
    """Raise ``ValueError`` where no step would reach the learning rate that was asked for.

    Args:
        what: names the run's steps.
    """
    require(
        warmup <= steps,
        f"train.warmup={warmup} is longer than {what}: the learning rate would end at"
        f" {steps / max(1, warmup):.0%} of train.lr. Lower train.warmup or train more steps.",
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    path: str
    """Folder of a Hugging Face checkpoint, or a name on the hub."""
    backend: Literal["torch"] = "torch"
    """Who computes norms, attention and linears. Transformer Engine (``te``) is not supported
    yet."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights, adapters and activations; with bfloat16 the optimizer keeps float32 masters."""
    attention: Literal["sdpa"] = "sdpa"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", expand(self.path, "model.path"))


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks are laid out. Attention and experts use two grids over the same world.

    attention grid: world = tp * pp * dp          experts grid: world = etp * ep * pp * edp
    """

    tp: int = 1
    """Tensor-parallel size of attention and dense layers; sequence parallel is on when it is above
    1."""
    pp: int = 1
    """Pipeline stages."""
    vpp: int = 1
    """Model chunks per pipeline stage (interleaved schedule)."""
    ep: int = 1
    """Expert-parallel size: experts are divided over this many ranks."""
    etp: int = 1
    """Tensor-parallel size inside one expert. Megatron defaults it to tp; megalora to 1."""
    cp: int = 1
    """Context-parallel size; only 1 is possible today."""

    def __post_init__(self) -> None:
        for f in fields(self):
            require(
                getattr(self, f.name) >= 1,
                f"parallel.{f.name} must be at least 1, got {getattr(self, f.name)}",
            )
        require(
            self.cp == 1,
            f"parallel.cp={self.cp}: context parallelism needs Transformer Engine's attention,"
            " which the torch back end does not have. Set parallel.cp=1; use parallel.tp to split"
            " long sequences.",
        )
        require(
            self.vpp == 1 or self.pp > 1,
            f"parallel.vpp={self.vpp} interleaves the chunks of several pipeline stages, but"
            " parallel.pp=1. Set parallel.vpp=1 or parallel.pp to 2 or more.",
        )

    def data_parallel_sizes(self, world_size: int) -> tuple[int, int]:
        """(dp, edp): how often attention and expert parameters are replicated on ``world_size``
        ranks."""
        require(world_size >= 1, f"a run needs at least 1 rank, got {world_size}")
        sizes = []
        for grid, names in (("attention", ("tp", "pp")), ("expert", ("etp", "ep", "pp"))):
            product = 1
            for name in names:
                product *= getattr(self, name)
            terms = " * ".join(f"{name}={getattr(self, name)}" for name in names)
            require(
                world_size % product == 0,
                f"{world_size} ranks cannot hold the {grid} grid: {terms} = {product}, and"
                f" {world_size} is not a multiple of {product}.\n  Change"
                f" {' or '.join('parallel.' + n for n in names)}, or launch a multiple of {product}"
                " ranks.",
            )
            sizes.append(world_size // product)
        return sizes[0], sizes[1]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    rank: int = 16
    alpha: float = 32.0
    """The delta is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)."""
    dropout: float = 0.0
    """Probability with which an input of A is zeroed, drawn per rank."""
    target_modules: str | list[str] = "all-linear"
    """HF names (q_proj ... down_proj, gate, lm_head), fused names as aliases, or all-linear (all
    but lm_head, gate)."""
    exclude_modules: list[str] = field(default_factory=list)
    """HF names, or regular expressions on full HF module names."""
    layers: list[int] | str | None = None
    """Layers to adapt: a list, or ranges such as "0-3,8,12-". None means all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """HF name, or regular expression on the full HF module name, to rank. The first that matches
    wins, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """The same for alpha."""
    expert_rank: int | None = None
    """Rank of routed experts where rank_pattern says nothing; None means rank."""
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for name, rank in {
            "rank": self.rank,
            "expert_rank": self.expert_rank,
            **self.rank_pattern,
        }.items():
            require(
                rank is None or rank >= 1, f"lora: {name} must be a rank of at least 1, got {rank}"
            )
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            require(alpha > 0, f"lora: {name} must be an alpha above 0, got {alpha}")
        require(0 <= self.dropout < 1, f"lora.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str
    """JSONL, JSON or Parquet file, or hub data set NAME[:SPLIT]; may end in a slice such as
    [:200]."""
    eval: str | int | float | None = None
    """Another source, or how much of train to hold out: a count (int) or a fraction (float)."""
    format: str | dict[str, str] = "auto"
    """auto (messages, ShareGPT's conversations, prompt and completion, Alpaca's instruction, input
    and output) or a column mapping: {messages: COLUMN} or {prompt: COLUMN, completion: COLUMN}, and
    where they have other names: input, system, tools, functions, documents,
    chat_template_kwargs."""
    allow_left_out: list[LeftOut] = field(default_factory=list)
    """What may be missing from the text all the same, counted and reported: parts that the chat
    template does not print (reasoning, name, tools, documents), or columns by name (input, ...)."""
    max_length: int = 4096
    """In tokens. Longer samples are left out, counted and reported."""
    seed: int = 0
    """Of the order of samples, and of the hold-out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", expand(self.train, "data.train"))
        if isinstance(self.eval, str):
            object.__setattr__(self, "eval", expand(self.eval, "data.eval"))
        require(
            self.max_length >= 2,
            f"data.max_length must be at least 2 tokens, got {self.max_length}",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int | None = None
    """Optimizer steps. Give either steps or epochs."""
    epochs: float | None = None
    global_batch_size: int = 16
    """Samples per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Samples per forward pass on one rank."""
    lr: float = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From lr down to zero at the last step (constant: not at all), after a linear warm-up."""
    warmup: int = 0
    """Steps."""
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    """Largest L2 norm of the whole gradient; 0 turns clipping off."""
    recompute: Literal["off", "selective", "full"] = "off"
    """What backward computes again. selective: core attention, gate_up of experts, dense MLPs;
    full: whole layers. An adapter on o_proj keeps core attention's result all the same: little is
    saved there."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""
    seed: int = 0
    """Of adapter initialisation and dropout."""
    timeout_minutes: float = 30
    """How long a rank waits for another before it takes it for lost and ends the run; more than
    loading and saving take."""
    check_base: Literal["layer", "loss", "off"] = "layer"
    """What is compared with transformers on the first rank's host before the first step. layer: one
    layer of each kind as loaded, embedding and head, on a few tokens; loss: the loss of the first
    microbatch too, for which the whole model must fit that host."""
    check_replicas_every: int = 100
    """Steps between comparisons of every adapter tensor's copies on all ranks, also before each
    save; 0 turns them off."""

    def __post_init__(self) -> None:
        require(
            (self.steps is None) != (self.epochs is None),
            f"give exactly one of train.steps and train.epochs (got steps={self.steps},"
            f" epochs={self.epochs})",
        )
        for name in (
            "steps",
            "epochs",
            "lr",
            "global_batch_size",
            "micro_batch_size",
            "timeout_minutes",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name} must be above 0, got {value}")
        for name in ("warmup", "weight_decay", "clip_grad", "eval_every", "check_replicas_every"):
            require(
                getattr(self, name) >= 0,
                f"train.{name} must not be negative, got {getattr(self, name)}",
            )
        if self.steps is not None:
            check_warmup(self.warmup, self.steps, f"train.steps={self.steps}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    dir: str = "runs/default"
    """The run folder."""
    every: int = 0
    """Steps between checkpoints; 0 saves only at the end and on SIGTERM."""
    keep: int = 0
    """How many of the newest checkpoints to keep; 0 keeps all."""
    resume: bool | str = False
    """true: continue from the newest checkpoint in dir if there is one; a path: from that
    checkpoint."""
    serve: str | None = None
    """URL of a running vLLM server, such as ``megalora serve`` starts: every checkpoint is loaded
    there, in place of the last."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir", expand(self.dir, "checkpoint.dir"))
        if isinstance(self.resume, str):
            object.__setattr__(self, "resume", expand(self.resume, "checkpoint.resume"))
        require(
            self.serve is None or self.serve.startswith(("http://", "https://")),
            f"checkpoint.serve={self.serve} is no URL of a server; write it as http://HOST:PORT",
        )
        for name in ("every", "keep"):
            require(
                getattr(self, name) >= 0,
                f"checkpoint.{name} must not be negative, got {getattr(self, name)}",
            )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 1
    """Steps between lines in metrics.jsonl."""
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every must be at least 1, got {self.every}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def check_world(self, world_size: int) -> None:
        """Check all that depends on the number of ranks; raises ``ValueError``."""
        dp, _ = self.parallel.data_parallel_sizes(world_size)
        batch = self.train.global_batch_size
        micro = self.train.micro_batch_size
        p = self.parallel
        require(
            batch % (micro * dp) == 0,
            f"train.global_batch_size={batch} cannot be divided: micro_batch_size={micro} * data"
            f" parallel={dp} = {micro * dp}, and {batch} is not a multiple of {micro * dp}.\n "
            " Change train.global_batch_size or train.micro_batch_size.",
        )
        num_microbatches = batch // (micro * dp)
        require(
            p.vpp == 1 or num_microbatches % p.pp == 0,
            f"the interleaved schedule (parallel.vpp={p.vpp}) needs a number of microbatches that"
            f" is a multiple of parallel.pp={p.pp}; train.global_batch_size={batch} gives"
            f" {num_microbatches}.",
        )
