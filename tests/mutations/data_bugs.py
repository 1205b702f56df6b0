"""Bugs in what reaches the text, and in what is learned of it. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

MESSAGES, MARKS, REACH, SPANS, CHAT, COLUMNS = (
    f"megalora/data/{name}.py" for name in ("messages", "marks", "reach", "spans", "chat", "columns")
)
SOURCES, PROBE = "megalora/data/sources.py", "megalora/data/probe_text.py"
CASES, TEMPLATES, CHAT_TEST = (
    "tests/cases/test_data_cases.py",
    "tests/data/test_templates.py",
    "tests/data/test_chat.py",
)

# fmt: off
DATA_BUGS: tuple[Bug, ...] = (
    bug(0, "whatever the template leaves out is accepted", REACH, "if piece.kind in allowed:", "if True:", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "a cut value counts as printed", MARKS, "elif number in opened:", "if number in opened:", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "numbers in arguments not looked for", REACH, "    yield from _numbers_left_out(conversation, template, text)\n", "", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "truth values of a message not looked for", REACH, "    yield from _flags_left_out(conversation, template, text)\n", "", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "a value found anywhere counts as printed", REACH, "    if rendered is not None and rendered.text == text:\n        return _is_whole(piece, number, rendered)\n", "", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "reasoning inside the content is content", MARKS, '"reasoning" if thinks else kind', "kind", f"{TEMPLATES} test_reasoning_may_be_left_out_where_that_is_said"),
    bug(0, "tools not looked for in the text", MARKS, "tools=marker.tools(conversation.tools),", "tools=conversation.tools,", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "reasoning under the key of another template", CHAT, "    conversation = _with_known_reasoning(conversation, template)\n", "", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "arguments stay JSON text", CHAT, "arguments_as_objects(conversation.messages)", "list(conversation.messages)", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "arguments printed as Python would", CHAT, "arguments and str(arguments) in text", "arguments and False", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "nulls of Arrow stay below messages", MESSAGES, "{k: without_nulls(v, depth + 1) for k, v in value.items() if v is not None}", "{k: v for k, v in value.items() if v is not None}", f"{CASES} test_null_padded_tool_arguments"),
    bug(0, "an empty list of calls is a call", MESSAGES, 'v in ("", [], {})]', 'v in ("",)]', f"{CASES} test_empty_tool_calls_list"),
    bug(0, "a message flagged out is learned", "megalora/data/conversation.py", " and flag is not False)", ")", f"{CASES} test_message_flags"),
    bug(0, "a flagged message learned where the template marks it", SPANS, "        return conversation.learned[owner]\n", "        return True\n", f"{CASES} test_message_flags"),
    bug(0, "half a weight is a whole one", MESSAGES, "if value not in (0, 1):", "if value is None:", f"{CASES} test_flags_that_cannot_be_honoured"),
    bug(0, "the next turn's opening token is learned", SPANS, "self.text[last : max(last, limit)]", "self.text[last:]", f"{CASES} test_empty_answer_loss_on_next_turn"),
    bug(0, "a turn in the middle without its end", SPANS, "return max(limit, end if opened < 0 else opened), False", "return limit, False", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "a tool call ends with its first closing token", SPANS, 'plain = "tool_calls" not in self.conversation.messages[i] and', "plain = True or", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "what the prompt opens is learned", SPANS, "                return place + common\n", "                return place\n", f"{CHAT_TEST} test_loss_is_on_the_assistant_alone"),
    bug(0, "a tool result inside an answer is learned", SPANS, "        if others:\n", "        if False:\n", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "no word where the model does not learn to stop", CHAT, "stops=bool(spans) and stops[-1],", "stops=bool(spans) or stops[-1],", f"{TEMPLATES} test_what_is_learned"),
    bug(0, "an answer that the template does not mark is passed over", SPANS, "if places and not in_loss:", "if False:", f"{CHAT_TEST} test_answers_that_the_template_does_not_mark"),
    bug(0, "a turn that cannot be cut stays without its end", SPANS, "max(limit, self._behind_eos(last))", "limit", f"{CHAT_TEST} test_a_turn_behind_which_the_template_refuses_to_be_cut"),
    bug(0, "a turn in the middle without its end is not counted", CHAT, "num_open=stops[:-1].count(False),", "", f"{CHAT_TEST} test_a_turn_behind_which_the_template_refuses_to_be_cut"),
    bug(0, "a call without arguments is not completed", MESSAGES, '        function_of(call).setdefault("arguments", {})\n', "", f"{CHAT_TEST} test_a_call_without_arguments_has_none"),
    bug(0, "of a key that occurs twice the last value counts", SOURCES, "json.loads(text, object_pairs_hook=unique_keys)", "json.loads(text)", "tests/data/test_sources.py test_unreadable_files"),
    bug(0, "a run of backslashes takes quadratic time", MARKS, r'rf"(?<!\\)\\+u(', r'rf"\\+u(', f"{CHAT_TEST} test_a_long_run_of_backslashes_takes_no_quadratic_time"),
    bug(0, "only the first refusal is named", "megalora/data/splits.py", "if refused and not every_refusal:", "if refused:", "tests/data/test_loader.py test_every_refusal_is_named_where_that_is_asked_for"),
    bug(0, "a prompt that the completion repeats is said twice", COLUMNS, "        _refuse_repeated_prompt(prompt, completion, names)\n", "", "tests/data/test_columns.py test_a_completion_that_repeats_the_prompt_is_refused"),
    bug(0, "Alpaca's input left out", COLUMNS, 'names.setdefault("input", "input")', 'names.setdefault("input", "")', f"{CASES} test_columns_left_out"),
    bug(0, "a column of the conversation passed over", COLUMNS, "        keys = \", \".join(_KEYS)\n", "        continue\n        keys = \", \".join(_KEYS)\n", "tests/data/test_columns.py test_columns_of_the_conversation_are_used_or_refused"),
    bug(0, "options that no template reads are accepted", CHAT, "    template.check_options(conversation)\n", "", f"{CASES} test_columns_left_out"),
    bug(0, "half a character reaches the tokenizer", CHAT, "    _require_unicode(conversation, text)\n", "", f"{CASES} test_lone_surrogate_and_what_is_like_it"),
    bug(0, "a number of too many digits without its line", SOURCES, "        raise ValueError(f\"{where}: holds a number of too many digits ({error})\") from error\n", "        raise\n", f"{CASES} test_lone_surrogate_and_what_is_like_it"),
    bug(0, "a damaged page passes as a traceback", SOURCES, "pyarrow.ArrowException, OSError, ValueError,", "pyarrow.ArrowException,", "tests/data/test_sources.py test_what_pyarrow_raises"),
    bug(0, "the probe knows one form", PROBE, "(chat, with_system, in_parts, [user])", "(chat,)", f"{CASES} test_probe_refused_by_template"),
)
# fmt: on
