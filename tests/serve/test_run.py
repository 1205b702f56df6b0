"""Run ``megalora serve`` with a made-up vLLM in a process of its own: what the user reads, from the
first line to the request to try."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megalora.adapters.files import CONFIG, PROBE
from megalora.adapters.latest import LATEST
from megalora.adapters.named_base import named_base, shared_base
from megalora.serve import phases as module
from megalora.serve.adapter_names import versioned
from megalora.serve.phases import PHASES, Phases
from megalora.serve.run import has_chat_template, request_to_try, serve
from megalora.serve.server import DEFAULT_TARGETS, Server
from tests.adapters.folders import edit_config
from tests.serve.adapters import make_adapter
from tests.waiting import Clock

ROOT = Path(__file__).parents[2]
# In place of vLLM's interpreter: it writes vLLM's log and serves the adapters it is given.
PROGRAM = f"""#!{sys.executable}
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.serve.fake_vllm import FakeVLLM, answer_of
from pathlib import Path
arguments = sys.argv[sys.argv.index("--lora-modules") + 1:]
server = FakeVLLM("", int(sys.argv[sys.argv.index("--port") + 1]))
for text in {[mark for mark, _ in PHASES]!r}:
    print("(Worker pid=1) INFO [a.py:1]", text, "...", flush=True)
for module in map(json.loads, arguments):
    server.adapters[module["name"]] = module["path"], answer_of(Path(module["path"]))
server.serve_forever()
"""


class Ready(Exception):
    """Ends ``serve``, which would wait for ever."""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "python"
    path.write_text(PROGRAM)
    path.chmod(0o755)
    monkeypatch.setenv("MEGALORA_VLLM_PYTHON", str(path))
    return path


def test_what_a_user_reads(program: Path, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "sums"
    checkpoint = make_adapter(run / "step_000007", tiny, 0, target_modules=["q_proj"])
    (run / LATEST).write_text("step_000007\n")
    # What the made-up server answers.
    (checkpoint / PROBE).write_text(
        json.dumps({"tokens": [4, 1], "logprobs": [-1.25], "dtype": "float32"})
    )
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("ready"):
            raise Ready

    with pytest.raises(Ready):
        serve([str(run)], None, say, port=0)
    model = versioned("sums", checkpoint)
    assert said[0] == f"{run} is a run folder: taking step_000007, its latest checkpoint"
    assert said[1] == f"base: {tiny}, from adapter_config.json"
    assert said[2].startswith(f"starting vLLM for {tiny} (float32); its log is ")
    # Each phase once, with whole seconds; two texts begin the one of the compiler.
    began = [line[9:] for line in said[3:-2]]
    expected = list(dict.fromkeys(phase for _, phase in PHASES))
    assert began == ["importing vLLM", *expected, "proving sums"]
    for line in said[3:-2]:
        assert line[5:9] == " s  " and line[:5].strip().isdigit()
    assert said[-2].startswith(f"{model}: moves log-probabilities")
    assert "NOT" not in said[-2]
    first, request, last = said[-1].splitlines()
    url = first.removeprefix("ready at ").split(". ")[0]
    assert first.endswith(f"Models: {tiny}, sums (now {model})")
    assert request == f"  {request_to_try(url, 'sums', chat=True, key=False)}"
    assert f"megalora swap {url} NAME=FOLDER" in last


def test_a_request_to_try_survives_the_shell() -> None:
    line = request_to_try("http://h:1", "it's $HOME", chat=True, key=True)
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://h:1/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == "it's $HOME" and body["messages"][0]["role"] == "user"
    # The shell puts the key in, so that it is not on the screen.
    assert '"Authorization: Bearer $VLLM_API_KEY"' in line
    words = shlex.split(request_to_try("http://h:1", "a", chat=False, key=False))
    assert words[1] == "http://h:1/v1/completions"
    assert set(json.loads(words[-1])) == {"model", "prompt", "max_tokens"}


def test_who_can_chat(tiny: Path, tmp_path: Path) -> None:
    assert has_chat_template(tiny, [])
    assert not has_chat_template(tmp_path, [])
    assert has_chat_template(tmp_path, ["--seed", "1", "--chat-template=x.jinja"])
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_chat_template(tmp_path, [])
    (tmp_path / "chat_template.jinja").touch()
    assert has_chat_template(tmp_path, [])


def test_the_base_is_the_adapters_own(tiny: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", tiny, 0, target_modules=["q_proj"])
    two = shutil.copytree(one, tmp_path / "two")
    assert shared_base({"a": one, "b": two}) == str(tiny)
    edit_config(two, base_model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"several bases \(a for {tiny}, b for .*; give --base"):
        shared_base({"a": one, "b": two})
    edit_config(two, base_model_name_or_path="/gone/base")
    with pytest.raises(
        ValueError, match=rf"in {two / CONFIG}=/gone/base: no such folder; give --base"
    ):
        named_base(two)
    edit_config(two, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="two does not name its base model; give --base"):
        named_base(two)


def test_phases_of_a_log_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "vllm.log"
    log.touch()
    clock = Clock(monkeypatch, module)
    said: list[str] = []
    phases = Phases(log, said.append)

    def written(text: str, after_s: float) -> list[str]:
        """What is said when the log grows by ``text``."""
        with log.open("a") as file:
            file.write(text)
        clock.now_s += after_s
        already = len(said)
        phases.look()
        return said[already:]

    assert said == ["    0 s  importing vLLM"]
    # Cut in the middle of a text; and a worker says what another one has said.
    assert written("INFO Starting to lo", 21) == []
    assert written("ad model x\n", 1) == ["   22 s  reading weights"]
    assert written("INFO Starting to load model x\nINFO non-default args: {}\n", 5) == []
    assert written("Starting torch.compile\nCapturing CUDA graphs: 0%", 61.6) == [
        "   89 s  compiling",
        "   89 s  capturing CUDA graphs",
    ]
    phases.begin("proving math")
    assert said[-1] == "   89 s  proving math"


def test_a_server_for_a_training_needs_no_adapter(
    program: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Server] = []

    def start(server: Server) -> Server:
        made.append(server)
        raise Ready

    monkeypatch.setattr(Server, "start", start)
    with pytest.raises(Ready):
        serve([], str(tiny), print, port=0, trainer="http://10.0.0.5", trained_rank=20, versions=3)
    (server,) = made
    assert server.environment()["MEGALORA_TRAINER"] == "http://10.0.0.5"
    assert (server.limits.max_rank, server.max_loras, server.max_cpu_loras) == (32, 3, 6)
    assert server.limits.target_modules == DEFAULT_TARGETS

    for adapters, options, said in (
        ([], {}, "needs an ADAPTER; without one, --base and the --trainer"),
        ([], {"base": None, "trainer": "http://h"}, "needs an ADAPTER"),
        ([], {"trainer": "10.0.0.5:3000"}, "--trainer=10.0.0.5:3000 is not the address"),
        ([], {"trainer": "http://h:1/adapters"}, "write it as http://HOST:PORT"),
        ([], {"trainer": "http://h", "versions": 1}, "--versions 1: a new version is loaded"),
    ):
        with pytest.raises(ValueError, match=said):
            serve(adapters, say=print, port=0, **{"base": str(tiny)} | options)  # type: ignore
