"""Bugs in how data is tokenised once and kept. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

CACHE, TOKENS, BUILD, SAMPLES = (
    f"megalora/data/{name}.py" for name in ("token_cache", "tokens", "build_tokens", "samples")
)
CACHE_TEST = "tests/data/test_token_cache.py"
STORE_TEST = "tests/data/test_token_store.py"
UNUSED_TEST = "tests/data/test_unused_stores.py"
MIXTURE = "megalora/data/mixture.py"
MIXTURE_TEST = "tests/data/test_mixture.py"
LONG = "megalora/data/too_long.py"
LONG_TEST = "tests/data/test_too_long.py"
SAME = "megalora/train/checkpoint/same_run.py"

TOKENS_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "samples of another chat template are taken from the cache",
        CACHE,
        '        "template": tokenizer.chat_template,\n',
        "",
        f"{CACHE_TEST} test_what_a_store_is_made_of",
    ),
    bug(
        0,
        "every rank that waited for a store builds it again",
        CACHE,
        '    with locked(cache / f"{folder.name}.lock", _FIX) as waited:\n'
        "        # Somebody else may have built it while this process waited, or met a row that is"
        " refused.\n"
        "        store, damage = _opened(folder, made_of)\n",
        '    with locked(cache / f"{folder.name}.lock", _FIX) as waited:\n',
        f"{CACHE_TEST} test_processes_that_ask_at_once_build_once",
    ),
    bug(
        0,
        "damaged records are read",
        TOKENS,
        "if hashlib.sha256(self.records.data).hexdigest() != self.header.samples_sha256:",
        "if False:",
        f"{STORE_TEST} test_a_damaged_store_is_built_again_with_a_line",
    ),
    bug(
        0,
        "damaged tokens are trained on",
        TOKENS,
        'if packed is None or digest_of(packed) != self.records["digest"][index].tobytes():',
        "if packed is None:",
        f"{STORE_TEST} test_a_damaged_token_is_found_when_it_is_read",
    ),
    bug(
        0,
        "kinds of what is left out are numbered chunk by chunk",
        BUILD,
        'chunk.samples["left_out"] = np.array(own, np.uint16)[chunk.samples["left_out"]]',
        "pass",
        f"{STORE_TEST} test_kinds_left_out_are_those_of_their_rows",
    ),
    bug(
        0,
        "data that changes while it is read is kept under its old name",
        CACHE,
        'if _source_digest(recipe.source, cache) != made_of["source"]:',
        "if False:",
        f"{CACHE_TEST} test_data_that_changes_while_it_is_read_is_refused",
    ),
    bug(
        0,
        "digests of earlier versions are compared with today's",
        SAME,
        'if saved and ":" not in saved:',
        "if False:",
        "tests/train/test_identity.py test_a_checkpoint_with_an_earlier_digest",
    ),
    bug(
        0,
        "a token between two pieces of a sample is predicted by none",
        LONG,
        "begins = np.arange(0, length - 1, max_length - 1)",
        "begins = np.arange(0, length - 1, max_length)",
        f"{LONG_TEST} test_split_loses_no_target",
    ),
    bug(
        0,
        "the first token of a piece counts as predicted",
        SAMPLES,
        "    if begin:\n        mask[0] = False\n",
        "",
        f"{LONG_TEST} test_split_loses_no_target",
    ),
    bug(
        0,
        "truncation does not say how many targets it cut",
        LONG,
        'counts["num_targets_cut"] = int(targets - learned["targets"].sum())',
        'counts["num_targets_cut"] = 0',
        f"{LONG_TEST} test_truncation_counts_what_it_cuts",
    ),
    bug(
        0,
        "a part of a sample is trained on and evaluated, too",
        SAMPLES,
        '    for name in ("store", "sample"):\n        is_next',
        '    for name in ("store", "sample", "begin"):\n        is_next',
        f"{LONG_TEST} test_pieces_of_a_sample_are_held_out_together",
    ),
    bug(
        0,
        "shares of sources drift from their weights",
        MIXTURE,
        "queue.append(((2 * turn + 1) * (scale // share), source))",
        "queue.append(((2 * turn + 2) * (scale // share), source))",
        f"{MIXTURE_TEST} test_any_place_has_the_source",
    ),
    bug(
        0,
        "all sources of one size are shuffled alike",
        MIXTURE,
        "permutation(self.size, self.seed, epoch, 2, self.source)",
        "permutation(self.size, self.seed, epoch)",
        f"{MIXTURE_TEST} test_a_mixture_of_three_sources",
    ),
    bug(
        0,
        "a source is repeated by the epochs of all",
        MIXTURE,
        "            indices[now] = offset + shuffled[turns[now] % size]",
        "            indices[now] = offset + shuffled[np.flatnonzero(now) % size]",
        f"{MIXTURE_TEST} test_a_mixture_of_three_sources",
    ),
    bug(
        0,
        "weights of sources are not asked for",
        "megalora/train/batches.py",
        "if weights := self.config.data.weights:",
        "if weights := ():",
        f"{MIXTURE_TEST} test_a_step_trains_on_the_mixture",
    ),
    bug(
        0,
        "another user's lock is opened",
        "megalora/data/token_cache.py",
        'for path in (cache, folder, folder / f"{name}.lock"):',
        "for path in (cache,):",
        "tests/data/test_token_cache.py somebody_else",
    ),
    bug(
        0,
        "the format of one source is not asked for",
        "megalora/data/splits.py",
        "load(source.path, source.format) for source",
        "load(source.path) for source",
        f"{MIXTURE_TEST} test_each_source_may_have_columns_of_its_own",
    ),
    bug(
        0,
        "a run goes on with other columns of its data",
        "megalora/data/digest.py",
        "if source.format is not None:",
        "if False:",
        f"{MIXTURE_TEST} test_each_source_may_have_columns_of_its_own",
    ),
    bug(
        0,
        "a mapping is merged into the one that it overrides",
        "megalora/config/tree.py",
        "                    del before[option]\n",
        "                    pass\n",
        "tests/test_config.py test_a_mapping_replaces_the_one_before",
    ),
    bug(
        0,
        "a key of a mapping replaces the whole of it",
        "megalora/config/tree.py",
        'return OmegaConf.from_dotlist([item]), key.count(".") < 2',
        "return OmegaConf.from_dotlist([item]), True",
        "tests/test_config.py test_a_mapping_replaces_the_one_before",
    ),
    bug(
        0,
        "an empty path is taken for the working directory",
        "megalora/paths.py",
        "    if not text.strip():\n",
        "    if False:\n",
        "tests/test_config.py test_refused_override",
    ),
    bug(
        0,
        "every rank on a read-only cache reads the data",
        CACHE,
        "            return folder_of_this_machine()\n",
        "            return None\n",
        f"{CACHE_TEST} test_ranks_on_a_read_only_cache_read_the_data_once",
    ),
    bug(
        0,
        "digests are believed that anybody may write",
        "megalora/machine_folder.py",
        "return folder if is_own and not others_may_write else None",
        "return folder",
        f"{CACHE_TEST} test_a_folder_that_others_may_write_to_is_not_believed",
    ),
    bug(
        0,
        "opening a store does not count as using it",
        CACHE,
        "    mark_used(folder)\n",
        "",
        f"{UNUSED_TEST} test_opening_a_store_is_using_it",
    ),
    bug(
        0,
        "a store is removed though it was used while its lock was waited for",
        "megalora/data/unused_stores.py",
        "if now is None or now.days_unused() < days:",
        "if now is None:",
        f"{UNUSED_TEST} test_a_store_that_is_used_while",
    ),
)
