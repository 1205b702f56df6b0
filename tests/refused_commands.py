"""Run commands that a user's mistake ends, with an adapter to make mistakes about."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalora.adapters.write.form import write_adapter
from megalora.cli import main as cli
from megalora.config import LoRAConfig
from megalora.hf.json_file import read_hf_config
from megalora.lora.select import resolve
from megalora.lora.spec import tensor_name
from megalora.model.fields import model_shape

Said = Callable[..., str]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Runs a command, which must fail as a user's mistake, and returns its message."""
    monkeypatch.delenv("MEGALORA_TRACEBACK", raising=False)

    def run(*arguments: object, action: Callable[[list[str]], None] = cli.main) -> str:
        # What was written before this command is not its answer.
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.guarded(action, [str(a) for a in arguments])
        out, err = capfd.readouterr()
        assert (exit.value.code, out) == (2, "")
        # One message, said once, and nothing before it.
        assert err.startswith("megalora: ") and err.count("megalora: ") == 1
        assert "Traceback" not in err
        return err.removeprefix("megalora: ").removesuffix("\n")

    return run


@pytest.fixture
def adapter(tmp_path: Path, tiny: Path) -> Path:
    """An adapter of the tiny model with one linear outside the experts and one in them."""
    shape = model_shape(read_hf_config(tiny))
    adapted = resolve(LoRAConfig(rank=3, target_modules=["q_proj", "down_proj"]), shape)
    folder = tmp_path / "adapter"
    folder.mkdir()
    trained = {}
    for a in adapted:
        for module in a.hf_modules():
            trained[tensor_name(module, "A")] = torch.ones(a.shape("A"))
            trained[tensor_name(module, "B")] = torch.ones(a.shape("B"))
    write_adapter(folder, adapted, shape, trained, str(tiny))
    return folder
