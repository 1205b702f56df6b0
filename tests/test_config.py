"""What a config accepts and makes of it, and the exact words in which it refuses the rest."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megalora.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoRAConfig,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    RecomputeLayers,
    RLConfig,
    RunConfig,
    TrainConfig,
)
from megalora.config.file import load_config, save_config
from megalora.config.policy import PolicyConfig
from tests.minimal_config import MINIMAL, minimal, refusal

__all__ = ["minimal"]  # a fixture


def test_defaults(minimal: Path) -> None:
    config = load_config(minimal)
    assert config == RunConfig(
        model=ModelConfig(path="models/tiny", backend="torch", dtype="bfloat16", attention="auto"),
        data=DataConfig(train="chats.jsonl", eval=None, format="auto", max_length=4096, seed=0),
        train=TrainConfig(
            steps=3, epochs=None, global_batch_size=16, micro_batch_size=1, lr=1e-4,
            schedule="cosine", warmup=0,
            weight_decay=0.0, clip_grad=1.0, recompute="off", eval_every=0, seed=0,
        ),
        parallel=ParallelConfig(tp=1, pp=1, vpp=1, ep=1, etp=1, cp=1),
        lora=LoRAConfig(
            rank=16, alpha=32.0, dropout=0.0, target_modules="all-linear", exclude_modules=[],
            layers=None,
            rank_pattern={}, alpha_pattern={}, expert_rank=None, share_outer=False,
            use_rslora=False,
        ),
        checkpoint=CheckpointConfig(dir="runs/default", every=0, keep=0, resume=False),
        log=LogConfig(every=1, tensorboard=True, progress=True),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        # An exponent without a dot, which is text in YAML 1.1, and an integer: both become floats.
        ("train.lr=3e-4", "train", "lr", 3e-4),
        ("train.lr=1", "train", "lr", 1.0),
        ("train.clip_grad=0", "train", "clip_grad", 0.0),
        ("lora.alpha=8", "lora", "alpha", 8.0),
        # Keys of several types: what is given must stay what it is.
        ("lora.target_modules=[q_proj,gate]", "lora", "target_modules", ["q_proj", "gate"]),
        ("lora.target_modules=o_proj", "lora", "target_modules", "o_proj"),
        ("lora.layers=[0,2]", "lora", "layers", [0, 2]),
        ("lora.layers=0-3,8", "lora", "layers", "0-3,8"),
        ("lora.layers=2-", "lora", "layers", "2-"),
        ("lora.rank_pattern={q_proj: 8}", "lora", "rank_pattern", {"q_proj": 8}),
        (
            "lora.alpha_pattern={q_proj: 32, o_proj: 0.5}",
            "lora",
            "alpha_pattern",
            {"q_proj": 32.0, "o_proj": 0.5},
        ),
        # A key of a mapping by its path.
        ("lora.alpha_pattern.k_proj=4", "lora", "alpha_pattern", {"k_proj": 4.0}),
        ("lora.expert_rank=4", "lora", "expert_rank", 4),
        ("lora.expert_rank=top_k", "lora", "expert_rank", "top_k"),
        ("data.train=gsm8k/train.jsonl[:200]", "data", "train", "gsm8k/train.jsonl[:200]"),
        ("data.train=org/name/main:test[1:3]", "data", "train", "org/name/main:test[1:3]"),
        # A number of samples, a share of them, a file.
        ("data.eval=7", "data", "eval", 7),
        ("data.eval=0.125", "data", "eval", 0.125),
        ("data.eval=eval.jsonl", "data", "eval", "eval.jsonl"),
        (
            "data.format={prompt: q, completion: a}",
            "data",
            "format",
            {"prompt": "q", "completion": "a"},
        ),
        ("checkpoint.resume=true", "checkpoint", "resume", True),
        ("checkpoint.resume=runs/a/step_000005", "checkpoint", "resume", "runs/a/step_000005"),
        ("log.progress=false", "log", "progress", False),
    ],
)
def test_override(minimal: Path, override: str, section: str, key: str, value: Any) -> None:
    found: Any = getattr(getattr(load_config(minimal, [override]), section), key)
    assert found == value
    # 1 == 1.0 == True: types are compared by themselves.
    assert type(found) is type(value)
    if isinstance(value, dict):
        for name, inner in value.items():
            assert type(found[name]) is type(inner)


def test_overrides_apply_in_order_and_leave_the_rest_of_a_section(minimal: Path) -> None:
    config = load_config(
        minimal,
        ["train.lr=0.5", "train.lr=0.25", "train.steps=null", "train.epochs=2", "parallel.ep=4"],
    )
    assert (config.train.lr, config.train.steps, config.train.epochs) == (0.25, None, 2.0)
    assert config.parallel == ParallelConfig(ep=4)
    assert config.model.path == "models/tiny"


@pytest.mark.parametrize(
    "override", ["train.recompute={layers: 4}", "train={recompute: {layers: 4}}"]
)
def test_a_mapping_replaces_the_one_before(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        MINIMAL.replace("steps: 3", "steps: 3, recompute: {layers: 9, rest: selective}")
    )
    config = load_config(path, [override])
    assert config.train.recompute == RecomputeLayers(layers=4, rest="off")
    # The rest of the section is as it was, and a key below an option is set beside the others.
    assert config.train.steps == 3
    config = load_config(path, ["train.recompute.layers=4"])
    assert config.train.recompute == RecomputeLayers(layers=4, rest="selective")


def test_every_option_that_is_a_mapping_is_replaced(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "lora={rank_pattern: {q_proj: 8, k_proj: 4}, alpha: 8}",
            "lora.rank_pattern={v_proj: 2}",
            "lora.rank_pattern.o_proj=1",
            "data.format={prompt: q, completion: a}",
            "data.format={messages: chat}",
            # A reference to another option is a value, too.
            "lora.alpha_pattern={q_proj: 3}",
            "lora.alpha_pattern=${lora.rank_pattern}",
        ],
    )  # fmt: skip
    assert config.lora.rank_pattern == {"v_proj": 2, "o_proj": 1}
    assert config.lora.alpha_pattern == {"v_proj": 2.0, "o_proj": 1.0}
    assert config.lora.alpha == 8
    assert config.data.format == {"messages": "chat"}
    assert load_config(minimal, ["lora.rank_pattern={q_proj: 8}", "lora.rank_pattern={}"]) == (
        load_config(minimal)
    )


def test_round_trip(tmp_path: Path) -> None:
    # Texts that YAML would read as numbers, booleans, null or mappings if they were written bare.
    config = RunConfig(
        model=ModelConfig(path="123", dtype="float32"),
        data=DataConfig(train="a: b.jsonl[:200]", eval=0.05, format={"messages": "yes"},
                        max_length=77, seed=5),
        train=TrainConfig(epochs=1.5, lr=3e-05, schedule="linear", warmup=9, recompute="full",
                          seed=11),
        objective=ObjectiveConfig(name="dpo", loss="robust", beta=2, label_smoothing=0.25),
        parallel=ParallelConfig(tp=2, pp=3, vpp=2, ep=5, etp=6, stage_layers=(1, 3, 2, 1, 4, 1)),
        lora=LoRAConfig(
            rank=3, alpha=7, dropout=0.1, target_modules=["gate_up_proj", "lm_head"], layers="3",
            exclude_modules=[r".*\.3\.mlp\..*"],
            rank_pattern={r"layers\.[02]\..*q_proj": 2, "null": 4},
            alpha_pattern={"k_proj": 1e-3}, expert_rank=2, use_rslora=True,
        ),
        checkpoint=CheckpointConfig(dir="runs/true", every=4, keep=2, resume="007"),
        log=LogConfig(every=8, tensorboard=False, progress=False),
    )  # fmt: skip
    sampling = replace(
        config,
        objective=ObjectiveConfig(name="grpo", policy=PolicyConfig(proximal="recompute")),
        train=TrainConfig(steps=8), parallel=ParallelConfig(tp=2), lora=LoRAConfig(rank=3),
        rl=RLConfig(rewards={"no": 1, "file.py:f": 0.5}, max_new_tokens=9, steps_per_rollout=2),
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    for one in (config, sampling):
        save_config(one, path)
        assert load_config(path) == one
    # A section of defaults would come back even if it were not written.
    path.write_text(MINIMAL)
    defaults = load_config(path)
    for section in fields(RunConfig):
        written = sampling if section.name == "rl" else config
        assert getattr(written, section.name) != getattr(defaults, section.name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Keys that do not exist: with the nearest if one is near, else with all.
        ("modell.path=x", "unknown config key modell; did you mean model?"),
        ("train.warm_up=3", "unknown config key train.warm_up; did you mean train.warmup?"),
        (
            "lora.r=3",
            (
                "unknown config key lora.r; known keys: rank, alpha, dropout, target_modules,"
                " exclude_modules, layers, rank_pattern, alpha_pattern, expert_rank, share_outer,"
                " use_rslora, use_dora, lora_bias, bias, init, modules_to_save,"
                " trainable_token_indices"
            ),
        ),
        # Sections and keys in each other's place, and texts that are no override.
        ("train=3", "train is a section, got 3"),
        ("lora=null", "lora is a section, got nothing"),
        ("parallel.tp={x: 3}", "parallel.tp must be an integer, got {'x': 3}"),
        ("train.lr", "override 'train.lr' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form section.key=value"),
        # Types: a bool is no int in a config, although it is in Python, and 2.0 is none either.
        ("model.path=123", "model.path must be text, got 123"),
        ("parallel.tp=2.0", "parallel.tp must be an integer, got 2.0"),
        ("parallel.tp=true", "parallel.tp must be an integer, got True"),
        ("train.lr=fast", "train.lr must be a number, got 'fast'"),
        ("train.lr=true", "train.lr must be a number, got True"),
        ("train.steps=1.5", "train.steps must be an integer or nothing, got 1.5"),
        ("lora.use_rslora=1", "lora.use_rslora must be true or false, got 1"),
        ("lora.layers=3", "lora.layers must be a list of integers or text or nothing, got 3"),
        ("lora.layers=[1,true]", "lora.layers[1] must be an integer, got True"),
        ("lora.target_modules=[q_proj,3]", "lora.target_modules[1] must be text, got 3"),
        ("lora.rank_pattern={q_proj: 2.0}", "lora.rank_pattern.q_proj must be an integer, got 2.0"),
        (
            "lora.rank_pattern={q_proj: k_proj}",
            "lora.rank_pattern.q_proj must be an integer, got 'k_proj'",
        ),
        ("lora.rank_pattern={7: 2}", "a key of lora.rank_pattern must be text, got 7"),
        (
            "lora.alpha_pattern={q_proj: true}",
            "lora.alpha_pattern.q_proj must be a number, got True",
        ),
        ("lora.alpha_pattern=[1.0]", "lora.alpha_pattern must be a mapping to numbers, got [1.0]"),
        ("data.eval=true", "data.eval must be text or an integer or a number or nothing, got True"),
        ("data.format={messages: 3}", "data.format.messages must be text, got 3"),
        ("checkpoint.resume=1", "checkpoint.resume must be true or false or text, got 1"),
        # Values of the right type that mean nothing.
        (
            "data.train=",
            "data.train must be text or a list of mappings of path, weight, format, got nothing",
        ),
        ("data.train=''", "data.train is empty; name a file or a folder"),
        ("data.eval=' '", "data.eval is empty; name a file or a folder"),
        ("model.path=''", "model.path is empty; name a file or a folder"),
        ("checkpoint.dir=''", "checkpoint.dir is empty; name a file or a folder"),
        ("checkpoint.resume=''", "checkpoint.resume is empty; name a file or a folder"),
        (
            "data.allow_left_out=system",
            "data.allow_left_out must be a list of values out of reasoning, name, tools, documents,"
            " system, system_prompt, input, instruction, context, history, functions,"
            " chat_template_kwargs, thinking, reasoning_content, images, image, videos, audios, got"
            " 'system'",
        ),
        ("model.dtype=float16", "model.dtype must be one of float32, bfloat16, got 'float16'"),
        ("model.backend=te", "model.backend must be one of torch, got 'te'"),
        (
            "train.schedule=step",
            "train.schedule must be one of cosine, linear, constant, got 'step'",
        ),
        (
            "train.recompute=true",
            (
                "train.recompute must be one of off, selective, full or a mapping of layers, rest,"
                " got True"
            ),
        ),
        (
            "train.recompute={layers: 0}",
            (
                "train.recompute.layers must be at least 1, got 0; write train.recompute=off to"
                " recompute no layer fully"
            ),
        ),
        ("train.recompute={rest: off}", "config is missing train.recompute.layers"),
        (
            "train.recompute={layers: {a: 1}}",
            "train.recompute.layers must be an integer, got {'a': 1}",
        ),
        (
            "train.recompute={layers: 2, rest: full}",
            "train.recompute.rest must be one of off, selective, got 'full'",
        ),
        (
            "train.recompute={layer: 2}",
            "unknown config key train.recompute.layer; did you mean train.recompute.layers?",
        ),
        ("parallel.ep=0", "parallel.ep must be at least 1, got 0"),
        ("parallel.cp=0", "parallel.cp must be at least 1, got 0"),
        ("train.micro_batch_tokens=0", "train.micro_batch_tokens must be above 0, got 0"),
        (
            "train={steps: 3, micro_batch_tokens: 8192, micro_batch_size: 2}",
            (
                "train.micro_batch_tokens=8192 decides how many samples share a row, and so does"
                " train.micro_batch_size=2: give one of them"
            ),
        ),
        (
            "train.micro_batch_tokens=2048",
            (
                "train.micro_batch_tokens=2048 has no room for a sample of data.max_length=4096"
                " tokens. Lower data.max_length, or set train.micro_batch_tokens to at least 4095."
            ),
        ),
        (
            "parallel.vpp=2",
            (
                "parallel.vpp=2 interleaves the chunks of several pipeline stages, but"
                " parallel.pp=1. Set parallel.vpp=1 or parallel.pp to 2 or more."
            ),
        ),
        (
            "parallel={pp: 2, vpp: 2, stage_layers: [4, 3, 1]}",
            (
                "parallel.stage_layers=[4,3,1] has 3 numbers, and there are 4 parts of the model:"
                " parallel.pp=2 * vpp=2. Give one number for each."
            ),
        ),
        (
            "parallel={pp: 2, stage_layers: [7, 0]}",
            "parallel.stage_layers=[7,0]: every part needs at least 1 layer",
        ),
        (
            "parallel.stage_layers=[4, two]",
            "parallel.stage_layers[1] must be an integer, got 'two'",
        ),
        (
            "parallel.stage_layers=4",
            "parallel.stage_layers must be a list of integers or nothing, got 4",
        ),
        ("lora.rank=0", "lora: rank must be a rank of at least 1, got 0"),
        ("lora.expert_rank=-1", "lora: expert_rank must be a rank of at least 1, got -1"),
        (
            "lora.expert_rank=topk",
            "lora.expert_rank must be an integer or one of top_k, experts or nothing, got 'topk'",
        ),
        ("lora.rank_pattern={v_proj: 0}", "lora: v_proj must be a rank of at least 1, got 0"),
        ("lora.alpha=0", "lora: alpha must be an alpha above 0, got 0.0"),
        ("lora.alpha_pattern={v_proj: -2}", "lora: v_proj must be an alpha above 0, got -2.0"),
        ("lora.dropout=1", "lora.dropout must be in [0, 1), got 1.0"),
        ("data.max_length=1", "data.max_length must be at least 2 tokens, got 1"),
        ("train.steps=null", "give train.steps or train.epochs: how long the run is to be"),
        ("train.steps=0", "train.steps must be above 0, got 0"),
        ("train.lr=-0.1", "train.lr must be above 0, got -0.1"),
        # No float holds it.
        ("train.lr=1" + "0" * 400, f"train.lr must be a number, got 1{17 * '0'}...{19 * '0'}"),
        # Neither above nor below 0.
        ("train.lr=.nan", "train.lr must be above 0, got nan"),
        ("train.loraplus_lr_ratio=0", "train.loraplus_lr_ratio must be above 0, got 0.0"),
        (
            "train.loraplus_lr_ratio=.inf",
            "train.loraplus_lr_ratio must be a finite number, got inf",
        ),
        ("train.global_batch_size=0", "train.global_batch_size must be above 0, got 0"),
        ("train.micro_batch_size=-2", "train.micro_batch_size must be above 0, got -2"),
        ("train.warmup=-1", "train.warmup must not be negative, got -1"),
        ("train.weight_decay=-1", "train.weight_decay must not be negative, got -1.0"),
        ("train.clip_grad=-1", "train.clip_grad must not be negative, got -1.0"),
        ("train.z_loss=-1", "train.z_loss must not be negative, got -1.0"),
        (
            "train.label_smoothing=1",
            "train.label_smoothing must be below 1, got 1.0: at 1 nothing of the target would be"
            " left",
        ),
        ("train.eval_every=-1", "train.eval_every must not be negative, got -1"),
        ("checkpoint.every=-1", "checkpoint.every must not be negative, got -1"),
        ("checkpoint.keep=-1", "checkpoint.keep must not be negative, got -1"),
        ("log.every=0", "log.every must be at least 1, got 0"),
    ],
)
def test_refused_override(minimal: Path, override: str, message: str) -> None:
    assert refusal(minimal, override) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config is missing model, data, train"),
        (b"model: {}\ndata: {train: a}\ntrain: {steps: 1}\n", "config is missing model.path"),
        (b"model: {path: m}\n", "config is missing data, train"),
        (b"model: [1]\n", "model is a section, got [1]"),
        # YAML, but no config.
        (b"- 1\n- 2\n", "{path}: expected sections (model, data, train, ...), not a list"),
        (b"3\n", "{path}: Invalid loaded object type: int"),
        # Not YAML: the parser's first line, after the file's name.
        (b"train: {steps: 1\n", "{path}: while parsing a flow mapping"),
        (b"train: {lr: 1, lr: 2}\n", "{path}: while constructing a mapping"),
        (b"model:\n  path: ???\n", "{path}: model.path is ???: fill it in"),
        (b"model: {path: '${nowhere}'}\n", "{path}: Interpolation key 'nowhere' not found"),
        (b"model: {path: \xff\xfe}\n", "{path}: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_refused_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(message.format(path=path))


def test_epochs_over_the_steps_of_a_file_are_refused(minimal: Path) -> None:
    assert refusal(minimal, "train.epochs=2") == (
        f"train.epochs=2 would have no effect: train.steps=3 in {minimal} counts. Add"
        " train.steps=null, or leave train.epochs out"
    )
    # Whoever gives both at once has steps.
    assert load_config(minimal, ["train.epochs=2", "train.steps=9"]).train.steps == 9


def test_broken_yaml_says_where(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  lr: 1\n  lr: 2\n")
    assert re.search(r"found duplicate key lr, in .*run\.yaml\", line 3, column 3", refusal(path))


def test_broken_override_names_itself_and_not_the_file(minimal: Path) -> None:
    message = refusal(minimal, "train.lr=[1")
    assert message.startswith("override 'train.lr=[1': while parsing a flow sequence")
    assert str(minimal) not in message


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"{tmp_path / name}: no such config file"


def test_what_is_compared_with_transformers(minimal: Path) -> None:
    assert load_config(minimal).train.check_base == "layer"
    assert load_config(minimal, ["train.check_base=loss"]).train.check_base == "loss"
    # YAML reads a bare off as false.
    for off in ("train.check_base=off", "train.check_base='off'"):
        assert load_config(minimal, [off]).train.check_base == "off"
    assert load_config(minimal, ["train.recompute=off"]).train.recompute == "off"


def test_the_first_layers_to_recompute(minimal: Path, tmp_path: Path) -> None:
    """Given whole or key by key, over a level, and written as it is read."""
    for overrides in (
        ["train.recompute={layers: 3, rest: selective}"],
        ["train.recompute=full", "train.recompute.layers=3", "train.recompute.rest=selective"],
    ):
        config = load_config(minimal, overrides)
        assert config.train.recompute == RecomputeLayers(layers=3, rest="selective")
    config = load_config(minimal, ["train.recompute.layers=3", "train.recompute.rest=off"])
    assert config.train.recompute == RecomputeLayers(layers=3)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_config(tmp_path / "saved.yaml", ["train.recompute=full"]).train.recompute == "full"
    assert (
        refusal(minimal, "train.check_base=all")
        == "train.check_base must be one of layer, loss, off, got 'all'"
    )
    assert (
        refusal(minimal, "train.check_base=true")
        == "train.check_base must be one of layer, loss, off, got True"
    )
    assert (
        refusal(minimal, "train.schedule=false")
        == "train.schedule must be one of cosine, linear, constant, got False"
    )


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_old_name_of_the_check_says_the_new_one(value: str, minimal: Path) -> None:
    assert (
        refusal(minimal, f"train.check_parity={value}")
        == "unknown config key train.check_parity; it was renamed: write train.check_base=loss for"
        " what true meant, train.check_base=off for no check"
    )
