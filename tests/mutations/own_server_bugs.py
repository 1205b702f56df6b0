"""Bugs in servers that a run starts, and in the recipe that has one. As in ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

PLACES = "megalora/rl/server_places.py"
OWN = "megalora/rl/own_servers.py"
OF_OWN = "tests/rl/test_own_servers.py"
KEPT = "megalora/rl/kept_servers.py"
SCALED = "megalora/rl/scaled_logprobs.py"
PUBLISHER = "megalora/serve/live/publisher.py"
OF_SCALED = "tests/rl/test_scaled_logprobs.py"
OF_PUBLISHER = "tests/serve/test_publisher.py"
SERVER = "megalora/serve/server.py"
GROUP = "megalora/serve/process_group.py"
OF_PROCESS = "tests/serve/test_server_process.py"
OF_SUMS = "tests/recipes/test_sums.py"

# fmt: off
OWN_SERVER_BUGS: tuple[Bug, ...] = (
    bug(0, "own servers: on the GPUs of the ranks", PLACES,
        "first = of_ranks + number * asked.gpus", "first = number * asked.gpus",
        f"{OF_OWN} behind_those"),
    bug(0, "own servers: all of them on the same GPUs", PLACES,
        "first = of_ranks + number * asked.gpus", "first = of_ranks",
        f"{OF_OWN} behind_those"),
    bug(0, "own servers: started although GPUs are too few", PLACES,
        "needed <= len(visible),", "True,", f"{OF_OWN} behind_those"),
    bug(0, "own servers: GPUs that the user has hidden", PLACES,
        "if named is None:", "if not named:", f"{OF_OWN} are_counted"),
    bug(0, "own servers: vLLM takes itself for a rank of the training", OWN,
        "if name.startswith(OF_RANKS)", "if False", f"{OF_OWN} command_follows"),
    bug(0, "own servers: of several GPUs one computes", OWN,
        "if len(gpus) > 1:", "if False:", f"{OF_OWN} command_follows"),
    bug(0, "own servers: slots for the smallest rank", OWN,
        "max_rank=max(", "max_rank=min(", f"{OF_OWN} command_follows"),
    bug(0, "own servers: no slot for stale versions", OWN,
        "max_loras=rl.staleness + 3", "max_loras=3", f"{OF_OWN} command_follows"),
    bug(0, "own servers: they outlive a run that fails", OWN,
        "        _each(servers, Server.stop)\n", "        pass\n", f"{OF_OWN} end_with_the_run"),
    bug(0, "own servers: one that does not start is taken for ready", OWN,
        "on_first_rank(lambda: done.result() if done else None,", "on_first_rank(lambda: None,",
        f"{OF_OWN} does_not_start"),
    bug(0, "own servers: a missing vLLM is said after the model was read", PLACES,
        "        vllm_python()\n", "", f"{OF_OWN} missing_vllm"),
    bug(0, "server: stopped when the guard is gone, whatever still listens", SERVER,
        "living = wait_until_ended(process.pid, KILLED_S)", "living = False",
        f"{OF_PROCESS} port_is_free"),
    bug(0, "server: waits for a zombie", GROUP,
        "and not has_ended:", "and True:", f"{OF_PROCESS} zombie"),
    bug(0, "own servers: one that ends is left", OWN,
        "with keep_running(servers, say):", "if True:", f"{OF_OWN} started_again"),
    bug(0, "own servers: one that ends is started without end", KEPT,
        "if len(starts) == STARTS:", "if len(starts) > STARTS:", f"{OF_OWN} started_again"),
    bug(0, "own servers: the log of one that ended is overwritten", KEPT,
        "return log.rename(place)", "return place", f"{OF_OWN} started_again"),
    bug(0, "own servers: raw log-probabilities at a temperature", OWN,
        "arguments += SCALED", "pass", f"{OF_OWN} command_follows"),
    bug(0, "temperature: raw log-probabilities of a server are taken", SCALED,
        "if factor < COLD**-0.5:", "if factor < 0.5:", f"{OF_SCALED} at_the_temperature"),
    bug(0, "temperature: a flat distribution counts as scaled", SCALED,
        "if warm < SMALLEST_SPREAD:", "if False:", f"{OF_SCALED} at_the_temperature"),
    bug(0, "live: a server that was started again is not examined", PUBLISHER,
        "if server.current is None and self.examine is not None:",
        "if newest.number == 5 and self.examine is not None:",
        f"{OF_PUBLISHER} catches_up"),
    bug(0, "sums: a base that is trained on prompts, too", "recipes/sums/base.py",
        "labels[place, len(prompt) : end] = torch.tensor(answer)",
        "labels[place, : len(answer)] = torch.tensor(answer)", f"{OF_SUMS} half_of_the_time"),
    bug(0, "sums: the curve's end is its last step alone", "recipes/sums/curve.py",
        "sum(rewards[-FEW:]) / len(rewards[-FEW:])", "rewards[-1] - 0.01", f"{OF_SUMS} began"),
)
