"""Say where servers run that a run starts: which GPUs each of them gets. Needs no torch."""

import os
import subprocess

from megalora.config.checks import require
from megalora.config.rl import StartServers
from megalora.environment import SHARE_GPU
from megalora.serve.vllm_python import vllm_python

VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_places(asked: StartServers | None, num_ranks: int) -> None:
    """Raise ``ValueError`` where servers cannot be started beside so many ranks of this host."""
    if asked is not None:
        vllm_python()
        gpus_of_servers(asked, num_ranks)


def gpus_of_servers(asked: StartServers, num_ranks: int) -> list[list[str]]:
    """Names of each server's GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them: those behind the GPUs
    of the host's ranks, which take theirs from the front.

    Raises:
        ValueError: there are too few.
    """
    if not asked.gpus:
        return [[]] * asked.count
    visible = visible_gpus()
    # Ranks that share a GPU share the first one.
    of_ranks = 1 if os.environ.get(SHARE_GPU) == "1" else num_ranks
    needed = of_ranks + asked.count * asked.gpus
    require(
        needed <= len(visible),
        f"rl.start_servers: {of_ranks} GPUs of the ranks and {asked.count} x {asked.gpus} of"
        f" servers are {needed}, and this host shows {len(visible)}. Start fewer ranks (--nproc) or"
        " servers; rl.start_servers.gpus=0 starts vLLM's build for CPUs",
    )
    divided = []
    for number in range(asked.count):
        first = of_ranks + number * asked.gpus
        divided.append(visible[first : first + asked.gpus])
    return divided


def visible_gpus() -> list[str]:
    """The GPUs that processes started here see: numbers, or what the user has named."""
    named = os.environ.get(VISIBLE)
    if named is None:
        return [str(number) for number in range(_count_gpus())]
    gpus: list[str] = []
    for name in named.split(","):
        # CUDA looks no further than the first that it does not know, such as -1.
        if not name.strip() or name.strip().startswith("-"):
            break
        gpus.append(name.strip())
    return gpus


def _count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    # Parts of a GPU stand below it, indented.
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
