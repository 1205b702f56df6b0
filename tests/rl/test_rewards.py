"""What rewards give, where they run, and what happens where they fail."""

import asyncio
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalora.rl.rewards.failures import Failures
from megalora.rl.rewards.judge import Judged, Rewards
from megalora.rl.rewards.load import as_number, check_rewards, load_reward
from tests.jsonl import read_jsonl
from tests.waiting import wait_until

GSM8K = Path(os.environ.get("GSM8K", "no such folder"))

MINE = '''
import asyncio, os, signal, subprocess, sys, time

def length(prompt, completion, row):
    print("a line of the user's", flush=True)
    return len(completion) * row.get("scale", 1)

def of_prompt(prompt, completion, row):
    return prompt == "asked" and row["answer"] in completion

def pick(prompt, completion, row):
    """What the row says, to see how it is taken."""
    return eval(completion)

def torch_is_here(prompt, completion, row):
    return "torch" in sys.modules or "numpy" in sys.modules

def process(prompt, completion, row):
    return os.getpid()

def hang(prompt, completion, row):
    if completion != "hang":
        return 1.0
    with open(row["pid"], "w") as file:
        child = subprocess.Popen(["sleep", "900"])
        print(os.getpid(), child.pid, file=file)
    while True:
        time.sleep(1)

def alarm(prompt, completion, row):
    """As math-verify: SIGALRM works on the main thread alone."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    return True

def die(prompt, completion, row):
    if completion == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if completion == "exit":
        sys.exit(3)
    return 1

async def later(prompt, completion, row):
    await asyncio.sleep(float(completion))
    return 0.25

async def deaf(prompt, completion, row):
    """Goes on when it is told to end."""
    for _ in range(2):
        try:
            await asyncio.sleep(0.4)
        except asyncio.CancelledError:
            pass
    return 1.0

class Judge:
    async def __call__(self, prompt, completion, row):
        return 0.5

judge = Judge()
two = lambda prompt, completion: 0.0
value = 3
'''


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's in the current folder, found as ``python -m`` finds it."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    sys.modules.pop("mine", None)
    return tmp_path


def judge(
    weights: dict[str, float], *completions: str, row: dict[str, Any] | None = None, **options: Any
) -> list[Judged]:
    """Each completion judged, the one after the other."""

    async def run() -> list[Judged]:
        async with Rewards(weights, workers=options.pop("workers", 1), **options) as rewards:
            expected = (row or {}).get("answer", "")
            return [await rewards.judge("asked", c, expected, row or {}) for c in completions]

    return asyncio.run(run())


def test_a_weighted_sum_of_all_kinds() -> None:
    weights = {
        "mine:length": 0.5, "mine.py:of_prompt": 2.0, "mine:later": 4.0, "mine:judge": 8.0,
        "last-number": 16.0, "exact": 32.0, r"regex:\d": 64.0, "matches:^0\\.0": -128.0,
    }  # fmt: skip
    (judged,) = judge(weights, "0.01", row={"answer": "0.01", "scale": 3})
    # Different weights, of which every sum is another number.
    wanted = {
        "mine:length": 12.0, "mine.py:of_prompt": 1.0, "mine:later": 0.25, "mine:judge": 0.5,
        "last-number": 1.0, "exact": 1.0, r"regex:\d": 1.0, "matches:^0\\.0": 1.0,
    }  # fmt: skip
    assert judged.by_name == wanted
    assert judged.total == 6 + 2 + 1 + 4 + 16 + 32 + 64 - 128


def test_plain_functions_run_elsewhere_without_torch() -> None:
    here, again = judge({"mine:process": 1.0, "mine:torch_is_here": 1.0, "mine:alarm": 1.0}, "", "")
    assert here.by_name["mine:process"] != os.getpid()
    # One process for both, which is clean although torch is imported here.
    assert "torch" in sys.modules
    assert here.by_name == again.by_name
    assert here.by_name["mine:torch_is_here"] == 0.0


def test_none_leaves_a_completion_out() -> None:
    judged, other = judge({"mine:pick": 1.0, "mine:length": 1.0}, "None", "2")
    assert judged == Judged(None, {"mine:length": 4.0})
    assert other.total == 3.0


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (None, None), (True, 1.0), (False, 0.0), (3, 3.0), (-0.5, -0.5),
        (np.float32(0.25), 0.25), (np.bool_(True), 1.0), (np.int64(7), 7.0),
    ],
)  # fmt: skip
def test_what_a_reward_may_give(value: Any, number: float | None) -> None:
    taken = as_number(value)
    assert taken == number and type(taken) in (float, type(None))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "gave nan; a reward is a finite number"),
        (np.float32("nan"), "gave nan"),
        (-math.inf, "gave -inf"),
        # No float holds it.
        (10**400, "gave 1000"),
        ("1.0", "gave str '1.0'; a reward is a number, True, False, or None to leave the"),
        ([1.0], "gave list [1.0]"),
        (np.ones(1), "gave ndarray array"),
        (1j, "gave complex 1j"),
    ],
)
def test_what_a_reward_may_not_give(value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        as_number(value)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("path", "completion", "message"),
    [
        ("mine:pick", "float('nan')", "gave nan; a reward is a finite number"),
        ("mine:pick", "'yes'", "gave str 'yes'"),
        ("mine:pick", "1 / 0", "ZeroDivisionError: division by zero (<string>, line 1)"),
        ("mine:die", "die", "its process ended (exit code -9)"),
        ("mine:die", "exit", "SystemExit: 3 (mine.py, line 39)"),
        ("mine:later", "x", "ValueError: could not convert string to float: 'x' (mine.py, line"),
        ("mine:later", "60", "took longer than 0.3 s"),
        ("mine:deaf", "", "took longer than 0.3 s"),
        ("last-number", "3", "the expected answer has no number: 'no answer'"),
        (r"regex:(\d)", "3", r"the expected answer has no match of '(\\d)': 'no answer'"),
    ],
)
def test_a_failure_names_the_reward_and_the_row(path: str, completion: str, message: str) -> None:
    row = {"question": "why?", "answer": "no answer"}
    limit_s = 0.3 if message.startswith("took") else 600
    with pytest.raises(ValueError) as caught:
        judge({path: 1.0}, completion, row=row, timeout_s=limit_s)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"rl.rewards: {path}: {message}")
    assert first.endswith("; row {'answer': 'no answer', 'question': 'why?'}")
    assert second == "  Set rl.reward_failure=leave_out to go on without it."


def test_a_pool_goes_on_after_a_call_that_hangs() -> None:
    failures = Failures("leave_out", lambda line: None)

    async def run() -> list[Judged]:
        weights = {"mine:hang": 1.0}
        async with Rewards(weights, workers=1, timeout_s=0.1, failures=failures) as rewards:
            first = await rewards.judge("", "hang", "", {"pid": "pids"})
            # A slow machine may need longer for an answer.
            rewards._pool.timeout_s = 600
            return [first, await rewards.judge("", "", "", {})]

    hung, other = asyncio.run(run())
    assert (hung.total, hung.failed) == (None, True)
    assert (other.total, other.failed) == (1.0, False)
    assert failures.counts == {"mine:hang": 1}


@pytest.mark.slow
def test_calls_that_hang_end_their_processes_and_no_other() -> None:
    """Six calls of which two hang, in two processes: four are judged, two are left out."""
    said: list[str] = []
    failures = Failures("leave_out", said.append)

    async def run() -> list[Judged]:
        weights = {"mine:hang": 1.0}
        # Far above what a call takes that does not hang.
        async with Rewards(weights, workers=2, timeout_s=5.0, failures=failures) as rewards:
            completions = ("hang", "", "", "hang", "", "")
            calls = [
                rewards.judge("", c, "", {"pid": f"pids{i}"}) for i, c in enumerate(completions)
            ]
            return await asyncio.gather(*calls)

    judged = asyncio.run(run())
    left_out = Judged(None, {}, failed=True)
    right = Judged(1.0, {"mine:hang": 1.0})
    assert judged == [left_out, right, right, left_out, right, right]
    assert failures.counts == {"mine:hang": 2}
    line = "left out: rl.rewards: mine:hang: took longer than 5 s; row {'pid': 'pids"
    assert len(said) == "\n".join(said).count(line) == 2
    # The function's own child is gone with its process.
    pids = Path("pids0").read_text().split() + Path("pids3").read_text().split()
    assert len(pids) == 4
    for pid in pids:
        _gone(int(pid))


def _gone(pid: int) -> None:
    wait_until(lambda: not _lives(pid))


def _lives(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    # One that has ended and that nobody has asked about yet is a zombie.
    return status.rpartition(")")[2].split()[0] != "Z"


def test_a_cancelled_call_is_not_answered_to_the_next_one() -> None:
    async def run() -> Judged:
        async with Rewards({"mine:pick": 1.0}, workers=1) as rewards:
            slow = asyncio.create_task(rewards.judge("", "time.sleep(0.4) or 1", "", {}))
            await asyncio.sleep(0.1)
            slow.cancel()
            return await rewards.judge("", "2", "", {})

    assert asyncio.run(run()).total == 2.0


def test_failures_that_repeat_are_counted_and_said_less_often() -> None:
    said: list[str] = []
    failures = Failures("leave_out", said.append)
    for _ in range(40):
        failures.met("rl.rewards", "f", "gave nan", {"a": 1})
    assert failures.counts["f"] == 40
    assert len(said) == 5 + 3
    assert said[-1] == "left out: rl.rewards: f: 32 completions so far, last: gave nan"


def test_no_process_is_started_that_nothing_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncio, "create_subprocess_exec", None)
    (judged,) = judge({"last-number": 1.0, "mine:judge": 1.0}, "so 3", row={"answer": "3"})
    assert judged.total == 1.5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"last-numbr": 1}, "rl.rewards: 'last-numbr' is not a reward; there are last-number, ex"),
        ({"regex:(": 1}, "rl.rewards: regex:(: not a regular expression"),
        ({"matches:(": 1}, "rl.rewards: matches:(: not a regular expression"),
        ({"matches:": 1}, "rl.rewards: matches:: needs a pattern"),
        ({"mine:": 1}, "rl.rewards: 'mine:' is not module:function or file.py:function"),
        ({"mine:lenth": 1}, "rl.rewards: mine:lenth: has no function lenth; did you mean length"),
        ({"mine:x": 1}, "rl.rewards: mine:x: has no function x; it has length, of_prompt, pick, ."),
        ({"mine:value": 1}, "rl.rewards: mine:value: value is not a function"),
        ({"mine:two": 1}, "rl.rewards: mine:two: it is called as two(prompt, completion, row): t"),
        ({"none.py:f": 1}, "rl.rewards: none.py:f: there is no file none.py"),
        ({"no_such:f": 1}, "rl.rewards: no_such:f: cannot be imported: ModuleNotFoundError: No mo"),
        ({"broken.py:f": 1}, "rl.rewards: broken.py:f: cannot be imported: KeyError: 'a' (broken."),
        ({"wrong.py:f": 1}, "rl.rewards: wrong.py:f: cannot be imported: SyntaxError: invalid syn"),
        ({"mine:length": True}, "rl.rewards: the weight of mine:length is bool True; give a n"),
        ({"mine:length": 0.0}, "rl.rewards: the weight of mine:length is 0.0; nothing to learn fr"),
        ({"mine:length": math.nan}, "rl.rewards: the weight of mine:length is nan"),
    ],
)  # fmt: skip
def test_paths_that_name_no_reward(mine: Path, weights: dict[str, Any], message: str) -> None:
    (mine / "broken.py").write_text("\n{}['a']\n")
    (mine / "wrong.py").write_text("def f(:\n")
    with pytest.raises(ValueError) as caught:
        check_rewards(weights)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_files_of_the_same_name_are_two_modules(mine: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (mine / folder).mkdir()
        (mine / folder / "beside.py").write_text("one = 1\n")
        text = f"import beside\ndef f(p, c, r): return {value} * beside.one\n"
        (mine / folder / "json.py").write_text(text)
    # A file may have the name of a module that others import.
    one, two = (load_reward(f"{folder}/json.py:f").judge("", "", "", {}) for folder in "ab")
    assert (one, two) == (1, 2)
    assert json.loads("3") == 3


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("6 * 7 = 42", 1.0), ("#### 42", 1.0), (r"\boxed{42}, 7 days", 1.0), ("42 or 43", 0.0),
        ("-42", 0.0), ("42.0", 1.0), ("", 0.0), ("no idea", 0.0),
    ],
)  # fmt: skip
def test_last_number(completion: str, reward: float) -> None:
    (judged,) = judge({"last-number": 1.0}, completion, row={"answer": "7 * 6 = 42\n#### 42"})
    assert judged.total == reward


@pytest.mark.skipif(not (GSM8K / "test.jsonl").is_file(), reason="no GSM8K: set GSM8K")
def test_every_answer_of_gsm8k_is_right_and_the_next_one_s_is_not() -> None:
    rows = read_jsonl(GSM8K / "test.jsonl")
    reward = load_reward("last-number").judge
    right = sum(reward("", row["answer"], row["answer"], row) for row in rows)
    assert right == len(rows) == 1319
    # The number that the data set's own format marks, read apart from our rule.
    golds = [row["answer"].split("#### ")[1].replace(",", "") for row in rows]
    for at, row in enumerate(rows):
        other = golds[at - 1]
        given = f"So 3 of 4 make it \\boxed{{{other}}}, in 5 steps."
        assert reward("", given, row["answer"], row) is (float(other) == float(golds[at]))


def test_a_missing_math_verify_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError) as caught:
        check_rewards({"math-verify": 1.0})
    wanted = "rl.rewards: math-verify is not installed: pip install 'megalora[math]'"
    assert str(caught.value) == wanted


@pytest.mark.slow
def test_math_verify() -> None:
    """It refuses threads other than the main one, and takes seconds to import."""
    pytest.importorskip("math_verify")
    cases = {
        r"\frac{1}{2}": {r"so $0.5$": 1.0, r"\boxed{\frac{2}{4}}": 1.0, "$2$": 0.0, "": 0.0},
        r"(-\infty, 3]": {r"$x \in (-\infty, 3]$": 1.0, "$3$": 0.0},
        "half of it\n#### 18": {"The answer is 18.": 1.0, "$19$": 0.0},
        r"thus $\boxed{3\sqrt{2}}$": {r"$\sqrt{18}$": 1.0, r"$2\sqrt{3}$": 0.0},
    }

    async def run() -> None:
        async with Rewards({"math-verify": 1.0}, workers=1) as rewards:
            for expected, answers in cases.items():
                for answer, wanted in answers.items():
                    judged = await rewards.judge("", answer, expected, {})
                    assert judged.total == wanted, (expected, answer)
            with pytest.raises(ValueError, match="math-verify finds nothing in the expected"):
                await rewards.judge("", "$1$", "", {})

    asyncio.run(run())


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_behind(mine: Path) -> None:
    """The run gets SIGKILL while a reward hangs, so that it can end nothing itself."""
    script = (
        "import asyncio\nfrom megalora.rl.rewards.judge import Rewards\n"
        "async def run():\n"
        "    async with Rewards({'mine:hang': 1.0}, timeout_s=600) as rewards:\n"
        "        await rewards.judge('', 'hang', '', {'pid': 'pids'})\n"
        "asyncio.run(run())\n"
    )
    run = subprocess.Popen([sys.executable, "-c", script])
    place = mine / "pids"
    wait_until(lambda: place.is_file() and place.read_text().endswith("\n"))
    run.kill()
    run.wait()
    for pid in place.read_text().split():
        _gone(int(pid))
