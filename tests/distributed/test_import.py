"""An adapter made elsewhere trains on under any layout: from the same loss as in PEFT, to the same
adapter."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megalora.adapters.files import PROBE
from megalora.adapters.resumable import import_adapter
from megalora.config import CheckpointConfig, LoRAConfig
from megalora.tiny import make_tiny
from megalora.train.loop import train
from tests.distributed.ranks import run_ranks
from tests.parity.runs import make_config, records
from tests.peft_warnings import IGNORED
from tests.whole_state import whole_state

pytestmark = IGNORED
LAYOUTS = {1: {}, 2: {"tp": 2, "ep": 2}, 4: {"tp": 2, "pp": 2, "etp": 2}}


@pytest.fixture(scope="module")
def stacked(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By stock PEFT: attention, router, and experts in its stacked layout, B not zero."""
    folder = tmp_path_factory.mktemp("stock")
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "gate"], rank_pattern={"o_proj": 5},
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.slow
def test_training_goes_on_from_it_under_every_layout(
    stacked: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    imported = import_adapter(stacked, tmp_path / "imported", str(tiny))
    # What ``megalora import`` prints for the config: the trained modules, ranks and alphas.
    lora = LoRAConfig(**imported.section)
    found = {}
    for world, parallel in LAYOUTS.items():
        run = tmp_path / f"on {world}"
        # check_base=loss compares the first loss with transformers and stock PEFT, and ends a run
        # that starts elsewhere.
        config = make_config(
            tiny,
            chats,
            run,
            parallel,
            lora=lora,
            steps=2,
            lr=1e-4,
            global_batch_size=8,
            micro_batch_size=2,
            check_base="loss",
        )
        config = replace(
            config, checkpoint=CheckpointConfig(dir=str(run), resume=str(tmp_path / "imported"))
        )
        run_ranks(train, world, config)
        found[world] = (records(run, "loss"), whole_state(run / "step_000002"))
        check_probe(tiny, run / "step_000002")
    losses, state = found.pop(1)
    start = whole_state(tmp_path / "imported")
    assert state.keys() == start.keys()
    for name, t in start.items():
        if name.startswith("param."):
            assert not torch.equal(state[name], t), f"{name} does not train"
    for others, theirs in found.values():
        assert others == pytest.approx(losses, rel=1e-6)
        # A step moves a parameter by at most 1e-4, so 1e-5 over two steps is a twentieth of it.
        for name, t in state.items():
            if name.startswith("param."):
                torch.testing.assert_close(theirs[name], t, rtol=0, atol=1e-5)


@torch.no_grad()
def check_probe(base: Path, checkpoint: Path) -> None:
    """What a checkpoint says of the probe text is what stock PEFT says with its adapter."""
    probe = json.loads((checkpoint / PROBE).read_text())
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(checkpoint)
    ).eval()
    tokens = torch.tensor(probe["tokens"])
    expected = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    # A few tokens would reach few experts, and in another dtype 1e-5 could not be asked for.
    assert len(tokens) > 32 and probe["dtype"] == "float32"
    torch.testing.assert_close(torch.tensor(probe["logprobs"]), expected, rtol=0, atol=1e-5)


def test_another_lora_section_is_refused(
    stacked: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    imported = import_adapter(stacked, tmp_path / "imported", str(tiny))
    # Same ranks, so that every tensor would fit: only the scale is another.
    wrong = LoRAConfig(**{**imported.section, "alpha": 7.0})
    config = make_config(tiny, chats, tmp_path / "run", {}, lora=wrong, steps=1)
    config = replace(
        config,
        checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=str(tmp_path / "imported")),
    )
    with pytest.raises(
        Exception,
        match=r"holds other adapters than this config's lora section describes: \d+ modules differ",
    ):
        run_ranks(train, 1, config)


def test_a_start_from_the_base_is_refused(
    stacked: Path, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    """By its name: everything else of the section is the import's."""
    imported = import_adapter(stacked, tmp_path / "imported", str(tiny))
    lora = LoRAConfig(**{**imported.section, "init": "pissa"})
    config = make_config(tiny, chats, tmp_path / "run", {}, lora=lora, steps=1)
    resume = CheckpointConfig(dir=str(tmp_path / "run"), resume=str(tmp_path / "imported"))
    with pytest.raises(Exception, match="lora.init=pissa initialises .*Leave lora.init out"):
        run_ranks(train, 1, replace(config, checkpoint=resume))


def test_another_base_is_refused(stacked: Path, tiny: Path, chats: Path, tmp_path: Path) -> None:
    """Of the same sizes, so that nothing else would notice."""
    imported = import_adapter(stacked, tmp_path / "imported", str(tiny))
    other = make_tiny(tmp_path / "other", seed=1)
    config = make_config(
        other, chats, tmp_path / "run", {}, lora=LoRAConfig(**imported.section), steps=1
    )
    config = replace(
        config,
        checkpoint=CheckpointConfig(dir=str(tmp_path / "run"), resume=str(tmp_path / "imported")),
    )
    with pytest.raises(Exception, match="was imported for the base .*, this run has model.path="):
        run_ranks(train, 1, config)
