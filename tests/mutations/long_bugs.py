"""Bugs of long rows on a GPU: which attention is taken, and checks that would not see a fault. The
same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

ATTENTION = "megalora/model/attention.py"
LONG = "benchmarks/gpu_long.py"
LONG_TEST = "tests/test_gpu_long.py"
WAITS = "tests/pretended/test_waits.py"

# fmt: off
LONG_BUGS: tuple[Bug, ...] = (
    bug(0, "flash attention that was asked for and never activated", "megalora/train/assemble.py",
        "    activate(config.model.attention)\n", "",
        "tests/train/test_assemble.py not_installed"),
    bug(0, "documents attended to one by one on a GPU", ATTENTION,
        "fits = query.element_size() == 2 and", "fits = query.element_size() == 1 and",
        f"{WAITS} flash_attention"),
    bug(0, "a plan of cuDNN's for each new length", ATTENTION,
        "and lengths[0] + 1 >= CUDNN_FROM and cut", "and lengths[0] + 1 >= CUDNN_FROM",
        "tests/model/test_documents.py suit_cudnn"),
    bug(0, "the host reads where a row's documents begin", ATTENTION,
        "        flash = self._takes_flash(query)\n",
        "        flash = self._takes_flash(query)\n        int(documents.positions[0])\n",
        f"{WAITS} cp2_packed"),
    bug(0, "a check that failed is not run again", LONG,
        'if not row["status"].startswith("FAILED"):', 'if row["status"]:',
        f"{LONG_TEST} run_again"),
    bug(0, "gradients that are no numbers pass", "benchmarks/long_training.py",
        "if not value <= limit:", "if value > limit:", f"{LONG_TEST} compared"),
    bug(0, "a copy to the host that is no wait", "benchmarks/long_training.py",
        'if "DtoH" in name:', 'if "HtoD" in name:', f"{LONG_TEST} copies_to_the_host"),
)
# fmt: on
