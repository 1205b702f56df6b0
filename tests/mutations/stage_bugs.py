"""Bugs in pipeline stages that are not equal. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

PARALLEL = "megalora/config/parallel.py"
BUILD = "megalora/model/build.py"
WEIGHTS = "megalora/planner/weights.py"
DIVISIONS = "megalora/planner/divisions.py"
LAYOUTS = "tests/planner/test_layouts.py"
RUNS = "megalora/bench/runs.py"
TEST = "tests/test_stage_layers.py"
GRID = "tests/parity/test_grid.py"
SHAPE = "tests/model/test_shape.py"
DRY = "tests/planner/test_dryrun.py"
PEAK = "tests/planner/test_peak.py"

# fmt: off
STAGE_BUGS: tuple[Bug, ...] = (
    bug(0, "the embedding counted twice", PARALLEL, "        sizes[0] -= 1\n",
        "        sizes[0] -= 2\n        sizes[1 % num_chunks] += 1\n", f"{TEST} division"),
    bug(0, "a head that is no layer", PARALLEL,
        "        sizes[-1] -= 1\n", "        sizes[0] -= 1\n", f"{TEST} division"),
    bug(0, "chunks of a stage side by side", PARALLEL, "of_stage[number % self.pp]",
        "of_stage[number // self.vpp]", f"{TEST} megatron_lays"),
    bug(0, "an embedding in a layer's place", BUILD,
        'chunks[0].insert(0, "embedding")', 'chunks[0][0] = "embedding"', f"{TEST} megatron_lays"),
    bug(0, "unequal stages forgotten", BUILD,
        "pipeline_model_parallel_layout=pipeline_layout(p, shape.num_layers),\n", "\n",
        f"{GRID} three_unequal"),
    bug(0, "a chunk's own layer numbers", "megalora/model/backend.py",
        "range(first, first + count)", "range(count)", f"{GRID} three_unequal"),
    bug(0, "a layer checked in a pipeline's stages", "megalora/model/host_layer.py",
        '    "pipeline_model_parallel_layout": None,\n', "", "tests/verify/test_layer.py unequal"),
    bug(0, "stages of another number of layers", "megalora/model/shape.py",
        "total == self.num_layers,", "True,", f"{SHAPE} refused"),
    bug(0, "layers to recompute bounded by the mean", "megalora/model/shape.py",
        "p.largest_stage(self.num_layers)", "self.num_layers // p.pp", f"{SHAPE} largest"),
    bug(0, "a stage's chunks planned side by side", WEIGHTS, "range(stage, len(pieces), p.pp)",
        "range(stage * p.vpp, (stage + 1) * p.vpp)", f"{DRY} bytes_of_a_rank"),
    bug(0, "a stage known by the size of its chunk", "megalora/planner/pass_bytes.py",
        "chunks[0].stage", "chunks[0].layers.start // len(chunks[0].layers)",
        f"{PEAK} stage_layers"),
    bug(0, "a loss beside all that other chunks keep", "megalora/planner/pass_bytes.py",
        "_less((0, loss, logits), freed)", "_less((0, loss, logits), 0)",
        f"{PEAK} stage_layers"),
    bug(0, "an evaluation in a training's stages", "megalora/evaluate/request.py",
        "for option in fields(ParallelConfig):",
        "for option in fields(ParallelConfig)[:-1]:",
        "tests/evaluate/test_request.py layout_of_its_own"),
    bug(0, "a search of equal stages alone", DIVISIONS,
        "elif vpp == 1 or (num_layers + 2) % parts == 0:", "elif False:", f"{LAYOUTS} no_power"),
    bug(0, "chunks of any size tried", DIVISIONS,
        "elif vpp == 1 or (num_layers + 2) % parts == 0:", "else:", f"{LAYOUTS} no_power"),
    bug(0, "a planned config without its stages", "megalora/planner/report.py",
        "parallel=layout.parallel, lora",
        "parallel=replace(layout.parallel, stage_layers=None), lora",
        "tests/planner/test_answers.py unequal_stages"),
    bug(0, "a benchmark without its stages", RUNS,
        'overrides.append(f"parallel.stage_layers={stages}")', "pass",
        "tests/bench/test_layouts_and_status.py parse_layout"),
    bug(0, "a config's stages for other sizes", RUNS,
        'not {"pp", "vpp"} & named.keys()', "True",
        "tests/bench/test_layouts_and_status.py stages_are_kept"),
)
# fmt: on
