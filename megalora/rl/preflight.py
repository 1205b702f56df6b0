"""Check a run that samples its completions before any rank starts."""

from collections.abc import Sequence
from pathlib import Path

from megalora.config import RunConfig
from megalora.preflight import check_run
from megalora.rl.environment import load_environment
from megalora.rl.rewards.load import check_rewards
from megalora.rl.server_places import check_places


def check_sampled_run(
    path: Path, overrides: Sequence[str], num_ranks: int, ranks_here: int
) -> RunConfig:
    """As ``check_run``, and look at what judges and at the places of servers.

    Args:
        num_ranks: of all hosts.
        ranks_here: of this host.
    Raises:
        ValueError: one line.
    """
    config = check_run(path, overrides, num_ranks, samples=True)
    # The user's modules are imported, and nothing in them is called.
    check_rewards(config.rl.weights)
    load_environment(config.rl.environment)
    check_places(config.rl.start_servers, ranks_here)
    return config
