"""Check the rules of the code base that a machine can check: who may import whom, and how long
files and functions are."""

import ast
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRODUCT = ("megalora", "kernels/megalora_kernels")
FILES: dict[str, Path] = {}
"""Every product file by its path from the root."""
for _folder in PRODUCT:
    for _path in sorted((ROOT / _folder).rglob("*.py")):
        FILES[_path.relative_to(ROOT).as_posix()] = _path

OURS = ("megalora_kernels", "megalora", "recipes", "benchmarks", "docs", "launch", "tests")
MAY_IMPORT = {
    "kernels": {"megalora_kernels"},
    "megalora": {"megalora_kernels", "megalora"},
    "launch": {"megalora"},
    # Whole examples, which stand above the library.
    "recipes": {"megalora", "recipes"},
    # What a benchmark computes is tested.
    "tests": {"megalora_kernels", "megalora", "recipes", "tests", "benchmarks", "docs"},
    # A benchmark measures only what agrees with the oracle of the tests.
    "benchmarks": {"megalora_kernels", "megalora", "benchmarks", "tests"},
    # Scripts that write pages show what the other folders say.
    "docs": {"megalora", "benchmarks", "tests", "docs"},
}
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "user_error", "paths", "digests", "environment", "progress_bar", "atomic_folder", "comm",
        "cpu_device", "wording", "staged", "rendezvous", "first_rank", "megatron_patches", "host",
        "json_text", "launching", "file_lock", "process_table", "machine_folder", "versions",
        "tiny_folder", "thread_work", "fake_world",
    ),
    ("config",),
    ("parallel",),
    ("hf",),
    ("data",),
    ("model", "tiny"),
    ("lora",),
    ("adapters", "generate"),
    ("objectives",),
    ("serve",),
    ("verify", "chat"),
    ("train", "preflight", "planner"),
    ("evaluate", "rl"),
    ("bench", "report"),
    ("cli",),
    ("__main__",),
)  # fmt: skip
"""Packages and modules of megalora, lowest floor first: an import goes to the same floor or down,
wherever in a file it stands."""
MEGATRON_SEAM = (
    "megalora/host.py", "megalora/megatron_patches.py", "megalora/parallel.py", "megalora/model/",
    "megalora/lora/inject.py", "megalora/train/loop.py", "megalora/train/known_shapes.py",
    "megalora/train/schedule.py", "megalora/train/step.py",
    "megalora/train/optim.py",
)  # fmt: skip
WITHOUT_TORCH = (
    "megalora/__init__.py", "megalora/__main__.py", "megalora/cli/", "megalora/config/",
    "megalora/environment.py", "megalora/adapters/__init__.py", "megalora/adapters/files.py",
    "megalora/adapters/read/__init__.py", "megalora/adapters/read/options.py",
    "megalora/adapters/read/weights.py",
    "megalora/data/__init__.py", "megalora/data/messages.py", "megalora/data/sources.py",
    "megalora/data/pack.py", "megalora/data/logits_header.py",
    "megalora/lora/__init__.py", "megalora/lora/spec.py", "megalora/lora/trained_weight.py",
    "megalora/lora/whole.py",
    "megalora/lora/factor_checks.py",
    "megalora/lora/select.py",
    "megalora/lora/modules.py", "megalora/hf/patterns.py", "megalora/lora/ranks.py",
    "megalora/wording.py", "megalora/json_text.py",
    "megalora/paths.py", "megalora/launching.py", "megalora/user_error.py", "megalora/preflight.py",
    "megalora/hf/__init__.py", "megalora/hf/folder.py", "megalora/hf/json_file.py",
    "megalora/hf/safetensors.py", "megalora/hf/hub.py",
    "megalora/adapters/latest.py", "megalora/adapters/named_base.py", "megalora/chat/__init__.py",
    "megalora/adapters/merge_original.py", "megalora/adapters/trained_on.py",
    "megalora/digests.py", "megalora/hf/base_identity.py",
    "megalora/chat/command.py", "megalora/chat/session.py", "megalora/chat/terminal.py",
    "megalora/evaluate/__init__.py", "megalora/evaluate/__main__.py",
    "megalora/evaluate/report.py", "megalora/evaluate/request.py", "megalora/evaluate/rules.py",
    "megalora/generate/__init__.py", "megalora/generate/options.py",
    "megalora/hf/tensor_names.py", "megalora/model/__init__.py", "megalora/model/shape.py",
    "megalora/model/fields.py", "megalora/model/rope_fields.py", "megalora/model/account.py",
    "megalora/model/stored_tensors.py", "megalora/model/head_chunk.py",
    "megalora/model/quantised/__init__.py", "megalora/model/quantised/account.py",
    "megalora/model/quantised/compressed.py", "megalora/model/quantised/config.py",
    "megalora/model/quantised/scheme.py", "megalora/model/quantised/settings.py",
    "megalora/model/second_model.py", "megalora/hf/vocabulary.py",
    "megalora/model/projections.py", "megalora/model/formats/", "megalora/model/families/",
    "megalora/model/held.py",
    "megalora/train/__init__.py", "megalora/train/__main__.py", "megalora/train/on_ranks.py",
    "megalora/train/run_files.py",
    "megalora/train/run_logs.py", "megalora/train/expert_tokens.py", "megalora/report/",
    "megalora/train/trackers.py", "megalora/train/duration.py", "megalora/planner/",
    "megalora/train/logits_command.py",
    "megalora/atomic_folder.py", "megalora/tiny_folder.py",
    "megalora/rl/__init__.py", "megalora/rl/user_function.py", "megalora/rl/rewards/",
    "megalora/rl/episode.py", "megalora/rl/new_text.py", "megalora/rl/conversation.py",
    "megalora/rl/environment.py", "megalora/data/conversation.py", "megalora/data/template.py",
    "megalora/data/template_budget.py",
)  # fmt: skip
"""What checks a config answers in a fraction of a second: importing Megatron takes ten."""
TAKE_SECONDS = {"torch", "transformers", "megatron", "peft", "datasets"}
"""Packages that take from one to ten seconds to import."""
# Layers that asked torch.distributed for groups themselves could not be tested with others.
GROUPS_ARE_PASSED_IN = (
    "megalora/lora/",
    "megalora/model/",
    "megalora/data/",
    "megalora/planner/",
    "megalora/comm.py",
)
MAKES_GROUPS = {"init_process_group", "new_group", "new_subgroups", "init_device_mesh"}
# A file is named after the question that it answers; these answer none.
NO_SUCH_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 50
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
"""path:function; what stands here and is short enough by now fails the test."""


# Several tests ask the same of every file. Answers are kept; syntax trees would take a gigabyte.
@functools.cache
def imports(path: Path, *, at_start: bool = False) -> tuple[str, ...]:
    """Full names of the modules a file imports: all, or those that importing the file imports
    too."""
    found: list[str] = []
    body: list[ast.AST] = [ast.parse(path.read_text())]
    while body:
        node = body.pop()
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = _module_of(node, path)
            found.append(module)
            # ``from a import b``: b may be a module of its own, so both names count.
            for alias in node.names:
                found.append(f"{module}.{alias.name}")
        # Neither runs when the file is imported.
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        late |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not (at_start and late):
            body.extend(ast.iter_child_nodes(node))
    return tuple(found)


def _module_of(node: ast.ImportFrom, path: Path) -> str:
    """The full name of what ``from MODULE import ...`` names in a file."""
    if not node.level:
        return node.module or ""
    # One dot is the file's own package, every further one its parent.
    folders = path.relative_to(ROOT).parent.parts
    package = list(folders[: len(folders) + 1 - node.level])
    # The folder of kernels is not a package; megalora_kernels in it is.
    if package[:1] == ["kernels"]:
        package.pop(0)
    if node.module:
        package.append(node.module)
    return ".".join(package)


def packages(path: Path, *, at_start: bool = False) -> set[str]:
    """First parts of the names of all that a file imports."""
    return {name.split(".")[0] for name in imports(path, at_start=at_start)}


@functools.cache
def names(path: Path) -> set[str]:
    """Every attribute chain and bare name, as in ``torch.cuda.synchronize``, with all its
    beginnings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute | ast.Name):
            # torch, torch.cuda, torch.cuda.synchronize.
            parts = ast.unparse(node).split(".")
            found |= set(itertools.accumulate(parts, "{}.{}".format))
    return found


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines from ``def`` to the end, decorators left out)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_there_is_something_to_check() -> None:
    """Each way of looking finds what is known to be there: one that found nothing would pass
    everywhere."""
    for name in ("megalora/host.py", "megalora/lora/spec.py"):
        assert name in FILES
    assert "kernels/megalora_kernels/grouped_lora.py" in FILES
    found = set(imports(FILES["megalora/parallel.py"]))
    assert {"megalora.config", "megalora.config.ParallelConfig"} <= found
    # A relative import has its full name.
    assert "megalora_kernels.grouped_lora" in imports(FILES["kernels/megalora_kernels/__init__.py"])
    assert "torch.cuda" in names(FILES["megalora/host.py"])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependencies_point_one_way(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        ours = packages(path) & set(OURS)
        assert ours <= MAY_IMPORT[folder], f"{path} imports {sorted(ours - MAY_IMPORT[folder])}"


def test_kernels_need_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "megalora_kernels"} | sys.stdlib_module_names
    for name, path in FILES.items():
        if name.startswith("kernels/"):
            assert packages(path) <= allowed, f"{name} imports {sorted(packages(path) - allowed)}"


def test_megatron_is_imported_only_at_the_seam() -> None:
    for name, path in FILES.items():
        if not name.startswith(MEGATRON_SEAM):
            assert "megatron" not in packages(path), (
                f"{name} imports megatron; only {', '.join(MEGATRON_SEAM)} may"
            )


def test_only_parallel_reads_megatron_s_state() -> None:
    for name, path in FILES.items():
        if name != "megalora/parallel.py":
            assert "parallel_state" not in " ".join(imports(path)), (
                f"{name}: take the groups as an argument"
            )


def test_only_host_touches_cuda() -> None:
    for name, path in FILES.items():
        if name.startswith("megalora/") and name != "megalora/host.py":
            assert "torch.cuda" not in names(path) | set(imports(path)), (
                f"{name} names torch.cuda; ask megalora.host"
            )


def test_groups_are_passed_in() -> None:
    for name, path in FILES.items():
        if name.startswith(GROUPS_ARE_PASSED_IN):
            found = {n.rsplit(".", 1)[-1] for n in names(path)} & MAKES_GROUPS
            assert not found, (
                f"{name} calls {found}; process groups are made in host.py and parallel.py"
            )
        if name.startswith(("megalora/data/", "megalora/planner/")):
            assert "torch.distributed" not in imports(path), f"{name} imports torch.distributed"


def test_a_config_is_checked_without_importing_torch() -> None:
    for name, path in FILES.items():
        if name.startswith(WITHOUT_TORCH):
            heavy = packages(path, at_start=True) & TAKE_SECONDS
            assert not heavy, f"{name} imports {sorted(heavy)} as it is imported"
            # What it imports of ours may import none of these either.
            for module in imports(path, at_start=True):
                target = module.replace(".", "/") + ".py"
                if target in FILES:
                    assert target.startswith(WITHOUT_TORCH), (
                        f"{name} imports {target}, which is not in WITHOUT_TORCH"
                    )


def floor_of(module: str) -> int:
    """The floor of ``megalora.PART...``; raises ``KeyError`` for a part that FLOORS lacks."""
    parts = module.split(".")
    if len(parts) == 1:
        return 0
    for number, floor in enumerate(FLOORS):
        if parts[1] in floor:
            return number
    raise KeyError(f"FLOORS has no {parts[1]}")


def ours() -> dict[str, Path]:
    """Every product module by its full name."""
    modules = {}
    for name, path in FILES.items():
        stem = name.removeprefix("kernels/").removesuffix(".py").removesuffix("/__init__")
        modules[stem.replace("/", ".")] = path
    return modules


def test_imports_go_down() -> None:
    # The vLLM plug-in runs inside vLLM's process, below everything of ours.
    modules = ours()
    upward = []
    for module, path in modules.items():
        if module.startswith("megalora.") and not module.startswith("megalora.serve.vllm_cpu"):
            for other in set(imports(path)) & modules.keys():
                if other.startswith("megalora.") and floor_of(other) > floor_of(module):
                    upward.append(f"{module} imports {other}")
    assert not upward


def test_no_module_imports_itself_round_about() -> None:
    """Depth first over all imports, those inside functions too."""
    modules = ours()
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        edges[name] = set()
        for imported in modules.keys() & set(imports(path)):
            # ``from . import tiles`` names the package, which is there by then.
            if not name.startswith(f"{imported}."):
                edges[name].add(imported)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        """``trail``: the modules that led here, each imported by the one before."""
        circle = (*trail[trail.index(module) :], module) if module in trail else ()
        assert not circle, f"a circle: {' -> '.join(circle)}"
        if module not in done:
            for other in sorted(edges[module] - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for module in modules:
        visit(module, ())
    # What two files import by hand: a walk over nothing would find no circle either.
    assert edges["megalora.model.families.rules"] == set()
    assert edges["megalora.model.families.family"] == {
        "megalora.model.families.rules", "megalora.model.projections", "megalora.model.shape",
    }  # fmt: skip


PARSE_JSON_THEMSELVES = {
    "megalora/json_text.py",
    # A text between quotes that a template has printed, which may hold control characters.
    "megalora/data/marks.py",
    # Packages of their own, which cannot import megalora: what they read, megalora has written.
    "megalora/serve/vllm_cpu/vllm_cpu_moe_lora/wire.py", "kernels/megalora_kernels/tuned_table.py",
}  # fmt: skip


def test_json_is_parsed_in_one_place() -> None:
    """Within the limits of ``json_text.py``: a second reader would have none."""
    parsers = {"json.load", "json.loads", "json.JSONDecoder"}
    found = set()
    for name, path in FILES.items():
        # httpx has a reader of its own, ``response.json()``.
        calls = {
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        }
        if calls & parsers or any(call.endswith(".json") for call in calls):
            found.add(name)
    assert found == PARSE_JSON_THEMSELVES


def test_no_file_is_too_long() -> None:
    long = set()
    for name, path in FILES.items():
        if len(path.read_text().splitlines()) > MAX_FILE_LINES:
            long.add(name)
    # Equal: a file that is short by now must leave the list of exceptions.
    assert long == LONG_FILES


def test_no_function_is_too_long() -> None:
    long = set()
    for name, path in FILES.items():
        for function, num_lines in functions(path):
            if num_lines > MAX_FUNCTION_LINES:
                long.add(f"{name}:{function}")
    assert long == LONG_FUNCTIONS


def test_every_file_is_named_after_what_is_in_it() -> None:
    assert not NO_SUCH_NAMES & {path.name for path in FILES.values()}


def test_every_file_says_what_it_is_for() -> None:
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"
