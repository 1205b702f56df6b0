"""Bugs in what bounds the inputs of others. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

ARROW = "megalora/data/arrow_rows.py"
CORPUS = "tests/hostile/test_corpus.py"
BOMBS = "tests/hostile/test_parquet_bombs.py"

JSON_TEXT = "megalora/json_text.py"
BUDGET = "megalora/data/template_budget.py"
BODY = "megalora/serve/body.py"
JSON_TEST = "tests/hostile/test_hostile_json.py"
TEMPLATE_TEST = "tests/hostile/test_hostile_templates.py"
SERVER_TEST = "tests/hostile/test_hostile_server.py"

HOSTILE_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "a redirect to another host is followed",
        "megalora/serve/api.py",
        "            base_url=self.url,\n            # An answer",
        "            base_url=self.url, follow_redirects=True,\n            # An answer",
        f"{SERVER_TEST} redirect",
    ),
    bug(
        0,
        "JSON nests one level deeper than is allowed",
        JSON_TEXT,
        "for _ in range(depth):",
        "for _ in range(depth + 1):",
        f"{JSON_TEST} test_limits_of_all_json",
    ),
    bug(
        0,
        "a pipe is opened as a JSON file",
        JSON_TEXT,
        "if not stat.S_ISREG(status.st_mode):",
        "if stat.S_ISDIR(status.st_mode):",
        f"{JSON_TEST} test_only_regular_files_of_a_reasonable_size",
    ),
    bug(
        0,
        "integers that float64 skips are taken",
        JSON_TEXT,
        "if abs(number) >= MAX_INTEGER:",
        "if abs(number) > MAX_INTEGER:",
        f"{JSON_TEST} test_numbers_that_are_not_exact",
    ),
    bug(
        0,
        "a base may have any number of layers",
        "megalora/model/families/decoder.py",
        '"num_hidden_layers": whole(1, MAX_LAYERS),',
        '"num_hidden_layers": whole(1, 10**30),',
        f"{JSON_TEST} test_no_size_of_a_file_sizes_a_loop",
    ),
    bug(
        0,
        "a base's expression that takes too long is not named",
        "megalora/model/quantised/scheme.py",
        'return Pattern(f"{QUANTISED}: ignore", expression)',
        'return Pattern("x", expression)',
        f"{JSON_TEST} test_no_expression_of_a_file_hangs",
    ),
    bug(
        0,
        "macros of a chat template are not watched",
        BUDGET,
        "        if isinstance(constant, CodeType):\n            _watch(constant)\n",
        "        pass\n",
        f"{TEMPLATE_TEST} test_a_template_has_a_budget",
    ),
    bug(
        0,
        "a chat template's budget is that of one thread",
        BUDGET,
        "class _Rendering(threading.local):",
        "class _Rendering:",
        f"{TEMPLATE_TEST} test_each_thread_has_a_budget_of_its_own",
    ),
    bug(
        0,
        "a chat template prints what it likes",
        BUDGET,
        "MAX_TEXT_RATIO * _num_characters(arguments)",
        "10**6 * _num_characters(arguments)",
        f"{TEMPLATE_TEST} test_a_template_has_a_budget",
    ),
    bug(
        0,
        "the probe waits for a template that never ends",
        "megalora/data/probe_text.py",
        "with suppress(RefusedByTemplate, TemplateExceeds):",
        "with suppress(RefusedByTemplate):",
        f"{TEMPLATE_TEST} test_the_probe_stands_plain",
    ),
    bug(
        0,
        "a server's answer is inflated",
        BODY,
        'if encoding != "identity":',
        "if False:",
        f"{SERVER_TEST} test_nothing_is_inflated",
    ),
    bug(
        0,
        "a server may answer a byte at a time",
        "megalora/serve/api.py",
        "read_body(response, doing, self.timeout)",
        "read_body(response, doing, 5.0)",
        f"{SERVER_TEST} test_a_byte_now_and_then",
    ),
    bug(
        0,
        "a terminal obeys what a server says",
        "megalora/serve/errors.py",
        '" ".join(printable(text).split())',
        '" ".join(text.split())',
        f"{SERVER_TEST} test_nothing_a_server_says_is_obeyed_by_a_terminal",
    ),
    bug(
        0,
        "a config reads secrets of the environment",
        "megalora/config/env_names.py",
        " or _SECRET.search(name)",
        "",
        "tests/test_hostile_config.py test_a_secret_of_the_environment_is_not_written_down",
    ),
    bug(
        0,
        "a Parquet file may repeat a text for ever",
        ARROW,
        "                _check_ratio(size, decoded)\n",
        "                pass\n",
        BOMBS,
    ),
    bug(
        0,
        "a text of a dictionary counts as its number",
        ARROW,
        "row_bytes += _longest_repeated(file, column) * per_row",
        "row_bytes += per_row",
        BOMBS,
    ),
    bug(
        0,
        "deltas of texts count as they lie in the file",
        ARROW,
        "        return column.total_uncompressed_size\n    if not",
        "        return 0\n    if not",
        BOMBS,
    ),
    bug(
        0,
        "an error of Python's is a line",
        "megalora/adapters/sums.py",
        '.decode("latin-1")',
        '.decode("utf-8")',
        f"{CORPUS} what_was_found",
    ),
    bug(
        0,
        "what fuzzing finds is not kept",
        "benchmarks/chaos/fuzz.py",
        "            (folder / name).write_bytes(content)\n",
        "",
        f"{CORPUS} what_is_found",
    ),
    bug(
        0,
        "a footer that pyarrow dies of is asked for",
        ARROW,
        "            next(file.iter_batches(batch_size=1, row_groups=[number]), None)\n",
        "",
        f"{CORPUS} what_was_found",
    ),
    bug(
        0,
        "sizes of a tensor without pieces are multiplied",
        "megalora/adapters/state_index.py",
        "    if any(type(size) is not int or size < 0 for size in shape):",
        "    if False:",
        f"{CORPUS} what_was_found",
    ),
)
