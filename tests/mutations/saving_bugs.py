"""Bugs in saving and loading what each rank owns. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

CHECKPOINT = "megalora/train/checkpoint"
SLICES = "megalora/lora/slices.py"
READER = "megalora/adapters/saved_tensors.py"
WRITER = f"{CHECKPOINT}/writer.py"
SLICES_TEST = "tests/lora/test_slices.py"
READER_TEST = "tests/adapters/test_saved_tensors.py"
THREAD_TEST = "tests/train/test_background.py"
CRASHES = "tests/train/test_crash_points.py"
SAVE_BYTES = "megalora/planner/save_bytes.py"
ORDER = "tests/train/test_save_order.py"
RESUMES = "tests/distributed/test_checkpoint.py"
LAYOUTS = "tests/pitfalls/test_training.py test_08_a_checkpoint_means"

SAVING_BUGS: tuple[Bug, ...] = (
    bug(0, "a slice off by one where it is cut otherwise", SLICES,
        "yield source_place + first - a,", "yield source_place + max(first - a - 1, 0),",
        f"{SLICES_TEST} in_common"),
    bug(0, "a part of columns read as rows", SLICES,
        "stride = math.prod(self.shape[self.dim :])", "stride = math.prod(self.shape)",
        f"{SLICES_TEST} in_common"),
    bug(0, "an element that is in no piece passes", SLICES, "if first > place:", "if False:",
        f"{SLICES_TEST} there_once"),
    bug(0, "a piece twice passes", SLICES, "if first < place:", "if False:",
        f"{READER_TEST} not_whole"),
    bug(0, "the end of a tensor need not be there", SLICES, "if place != total:", "if False:",
        f"{READER_TEST} not_whole"),
    bug(0, "a digest is not compared", READER, "if digest.hexdigest() != expected:", "if False:",
        f"{READER_TEST} changed_byte"),
    bug(0, "digests are not checked when a run resumes", f"{CHECKPOINT}/load.py",
        "            _check_digests(saved, saved.index)\n", "            pass\n",
        f"{RESUMES} changed_byte"),
    bug(0, "every rank's file is opened", READER,
        "if next(overlaps(piece, wanted), None) is None:", "if False:",
        f"{READER_TEST} have_something"),
    bug(0, "a rank's file cut short passes", f"{CHECKPOINT}/where.py",
        "if path.stat().st_size != num_bytes:", "if False:",
        "tests/train/test_where.py passed_over"),
    bug(0, "tensor-parallel replicas save the same elements", f"{CHECKPOINT}/pieces.py",
        "if is_replica and not replicas:", "if False:", LAYOUTS),
    bug(0, "the second tensor of a parameter saved as the first", f"{CHECKPOINT}/pieces.py",
        "yield shard.name, part.part(begin - first, stop - first)",
        "yield shard.name, part.part(0, stop - begin)", LAYOUTS),
    bug(0, "a save takes the memory of one that is being written",
        f"{CHECKPOINT}/background.py", "for _ in range(2):", "for _ in range(3):",
        f"{THREAD_TEST} when_its_save_began"),
    bug(0, "a snapshot that is what is being trained", f"{CHECKPOINT}/snapshot.py",
        "content = memoryview(self._buffer.numpy())",
        "[p.copy_(s) for p, s in zip(self._places, self._sources)]\n"
        "        content = memoryview(self._buffer.numpy())",
        f"{THREAD_TEST} when_its_save_began",
        ("        states = list(generators.values())\n",
         "        self._sources = [block.tensor for block in ordered]\n"
         "        states = list(generators.values())\n")),
    bug(0, "a failed save that nobody hears of", "megalora/train/saver.py",
        "if not may_fail or now.step == save.step:", "if False:", f"{THREAD_TEST} becomes_of"),
    bug(0, "an adapter that could not be saved at the end, in silence", "megalora/train/saver.py",
        "if not may_fail or now.step == save.step:", "if not may_fail:",
        f"{THREAD_TEST} becomes_of"),
    bug(0, "a run folder made anew without its config", WRITER,
        "    temporary.mkdir()\n    return", "    temporary.mkdir(parents=True)\n    return",
        f"{CRASHES} removed_run_folder"),
    bug(0, "an adapter's file with tensors at the wrong places",
        "megalora/adapters/write/stream.py",
        "(-tensors[name].element_size(), name)", "(tensors[name].element_size(), name)",
        "tests/adapters/test_stream.py save_file"),
    bug(0, "a rank's file that it does not force to disk", f"{CHECKPOINT}/snapshot.py",
        "            os.fsync(file.fileno())\n", "", f"{ORDER} before_it_is_named"),
    bug(0, "a checkpoint named before its files are on disk", WRITER,
        "    force_tree_to_disk(temporary)\n", "", f"{ORDER} before_it_is_named"),
    bug(0, "a pointer whose content is not on disk", WRITER,
        "    force_to_disk(pointer)\n", "", f"{ORDER} before_it_is_named"),
    bug(0, "a checkpoint whose pointer may be lost behind the save", WRITER,
        "    pointer.rename(target.with_name(name))\n    force_to_disk(target.parent)\n",
        "    pointer.rename(target.with_name(name))\n", f"{ORDER} before_it_is_named"),
    bug(0, "a checkpoint that loses files under its name", WRITER,
        "    force_to_disk(folder.parent)\n    shutil.rmtree(gone)\n",
        "    shutil.rmtree(gone)\n", f"{ORDER} before_it_is_named"),
    bug(0, "wrong pieces that the first rank keeps to itself", f"{CHECKPOINT}/assembled.py",
        'on_first_rank(lambda: made.append(_merged(rows)), "a checkpoint\'s table", group)',
        "made += [_merged(rows)] if rows else []", f"{ORDER} twice"),
    bug(0, "an adapter without a plan that the first rank keeps to itself",
        f"{CHECKPOINT}/adapter_file.py",
        'batches = on_first_rank(make, f"the plan of {WEIGHTS}", group)',
        "batches = make() if table is not None else []\n"
        "        batches = on_first_rank(lambda: batches, '', group)",
        f"{ORDER} form"),
    bug(0, "a rank's file on another node's disk passes", f"{CHECKPOINT}/save.py",
        "        if seen != num_bytes:", "        if False:", f"{ORDER} unseen"),
    bug(0, "a failed save that another error hides", "megalora/train/saver.py",
        "            saver.say_what_failed()\n", "", f"{THREAD_TEST} another_error"),
    bug(0, "a pipe in place of latest is opened", "megalora/adapters/latest.py",
        "if path.exists() and not path.is_file():", "if False:",
        "tests/train/test_where.py a_pipe"),
    bug(0, "a cycle that could not be kept, in silence", f"{CHECKPOINT}/whole_file.py",
        "    if fault is not None:", "    if False:", f"{ORDER} one_file_of_whole"),
    bug(0, "a snapshot planned without masters", SAVE_BYTES,
        "total = 3 * STATE * owned", "total = 2 * STATE * owned",
        "tests/planner/test_save_bytes.py"),
    bug(0, "a snapshot planned without the average", SAVE_BYTES,
        "    if work.averaged:\n        total", "    if False:\n        total",
        "tests/planner/test_save_bytes.py kept_beside"),
    bug(0, "page-locked memory planned as asked for", SAVE_BYTES,
        "return buffer if work.on_cpu else", "return buffer if True else",
        "tests/planner/test_save_bytes.py eight_gpus"),
    bug(0, "generators of the first rank for all", f"{CHECKPOINT}/load.py",
        "saved.generators(rank)", "saved.generators(0)", f"{RESUMES} bit_for_bit"),
)  # fmt: skip
