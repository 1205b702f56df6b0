"""vLLM gets a quantised folder as it was published, in a dtype that it takes beside codes.

What it then computes is compared in ``test_quantised.py``, which needs vLLM.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

from megalora.model.account import open_folder
from megalora.serve.server import Server
from megalora.verify import vllm
from tests.oracles import quantised as oracle
from tests.oracles.base import make_base
from tests.serve.adapters import ATTENTION, EXPERTS, make_adapter

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 1,
}  # fmt: skip


class Asked(Exception):
    """What a server was asked for, in place of the server."""


@pytest.mark.parametrize("form", ["int4", "fp8", "gptq"])
def test_vllm_gets_codes_as_published(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", arch="qwen3", **SIZES)
    codes = tmp_path / "codes"
    oracle.quantise_folder(base, codes, form)
    adapter = make_adapter(tmp_path / "adapter", base, 3, target_modules=[*ATTENTION, *EXPERTS])
    # The adapter fits the sizes that the codes stand for.
    command = Server(codes, {"mine": adapter}, python=sys.executable).command()
    assert command[command.index("--model") + 1] == str(codes.resolve())
    # vLLM takes the form from config.json, where another option would contradict it.
    assert "--quantization" not in command

    def server(folder: Path, adapters: Any, dtype: str | None = None) -> None:
        raise Asked(folder, dtype)

    monkeypatch.setattr(vllm, "Server", server)
    for folder, dtype in ((codes, "bfloat16"), (base, "float32")):
        with pytest.raises(Asked) as asked:
            vllm.verify_vllm(adapter, str(folder), atol=1e-3)
        assert asked.value.args == (folder, dtype)
    (note,) = vllm.served_dtype(open_folder(codes).scheme)[1]
    assert "rounding alone moves log-probabilities" in note
