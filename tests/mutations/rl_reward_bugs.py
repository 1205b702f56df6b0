"""Bugs in rewards and environments. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

JUDGE, LOAD, POOL, WORKER, FAILURES = (
    f"megalora/rl/rewards/{name}.py" for name in ("judge", "load", "pool", "worker", "failures")
)
BUILTIN = "megalora/rl/rewards/builtin.py"
FUNCTION = "megalora/rl/user_function.py"
RULES = "megalora/evaluate/rules.py"
CLIENT, ENVIRONMENT, NEW_TEXT = (
    f"megalora/rl/{name}.py" for name in ("conversation", "environment", "new_text")
)
OF_REWARDS = "tests/rl/test_rewards.py"
OF_ENVIRONMENTS = "tests/rl/test_environment.py"
OF_COMPLAINTS = "tests/rl/test_complaints.py"

# fmt: off
RL_REWARD_BUGS: tuple[Bug, ...] = (
    bug(0, "NaN as a reward", LOAD, "and not is_number(value):", "and abs(value) == 1e400:",
        f"{OF_REWARDS} may_not_give"),
    bug(0, "infinity as a reward", LOAD, "and not is_number(value):", "and value != value:",
        f"{OF_REWARDS} may_not_give"),
    bug(0, "any text as a reward", LOAD, "if not isinstance(value, int | float):",
        "if not isinstance(value, int | float | str):", f"{OF_REWARDS} may_not_give"),
    bug(0, "None as a reward of 0", LOAD, "if value is None:\n        return None",
        "if value is None:\n        return 0.0", f"{OF_REWARDS} none_leaves"),
    bug(0, "a completion judged by the rewards that gave a number", JUDGE,
        "Judged(None if left_out else total, by_name)", "Judged(total, by_name)",
        f"{OF_REWARDS} none_leaves"),
    bug(0, "a reward without its weight", JUDGE, "total += weight * outcome", "total += outcome",
        f"{OF_REWARDS} weighted_sum"),
    bug(0, "a failed reward as 0", JUDGE, "return Judged(None, {}, failed=True)",
        "return Judged(0.0, {}, failed=True)", f"{OF_REWARDS} a_pool_goes_on"),
    bug(0, "a failure that ends no run", FAILURES, 'if self.policy == "stop":',
        'if self.policy == "leave_out":', f"{OF_REWARDS} names_the_reward"),
    bug(0, "a process kept after its call timed out", POOL,
        "            if not answered:\n                self.kill()\n", "            pass\n",
        f"{OF_REWARDS} cancelled_call"),
    bug(0, "the time-out of an async reward ignored", JUDGE,
        "await asyncio.wait({task}, timeout=self.timeout_s)", "await asyncio.wait({task})",
        f"{OF_REWARDS} names_the_reward"),
    bug(0, "what a reward prints between the answers", WORKER, "    os.dup2(2, 1)\n", "",
        f"{OF_REWARDS} weighted_sum"),
    bug(0, "rewards called on a thread", WORKER,
        "    threading.Thread(target=_read, args=(requests, waiting), daemon=True).start()\n"
        "    while True:\n        answers.write(pack(_answer(rewards, *waiting.get())))\n",
        "    def work():\n        while True:\n"
        "            answers.write(pack(_answer(rewards, *waiting.get())))\n"
        "    threading.Thread(target=work, daemon=True).start()\n    _read(requests, waiting)\n",
        f"{OF_REWARDS} run_elsewhere"),
    bug(0, "sys.exit of a reward ends its process", WORKER, "except (Exception, SystemExit) as",
        "except Exception as", f"{OF_REWARDS} names_the_reward"),
    bug(0, "completion and expected answer swapped", BUILTIN,
        "row: rule(completion, expected)", "row: rule(expected, completion)",
        f"{OF_REWARDS} names_the_reward"),
    bug(0, "one file of two with the same name", FUNCTION,
        'f"{place.stem}_{digest}"', "place.stem", f"{OF_REWARDS} same_name"),
    bug(0, "a reward that takes two arguments", FUNCTION,
        "inspect.signature(function).bind(*arguments)", "inspect.signature(function)",
        f"{OF_REWARDS} paths_that_name"),
    bug(0, "a number outside the box", RULES, "text if boxed is None else boxed", "text",
        f"{OF_REWARDS} last_number"),
    bug(0, "numbers that a comma parts are one", RULES, r"\d{1,3}(?:,\d{3})+(?!\d)|\d+",
        r"\d[\d,]*", "tests/evaluate/test_rules.py test_rules"),
    bug(0, "children of a reward live on", POOL, "os.killpg(self.process.pid, signal.SIGKILL)",
        "os.kill(self.process.pid, signal.SIGKILL)", f"{OF_REWARDS} end_their_processes"),
    # environments
    bug(0, "what tools say is learned", CLIENT, "self.mask += [0] * len(given)",
        "self.mask += [1] * len(given)", f"{OF_ENVIRONMENTS} given_tokens"),
    bug(0, "an answer's text tokenised again", CLIENT, "ids = sampled.tokens[:room]",
        "tokenizer: Any = self._new_text.template.tokenizer\n"
        "        ids = tokenizer.encode(tokenizer.decode(sampled.tokens[:room]),"
        " add_special_tokens=False)", f"{OF_COMPLAINTS} test_11"),
    bug(0, "the end of an answer twice", NEW_TEXT, "text = text[own.end() :]", "pass",
        f"{OF_ENVIRONMENTS} of_the_whole"),
    bug(0, "what closes an answer's turn is left out", NEW_TEXT, "text = text[own.end() :]",
        "text = text[own.end() :].lstrip()", f"{OF_ENVIRONMENTS} of_the_whole"),
    bug(0, "no prompt for the next answer", NEW_TEXT, "generation_prompt=True",
        "generation_prompt=False", f"{OF_ENVIRONMENTS} of_the_whole"),
    bug(0, "template options of the first turn alone", NEW_TEXT, "options=self.like.options",
        "options={}", f"{OF_ENVIRONMENTS} options_of_the_prompt"),
    bug(0, "a given token has the version of the next one", CLIENT,
        "[self.versions[-1]] * len(given)", "[sampled.versions[0]] * len(given)",
        f"{OF_ENVIRONMENTS} given_tokens"),
    bug(0, "routes of the last turn for all tokens", CLIENT,
        "if self.routes is None else np.concatenate([self.routes, new])",
        "if len(new) else new", f"{OF_COMPLAINTS} test_10"),
    bug(0, "routes one token late", CLIENT, "routes[num_read - 1 : length]",
        "routes[num_read:length]", f"{OF_COMPLAINTS} test_10"),
    bug(0, "a cut answer goes on", CLIENT,
        "        if self.truncated:\n            raise Truncated\n",
        "", f"{OF_ENVIRONMENTS} is_cut"),
    bug(0, "an answer one token longer than there is room", CLIENT,
        "room = self._max_length - len(tokens)", "room = self._max_length - len(tokens) + 1",
        f"{OF_ENVIRONMENTS} limit_on_all"),
    bug(0, "an answer cut by the limit counts as ended", CLIENT,
        "not sampled.ended or len(ids) < len(sampled.tokens)", "not sampled.ended",
        f"{OF_ENVIRONMENTS} limit_on_all"),
    bug(0, "a conversation that was cut has the reward 0", ENVIRONMENT,
        "if not own and not self.rewards.weights:\n            return None",
        "if not own and not self.rewards.weights:\n            return 0.0",
        f"{OF_ENVIRONMENTS} is_cut"),
    bug(0, "an engine's failure as the environment's", ENVIRONMENT,
        "        if client.engine_error is not None:\n            raise client.engine_error\n", "",
        f"{OF_ENVIRONMENTS} engine_that_fails"),
    bug(0, "the engine's time as the environment's", CLIENT, "self._set_clock(None)", "pass",
        f"{OF_ENVIRONMENTS} engine_s_time"),
    bug(0, "an environment without a time limit", ENVIRONMENT,
        "                client.start_clock(clock)\n", "                clock.reschedule(None)\n",
        f"{OF_ENVIRONMENTS} environment_that_fails"),
    bug(0, "a calculator that runs what a model wrote", "recipes/calculator/environment.py",
        'value = _value(ast.parse(text.strip(), mode="eval").body)', "value = eval(text)",
        f"{OF_ENVIRONMENTS} calculator_computes"),
)
# fmt: on
