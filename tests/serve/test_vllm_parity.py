"""Compare three engines in float32: vLLM, transformers with stock PEFT, and megalora's own layers
at TP 2 x EP 2.

Each gets the adapter as it would: megalora the trained factors, the others the exported folder.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalora.adapters.merge import merge
from megalora.adapters.write.form import write_adapter
from megalora.comm import gather_dim
from megalora.config import LoRAConfig, ParallelConfig
from megalora.lora.select import plan
from megalora.serve.server import Server
from megalora.serve.vllm import Client
from tests.distributed.ranks import run_ranks
from tests.environment import OUTSIDE
from tests.parity.built import built, random_adapter
from tests.parity.runs import make_config
from tests.peft_warnings import IGNORED
from tests.serve.adapters import ATTENTION, EXPERTS, make_adapter, tokens_of
from tests.serve.stock_peft import stock_model

pytestmark = [pytest.mark.vllm, IGNORED]
# Options of the ``lora`` section.
CASES: dict[str, dict[str, Any]] = {
    "attention only": {"target_modules": ATTENTION},
    "experts only": {"target_modules": EXPERTS},
    "attention and experts": {},
    # Padding and folded scales in the exported file, where gate and up have one rank and scale.
    "a rank for each projection": {
        "rank_pattern": {"q_proj": 3, "o_proj": 5, "up_proj": 2, "down_proj": 9},
        "alpha_pattern": {"k_proj": 3.0, "gate_proj": 20.0},
    },
    "rslora": {"use_rslora": True, "expert_rank": 2},
    # gate and down are zeros in the file's layers 1 and 2; layers 0 and 3 have no adapter.
    "some layers": {"layers": "1-2", "target_modules": ["v_proj", "up_proj"]},
    # Which stock vLLM ignores; the plug-in applies it.
    "router among others": {"target_modules": [*ATTENTION, *EXPERTS, "gate"]},
}
ATOL = 5e-6
"""A dozen float32 roundings of a log-probability near -7, half a unit in whose last place is
2.4e-7."""
GPUS = {"CUDA_VISIBLE_DEVICES": OUTSIDE.get("CUDA_VISIBLE_DEVICES")}
"""GPUs that a server of its own may see."""
PROMPTS = [tokens_of(1, 24), tokens_of(2, 16)]
NEW = 8
"""Tokens that are generated after each prompt."""


@dataclass
class Said:
    """What a model makes of one prompt."""

    prompt: list[float]
    """Log-probabilities of its tokens but the first."""
    tokens: list[int]
    """The greedy continuation."""
    logprobs: list[float]
    """Log-probabilities of ``tokens``."""


def of_vllm(client: Client, name: str) -> list[Said]:
    found = []
    for prompt in PROMPTS:
        given = client.prompt_logprobs(name, prompt)
        completion = client.complete(name, prompt, max_tokens=NEW, ignore_eos=True)
        found.append(Said(given, completion.tokens, completion.logprobs))
    return found


@torch.no_grad()
def of_model(logits: Any) -> list[Said]:
    """``logits(tokens)``: ``[S, V]`` of a plain forward pass over a list of tokens."""
    found = []
    for prompt in PROMPTS:
        text = list(prompt)
        chosen = []
        # The whole text anew for every token: no cache that could hide a mistake.
        for _ in range(NEW):
            row = logits(text)[-1].log_softmax(-1)
            chosen.append(row.max().item())
            text.append(int(row.argmax()))
        rows = logits(prompt).log_softmax(-1)
        given = []
        # Row i predicts token i + 1.
        for i, token in enumerate(prompt[1:]):
            given.append(rows[i, token].item())
        found.append(Said(given, text[len(prompt) :], chosen))
    return found


def of_megalora(config: Any, factors: Path) -> list[Said]:
    """A function for ``run_ranks``: every rank gathers the logits, which are split over the
    vocabulary."""
    with built(config, factors) as run:
        chunk = run.model.chunks[0].eval()
        tp = run.model.groups.tp

        def logits(tokens: list[int]) -> Tensor:
            # Sequence parallelism divides the length by TP, which is 2 here. Attention is causal:
            # padding behind the text changes nothing in it.
            length = len(tokens) + len(tokens) % tp.size()
            ids = torch.tensor([tokens + [0] * (length - len(tokens))])
            out = chunk(ids, torch.arange(length)[None], None)
            # [1, length, vocabulary / TP]
            return gather_dim(out.contiguous(), 2, tp, tp.size())[0, : len(tokens)]

        return of_model(logits)


def of_peft(base: Path, folder: Path) -> list[Said]:
    model = stock_model(base, folder)
    return of_model(lambda tokens: model(torch.tensor([tokens])).logits[0])


def farthest(ours: list[Said], theirs: list[Said]) -> float:
    """The largest difference of a log-probability; greedy tokens must be the same."""
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens == other.tokens
        largest = max(
            largest,
            difference(one.prompt, other.prompt),
            difference(one.logprobs, other.logprobs),
        )
    return largest


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_vllm_peft_and_megalora_agree(
    case: str, client: Client, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    lora = LoRAConfig(**{"rank": 4, "alpha": 12.0, **CASES[case]})
    shape, adapted = plan(lora, ParallelConfig(), tiny)
    _, factors = random_adapter(tmp_path / "factors.safetensors", lora, tiny)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", adapted, shape, factors, str(tiny))
    # Two ranks, which split attention by TP and experts by EP.
    config = make_config(tiny, chats, tmp_path / "run", {"tp": 2, "ep": 2}, lora=lora)
    ours, *others = run_ranks(of_megalora, 2, config, tmp_path / "factors.safetensors")
    assert others == [ours], "tensor-parallel ranks say different things"
    peft = of_peft(tiny, tmp_path / "adapter")
    client.load("mine", tmp_path / "adapter")
    vllm = of_vllm(client, "mine")
    bare = of_vllm(client, str(tiny))
    found = {
        "vllm-peft": farthest(vllm, peft),
        "vllm-megalora": farthest(vllm, ours),
        "megalora-peft": farthest(ours, peft),
    }
    print(f"\n{case}: {found}")
    assert max(found.values()) <= ATOL, found
    # An adapter without effect would prove nothing.
    effect = 0.0
    for with_adapter, without in zip(vllm, bare, strict=True):
        effect = max(effect, difference(with_adapter.prompt, without.prompt))
    assert effect > 0.1


def test_two_adapters_and_the_base_in_one_batch(client: Client, tiny: Path, tmp_path: Path) -> None:
    expected = {str(tiny): of_vllm(client, str(tiny))}
    # Other ranks, scales and targets, so that the factors of one in place of the other's would not
    # even fit.
    options_of = {
        "first": {"use_rslora": True},
        "second": {"rank": 7, "target_modules": EXPERTS},
    }
    for seed, (name, options) in enumerate(options_of.items()):
        lora = LoRAConfig(**{"rank": 4, "alpha": 12.0, **options})
        shape, adapted = plan(lora, ParallelConfig(), tiny)
        _, factors = random_adapter(tmp_path / f"{seed}.safetensors", lora, tiny)
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, adapted, shape, factors, str(tiny))
        client.load(name, tmp_path / name)
        expected[name] = of_peft(tiny, tmp_path / name)
    with ThreadPoolExecutor(12) as pool:
        # The same questions of all three at once, four times over.
        answers = []
        for name in [*expected] * 4:
            answers.append((name, pool.submit(of_vllm, client, name)))
        for name, answer in answers:
            assert farthest(answer.result(), expected[name]) <= ATOL, name
    # Models that say the same could not be told apart.
    continuations = set()
    for said in expected.values():
        continuations.add(tuple(said[0].tokens + said[1].tokens))
    assert len(continuations) == 3


def test_a_merged_model_needs_no_adapter(tiny: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", tiny, 3, use_rslora=True)
    merge(folder, str(tiny), tmp_path / "merged")
    with (
        Server(tmp_path / "merged", log=tmp_path / "vllm.log", env=GPUS) as server,
        server.client() as client,
    ):
        merged = of_vllm(client, str(tmp_path / "merged"))
    # The sum W + scale * B A is rounded too.
    assert farthest(merged, of_peft(tiny, folder)) <= 2 * ATOL
