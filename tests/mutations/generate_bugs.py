"""Bugs in generation. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

CACHE, CHOOSE, GENERATE, OPTIONS, ROW, SEQUENCES = (
    f"megalora/generate/{name}.py"
    for name in ("cache", "choose", "generate", "options", "row", "sequences")
)
TEST = "tests/generate/test_generate.py"
OF_CHOICES = "tests/generate/test_choose.py"
OF_OPTIONS = "tests/generate/test_options.py"
OF_SEQUENCES = "tests/generate/test_sequences.py"

SESSION, LOCAL, REMOTE = (f"megalora/chat/{name}.py" for name in ("session", "local", "remote"))
OF_SESSIONS = "tests/chat/test_session.py"
OF_CHAT = "tests/chat/test_command.py"
OF_SERVERS = "tests/chat/test_remote.py"

RULES, REQUEST, JUDGE, REPORT, SERVED = (
    f"megalora/evaluate/{name}.py" for name in ("rules", "request", "judge", "report", "served")
)
QUESTIONS = "megalora/data/questions.py"
ANSWERS = "megalora/train/answers.py"
OF_QUESTIONS = "tests/data/test_questions.py"
OF_ANSWERS = "tests/train/test_answers.py"
OF_RULES = "tests/evaluate/test_rules.py"
OF_REQUESTS = "tests/evaluate/test_request.py"
OF_JUDGING = "tests/evaluate/test_judge.py"
OF_SERVED = "tests/evaluate/test_served.py"

# fmt: off
GENERATE_BUGS: tuple[Bug, ...] = (
    bug(0, "new keys written and old ones read one row off", CACHE,
        "stored.index_copy_(0, documents.write, new[:, 0])",
        "stored.index_copy_(0, (documents.write - 1).clamp(min=0), new[:, 0])",
        f"{TEST} stock_peft"),
    bug(0, "values taken from the cache of keys", CACHE,
        "stored.index_select(0, documents.read)", "self.stored[0].index_select(0, documents.read)",
        f"{TEST} stock_peft"),
    bug(0, "a next token at position 0", ROW, "positions.extend(range(num_cached, stop))",
        "positions.extend(range(len(new)))", f"{TEST} stock_peft"),
    bug(0, "a slot that overlaps its neighbour", ROW, "sequence.slot * length",
        "sequence.slot * (length - 1)", f"{OF_SEQUENCES} a_row_of_a_prompt"),
    bug(0, "filler in the first slot", ROW, "add([0] * num_filler, num_slots * length, 0)",
        "add([0] * num_filler, 0, 0)", f"{OF_SEQUENCES} a_row_of_a_prompt"),
    bug(0, "all ranks stop when the first one's sequences have ended", GENERATE,
        "op=dist.ReduceOp.MAX", "op=dist.ReduceOp.MIN", f"{TEST} what_one_rank_says"),
    bug(0, "logits of this rank's part of the vocabulary alone", GENERATE,
        "part.gather(part.logits).transpose(0, 1).flatten(1)", "part.logits",
        f"{TEST} what_one_rank_says"),
    bug(0, "draws numbered by a rank's own prompts", GENERATE,
        "    return [Prompt(*prompt) for prompt in every][dp.rank() :: dp.size()]",
        "    mine = [Prompt(*prompt) for prompt in every][dp.rank() :: dp.size()]\n"
        "    return [Prompt(p.place, n, p.tokens) for n, p in enumerate(mine)]",
        f"{TEST} what_one_rank_says"),
    bug(0, "top-p without the token that reaches it", CHOOSE, "before_NV < options.top_p",
        "before_NV + probs_NV < options.top_p", f"{OF_CHOICES} transformers_filters"),
    bug(0, "logits multiplied by the temperature", CHOOSE,
        "logits_NV.double() / options.temperature", "logits_NV.double() * options.temperature",
        f"{OF_CHOICES} transformers_filters"),
    bug(0, "a draw of a token that was left out", CHOOSE, " * cumulative_NV[:, -1:]", "",
        f"{OF_CHOICES} cover_the_interval"),
    bug(0, "log-probabilities at the temperature", CHOOSE,
        "if tempered and options.temperature", "if options.temperature",
        f"{OF_CHOICES} cover_the_interval"),
    bug(0, "one stream of draws for all sequences", CHOOSE, "key=np.array([seed, number]",
        "key=np.array([seed, 0]", f"{OF_CHOICES} streams_differ"),
    bug(0, "prompts that wait until all others have ended", SEQUENCES,
        "while self.waiting and self.free:",
        "while self.waiting and self.free and not self.active:", f"{OF_SEQUENCES} a_free_slot"),
    bug(0, "stop tokens of config.json alone", OPTIONS,
        'read_json_object(path).get("eos_token_id") if path.is_file() else None', "None",
        f"{OF_OPTIONS} test_stop_tokens"),
    # chat
    bug(0, "an adapter that answers for the base", LOCAL,
        "if by_base and self.has_adapter:", "if False:", f"{OF_CHAT} the_same_text"),
    bug(0, "a prompt without the assistant's beginning", "megalora/data/template.py",
        "generation_prompt=True", "generation_prompt=False", f"{OF_CHAT} the_same_text"),
    bug(0, "a refused message that stays in the conversation", SESSION,
        'asked = [*self.messages, {"role": "user", "content": text}]',
        'asked = self.messages\n        asked.append({"role": "user", "content": text})',
        f"{OF_SESSIONS} a_refused_message"),
    bug(0, "the base's answer goes on", SESSION, '"both": (True, False)', '"both": (False, True)',
        f"{OF_SESSIONS} both_answer"),
    bug(0, "a system message that is forgotten at a reset", SESSION,
        "        if self.system:\n            self.messages.append(",
        "        if self.system and self.number == 0:\n            self.messages.append(",
        f"{OF_SESSIONS} reset_and_system"),
    bug(0, "a chat that stays with the version it began with", REMOTE,
        "        if self.name in self._client.names():\n            return self.name\n", "",
        f"{OF_SERVERS} version_of_its_own"),
    bug(0, "a name sent to a server that knows whole ids alone", REMOTE,
        "if self.name in self._client.names():", "if True:", f"{OF_SERVERS} knows_no_names"),
    bug(0, "a stream that breaks off taken for a whole answer", REMOTE,
        'raise ServerError("the server closed the connection before the answer ended")', "return",
        f"{OF_SERVERS} streams_that_break"),
    # eval
    bug(0, "a base judged with its adapter", JUDGE,
        "adapters_off(model.chunks)", "adapters_off([])", f"{OF_JUDGING} stock_peft_s_losses"),
    bug(0, "answers that are stopped by nothing", JUDGE, "stop=stop_tokens(plan.base)", "stop=()",
        f"{OF_JUDGING} stock_peft_s_losses"),
    bug(0, "the expected answer among what is asked", QUESTIONS,
        "messages=conversation.messages[:last])", "messages=conversation.messages[:last + 1])",
        f"{OF_JUDGING} stock_peft_s_losses"),
    bug(0, "training samples evaluated", JUDGE, "split = held_out or train", "split = train",
        f"{OF_JUDGING} training_s_own"),
    bug(0, "the run's own layout", REQUEST, "overrides = [*one_rank, *held, *request.overrides]",
        "overrides = [*held, *request.overrides]", f"{OF_REQUESTS} layout_of_its_own"),
    bug(0, "the first number of an answer", RULES, "digits = found[-1]", "digits = found[0]",
        f"{OF_RULES} test_rules"),
    bug(0, "a number compared as text", RULES, 'Decimal(sign + digits.replace(",", ""))',
        "sign + digits", f"{OF_RULES} test_rules"),
    bug(0, "the base's marks beside the adapter's answers", REPORT, "one.right[number] else",
        "verdict.judged['base'].right[number] else", f"{OF_JUDGING} ten_examples"),
    # eval by a server
    bug(0, "answers of several versions in one evaluation", SERVED,
        '{"adapter": target.id}', '{"adapter": target.name}', f"{OF_SERVED} one_version"),
    bug(0, "a served adapter found by the folder's name", SERVED,
        'if served.version and served.version.rpartition(".")[2] == contents:',
        "if served.name == adapter.name:", f"{OF_SERVED} by_its_contents"),
    bug(0, "the server's own penalty for repetition", SERVED,
        '        "repetition_penalty": 1.0,\n', "", f"{OF_SERVED} base_beside"),
    bug(0, "the server's own stop tokens", SERVED,
        '        "stop_token_ids": sorted(stop),\n        "ignore_eos": True,\n', "",
        f"{OF_SERVED} base_beside"),
    bug(0, "one seed for all answers of a server", SERVED,
        "plan.sampling.seed + number", "plan.sampling.seed", f"{OF_SERVED} base_beside"),
    bug(0, "a server asked one question at a time", SERVED,
        "ThreadPoolExecutor(AT_ONCE)", "ThreadPoolExecutor(1)", f"{OF_SERVED} under_way"),
    bug(0, "answers that were cut not counted", SERVED,
        'completion.finish_reason == "length"', "False", f"{OF_SERVED} base_beside"),
    bug(0, "cut answers taken for whole ones in the report", REPORT,
        "if one.num_cut:", "if False:", f"{OF_JUDGING} ten_examples"),
    bug(0, "a long answer that loses its mark", REPORT,
        "_fit(one.answers[number], _WIDTHS[-1] - 2)", "one.answers[number]",
        f"{OF_JUDGING} ten_examples"),
    # Answers while training
    bug(0, "rows asked that the loss leaves out", QUESTIONS,
        "chosen = samples.pieces[places[:limit]]",
        "chosen = np.zeros(limit or 12, samples.pieces.dtype)\n"
        "    chosen['sample'] = range(limit or 12)", f"{OF_QUESTIONS} rows_that_the_loss"),
    bug(0, "a row that was split asked several times", QUESTIONS,
        "np.unique(sample_numbers(samples), return_index=True)[1]", "np.arange(len(samples))",
        f"{OF_QUESTIONS} rows_that_the_loss"),
    bug(0, "evaluation rows looked up in the training data", QUESTIONS,
        "sources = [Source(path=data.eval)]", "pass", f"{OF_QUESTIONS} sources_of_their_own"),
    bug(0, "training rows asked where others are held out", ANSWERS,
        "held_out or train, tokenizer, wanted", "train, tokenizer, wanted",
        f"{OF_ANSWERS} test_answers_are"),
    bug(0, "answers with dropout", "megalora/generate/cache.py", "chunk.eval()", "chunk.train()",
        f"{OF_ANSWERS} test_answers_are"),
    bug(0, "answers that draw from training's generator", ANSWERS,
        "return []\n        prompts", "return []\n        __import__('torch').rand(1)\n"
        "        prompts", f"{OF_ANSWERS} test_answers_are"),
    bug(0, "answers that go on behind a stop token", ANSWERS,
        "self.stop = stop_tokens(local_folder(run.config.model.path))", "self.stop = ()",
        f"{OF_ANSWERS} user_s_own"),
    bug(0, "answers of later steps that a resumed run leaves in its file",
        "megalora/train/run_logs.py", "forget_after(self.answers, start_step)", "pass",
        f"{OF_ANSWERS} resumed_run"),
)
