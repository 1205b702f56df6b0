"""Bugs in serving by name: which version a name means, what a swap leaves, and what a user reads.
The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

NAMES = "megalora/serve/vllm_cpu/vllm_cpu_moe_lora/names.py"
SWAP = "megalora/serve/swap.py"
RUN = "megalora/serve/run.py"
PHASES = "megalora/serve/phases.py"
BY_NAME = "tests/serve/test_names.py"
SWAPPED = "tests/serve/test_swap_command.py"
RUNS = "tests/serve/test_run.py"

# fmt: off
SERVE_BUGS: tuple[Bug, ...] = (
    bug(0, "a name means its first version", NAMES,
        "for model in reversed(loaded):", "for model in loaded:", f"{BY_NAME} loaded_last"),
    bug(0, "a name means all names that it begins", NAMES,
        "if name_of(model) == name:", "if model.startswith(name):", f"{BY_NAME} loaded_last"),
    bug(0, "a request without a model is an adapter's", NAMES,
        "if not name or name in loaded:", "if name in loaded:", f"{BY_NAME} loaded_last"),
    bug(0, "a name looked up once, as the request arrives", NAMES,
        "get_adapter(self, by_id(self.models, request), *args, **kwargs)",
        "get_adapter(self, request, *args, **kwargs)", f"{BY_NAME} loses_nothing"),
    bug(0, "a request that loses its name", NAMES,
        "named = copy.copy(request)", "named = request", f"{BY_NAME} loses_nothing"),
    bug(0, "an unknown name told of the base alone", NAMES,
        "if answer is not None and answer.error.code == NOT_FOUND:", "if False:",
        f"{BY_NAME} told_what_there_is"),
    bug(0, "an adapter under the base's name", NAMES,
        "    if models.is_base_model(request.model):\n        return request\n", "",
        f"{BY_NAME} the_base_keeps_its_name"),
    bug(0, "a plain name counted as an adapter", "megalora/serve/api.py",
        "if parent is not None and parents.get(parent) is not None:", "if False:",
        f"{BY_NAME} no_versions"),
    bug(0, "an unproved version put in service", SWAP,
        "if not proof.ok and not unproven:", "if False:", f"{SWAPPED} not_proved_goes_again"),
    bug(0, "a version left behind when its proof cannot be had", SWAP,
        "    try:\n        yield trial\n    finally:\n        client.unload(trial)",
        "    yield trial\n    client.unload(trial)", f"{SWAPPED} leaves_the_old"),
    bug(0, "requests get a version before it is proved", SWAP,
        'f"{name}.trial-{secrets.token_hex(4)}"', "name", f"{SWAPPED} leaves_the_old"),
    bug(0, "a served version tried again under another name", SWAP,
        "if model in older:", "if False:", f"{SWAPPED} one_line"),
    bug(0, "swapped into the user's folder, not the server's store", SWAP,
        "place.name == served.id and", "False and", f"{SWAPPED} one_line"),
    bug(0, "a damaged probe found after the swap", SWAP,
        "    read_probe(folder)\n", "", f"{SWAPPED} leaves_the_old"),
    bug(0, "a run's checkpoint swapped without its step", SWAP,
        "folder.name if CHECKPOINT_NAME.fullmatch(folder.name) else None", "None",
        f"{SWAPPED} latest_checkpoint"),
    bug(0, "latest that names nothing taken for a broken adapter", "megalora/adapters/latest.py",
        "if not named.is_dir():", "if False:", f"{SWAPPED} latest_checkpoint"),
    bug(0, "the first adapter's base for all", "megalora/adapters/named_base.py",
        "if len(set(bases.values())) > 1:", "if False:", f"{RUNS} adapters_own"),
    bug(0, "the key on the screen's command line", RUN,
        "'\"Authorization: Bearer $VLLM_API_KEY\"'",
        "shlex.quote('Authorization: Bearer $VLLM_API_KEY')", f"{RUNS} survives_the_shell"),
    bug(0, "a request to try that the shell breaks", RUN,
        "shlex.quote(body)", "f\"'{body}'\"", f"{RUNS} survives_the_shell"),
    bug(0, "a phase missed where two reads cut its text", PHASES,
        "self._text = self._text[-_LONGEST:]", 'self._text = ""', f"{RUNS} log_that_grows"),
    bug(0, "a phase that begins again", PHASES,
        "self._next = place + 1", "pass", f"{RUNS} log_that_grows"),
    bug(0, "checkpoints served under the folder's name whatever is asked",
        "megalora/serve/live_sync.py", "self.name = name or run_name(run)",
        "self.name = run_name(run)", "tests/serve/test_live_sync.py name_that_was_chosen"),
)
# fmt: on
