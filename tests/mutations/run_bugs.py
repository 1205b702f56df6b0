"""Bugs in run folders, checkpoints, identities and restarts. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

TRAIN = "megalora/train"
STATE = "megalora/adapters/training_state.py"
WRITER, WHERE, SAME, IDENTITY, LOAD = (
    f"{TRAIN}/checkpoint/{name}.py" for name in ("writer", "where", "same_run", "identity", "load")
)
LOCK = f"{TRAIN}/run_folder.py"
SAVE = f"{TRAIN}/checkpoint/save.py"
BEST = "megalora/adapters/best_loss.py"
FOLLOWING = "tests/train/test_best.py"
BASE = "megalora/hf/base_identity.py"
DIGESTS = "megalora/digests.py"
DATA = "megalora/data/digest.py"
MEETING, PATHS, ERRORS, LAUNCHING = (
    f"megalora/{name}.py" for name in ("rendezvous", "paths", "user_error", "launching")
)
CRASH, FIND, FOLDER, DIGESTING, SAMENESS, RESTART = (
    f"tests/train/test_{name}.py"
    for name in ("crash_points", "where", "run_folder", "digests", "identity", "rendezvous")
)

RUN_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "digests that cannot be kept end the first rank alone",
        IDENTITY,
        '    on_first_rank(lambda: digests.save(kept), f"{kept} cannot be written")\n',
        "    if dist.get_rank() == 0:\n        digests.save(kept)\n",
        f"{SAMENESS} cannot_be_kept",
    ),
    # Saving
    bug(
        0,
        "the old step removed before the new one is there",
        WRITER,
        "    target.rename(old)\n",
        "    shutil.rmtree(target)\n",
        f"{CRASH} every_crash_point_of_a_save",
    ),
    bug(
        0,
        "latest left on what is put aside",
        WRITER,
        "    if named == target:\n",
        "    if False:\n",
        f"{CRASH} every_crash_point_of_a_save",
    ),
    bug(
        0,
        "what was put aside is not put back",
        WRITER,
        'if match and match[2] == "old" and not (run / match[1]).exists():',
        "if False:",
        f"{CRASH} every_crash_point_of_a_save",
    ),
    bug(
        0,
        "latest before the step it names",
        WRITER,
        "    temporary.rename(target)\n    force_to_disk(target.parent)",
        "    point_latest_at(target)\n    temporary.rename(target)\n   "
        " force_to_disk(target.parent)",
        f"{CRASH} every_crash_point_of_a_save",
    ),
    bug(
        0,
        "latest written in place",
        WRITER,
        '    pointer = target.with_name(f".{name}.tmp")\n',
        "    pointer = target.with_name(name)\n",
        f"{CRASH} every_crash_point_of_a_save",
    ),
    bug(
        0,
        "left-overs of killed saves stay",
        WRITER,
        "        elif match:\n            shutil.rmtree(path)\n",
        "        elif match:\n            pass\n",
        f"{CRASH} every_crash_point_of_a_save",
    ),
    bug(
        0,
        "an old checkpoint removed under its name",
        WRITER,
        "    folder.rename(gone)\n",
        "    shutil.rmtree(folder)\n    gone.mkdir()\n",
        f"{CRASH} every_crash_point_of_forgetting",
    ),
    # Where to resume from
    bug(
        0,
        "latest may be a path",
        "megalora/adapters/latest.py",
        "    if not CHECKPOINT_NAME.fullmatch(name):\n",
        "    if not name:\n",
        f"{FIND} test_a_broken_latest",
    ),
    bug(
        0,
        "a fresh start without latest",
        WHERE,
        "        reason = str(error)\n        if not there:",
        "        reason = str(error)\n        if True:",
        f"{FIND} test_a_broken_latest",
    ),
    bug(
        0,
        "newest by number, not by time",
        WHERE,
        "key=lambda state: (state.saved_at, state.step)",
        "key=lambda state: state.step",
        f"{FIND} test_newest_is_the_one",
    ),
    bug(
        0,
        "going back leaves latest where it was",
        WHERE,
        "    point_latest_at(own[0])\n",
        "",
        f"{FIND} test_going_back",
    ),
    bug(
        0,
        "going forth again leaves latest where it was",
        WHERE,
        "    if not own:\n",
        "    if not own or own[0] == there[-1]:\n",
        f"{FIND} test_going_back",
    ),
    bug(
        0,
        "a step is looked for in the run's folder, and found where it is not",
        "megalora/preflight.py",
        "if in_run != folder and (in_run / STATE_JSON).is_file():",
        "if in_run != folder:",
        "tests/test_paths.py said_before_ranks",
    ),
    bug(
        0,
        "a cut file taken for whole",
        WHERE,
        "        if name in tensors:\n",
        "        if False:\n",
        f"{FIND} test_a_damaged_checkpoint",
    ),
    bug(
        0,
        "a step of true",
        STATE,
        "_require(type(value) is int and 0 <= value < 2**53",
        "_require(isinstance(value, int) and 0 <= value < 2**53",
        f"{FIND} test_a_wrong_state",
    ),
    bug(
        0,
        "sections of state.json unchecked",
        STATE,
        '        _require(isinstance(section, dict), path, f"config.{name}", "an object",'
        " section)\n",
        "        assert section is not None\n",
        f"{FIND} test_a_wrong_state",
    ),
    # Identity
    bug(
        0,
        "data known by its size",
        DATA,
        "digests.of(found.file, 'bytes', sha256_of_file)",
        "found.file.stat().st_size",
        f"{DIGESTING} test_a_source_is",
    ),
    bug(
        0,
        "a slice is no part of the data",
        DATA,
        "sha256_of_file)}{found.slice_text}",
        "sha256_of_file)}",
        f"{DIGESTING} test_a_source_is",
    ),
    bug(
        0,
        "the loss mask is no part of the samples",
        DATA,
        "        digest.update(sample.loss_mask.tobytes())\n",
        "",
        f"{DIGESTING} test_samples_are",
    ),
    bug(
        0,
        "weights known by their headers",
        BASE,
        "    for place in (0, between, last):\n",
        "    for place in ():\n",
        f"{DIGESTING} test_other_weights",
    ),
    bug(
        0,
        "only the beginning of a tensor",
        BASE,
        "    for place in (0, between, last):\n",
        "    for place in (0,):\n",
        f"{DIGESTING} test_other_weights",
    ),
    bug(
        0,
        "two tensors may be exchanged",
        BASE,
        'about = f"{tensor.name} {tensor.dtype}',
        'about = f"{tensor.dtype}',
        f"{DIGESTING} test_other_weights",
    ),
    bug(
        0,
        "a digest kept by size and time of change",
        DIGESTS,
        "{stat.st_mtime_ns} {stat.st_ctime_ns}",
        "{stat.st_mtime_ns}",
        f"{DIGESTING} test_an_unchanged_file",
    ),
    bug(
        0,
        "a file of this second kept",
        DIGESTS,
        "< SETTLED_NS",
        "< 0",
        f"{DIGESTING} test_a_file_that_has_just",
    ),
    bug(
        0,
        "an edited base resumes",
        SAME,
        'return "the weights have changed" if before["weights"] != now.weights else ""',
        'return ""',
        f"{SAMENESS} test_changed_files",
    ),
    bug(
        0,
        "edited data resumes",
        SAME,
        "        if old != new:\n",
        "        if False:\n",
        f"{SAMENESS} test_changed_files",
    ),
    bug(
        0,
        "another template resumes",
        SAME,
        "    if saved != digest:\n",
        "    if False:\n",
        f"{SAMENESS} test_changed_files",
    ),
    bug(
        0,
        "paths compared as text",
        SAME,
        '"model.dtype", "data.format",',
        '"model.dtype", "data.train", "data.format",',
        f"{SAMENESS} test_a_moved_folder",
    ),
    bug(
        0,
        "nodes need not agree",
        IDENTITY,
        'if parts := differing_parts(first.as_json(""), other.as_json("")):',
        "if parts := []:",
        f"{SAMENESS} test_nodes_must",
    ),
    bug(
        0,
        "a GPU's generators loaded on the CPU",
        "megalora/host.py",
        'if torch.cuda.is_available() != ("cuda" in state):',
        "if False:",
        f"{SAMENESS} test_generators",
    ),
    # One run in a folder
    bug(
        0,
        "no lock",
        LOCK,
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "",
        f"{FOLDER} test_a_second_run",
    ),
    bug(
        0,
        "the lock waits for the first run",
        LOCK,
        "        if not succession or time.monotonic() > deadline:\n",
        "        if time.monotonic() > deadline:\n",
        f"{FOLDER} test_a_job_s_next_attempt_waits",
    ),
    bug(
        0,
        "any last holder is the same job",
        LOCK,
        "before is not None and job is not None and before.job == job",
        "before is not None",
        f"{FOLDER} test_a_killed_run",
    ),
    bug(
        0,
        "a dead process keeps a folder without locks",
        LOCK,
        " and holder.born == born(holder.pid)",
        "",
        f"{FOLDER} test_without_locks",
    ),
    bug(
        0,
        "a refused run leaves a folder",
        LOCK,
        "            _leave_nothing(run)\n",
        "            pass\n",
        "tests/test_bad_input.py test_base_of_another_family",
    ),
    # Restarts
    bug(
        0,
        "attempts meet at one place",
        MEETING,
        "return Met(dist.PrefixStore(attempt, store), job)",
        "return Met(dist.PrefixStore(attempt[:7], store), job)",
        f"{RESTART} test_a_restarted_job",
    ),
    bug(
        0,
        "a dead rank's number is taken",
        MEETING,
        "if len(roster) == world_size and roster[rank] == nonce:",
        "if len(roster) == world_size:",
        f"{RESTART} test_every_attempt",
    ),
    bug(
        0,
        "rank 0 does not wait to be heard",
        MEETING,
        'if _values(store, "heard", world_size) == [name] * world_size:',
        "if True:",
        f"{RESTART} test_a_dead_rank",
    ),
    bug(
        0,
        "equal rewards in the first step end a run",
        f"{TRAIN}/step.py",
        "if self.check is not None and not self.is_still:",
        "if self.check is not None:",
        "tests/rl/test_loop.py alike",
    ),
    bug(
        0,
        "an A without gradient behind a step that moved no B",
        f"{TRAIN}/assemble.py",
        "lr > 0 and not self.stepper.is_still",
        "lr > 0",
        "tests/rl/test_loop.py alike",
    ),
    bug(
        0,
        "adapters filled behind the optimizer's copies",
        f"{TRAIN}/assemble.py",
        """        if prepare is not None:
            prepare(model)
        objective = objective_of(config)
        check = GradientCheck(model.adapted, model.shards, model.whole)
        dtype = getattr(torch, config.model.dtype)
        stepper, optimizer = make_stepper(
            config.train, dtype, model.chunks, groups, check, objective
        )
""",
        """        objective = objective_of(config)
        check = GradientCheck(model.adapted, model.shards, model.whole)
        dtype = getattr(torch, config.model.dtype)
        stepper, optimizer = make_stepper(
            config.train, dtype, model.chunks, groups, check, objective
        )
        if prepare is not None:
            prepare(model)
""",
        "tests/train/test_assemble.py test_the_optimizer",
    ),
    bug(
        0,
        "gradients of a run not looked at",
        f"{TRAIN}/assemble.py",
        "make_stepper(config.train, dtype, model.chunks, groups, check, objective)",
        "make_stepper(config.train, dtype, model.chunks, groups, None, objective)",
        "tests/train/test_assemble.py test_a_projection",
    ),
    bug(
        0,
        "a restarted job starts afresh",
        f"{TRAIN}/loop.py",
        "find_checkpoint(config, restarted=run_folder.same_job)",
        "find_checkpoint(config)",
        f"{RESTART} test_a_restarted_job",
    ),
    bug(
        0,
        "a mistake is made again",
        ERRORS,
        "        _leave_mark()\n",
        "",
        "tests/test_launching.py test_a_mistake",
    ),
    # What users type
    bug(
        0,
        "a tilde is a folder's name",
        PATHS,
        "    expanded = os.path.expanduser(text)\n",
        "    expanded = text.lstrip('~')\n",
        "tests/test_paths.py test_every_path",
    ),
    bug(
        0,
        "only the folder itself is looked at",
        "megalora/paths.py",
        "(folder, *folder.parents) if place.exists()",
        "(folder, folder.parents[-1]) if place.exists()",
        "tests/test_paths.py test_what_is_not_there",
    ),
    bug(
        0,
        "a warm-up of any length",
        "megalora/config/train.py",
        "        warmup <= steps,\n",
        "        True,\n",
        "tests/train/test_duration.py test_a_warmup_that",
    ),
    bug(
        0,
        "epochs rounded without a word",
        f"{TRAIN}/duration.py",
        "    if math.isclose(wanted, taken):\n",
        "    if True:\n",
        "tests/train/test_duration.py test_epochs",
    ),
    bug(
        0,
        "Ctrl-C is a crash",
        LAUNCHING,
        "        sys.exit(128 + stopped.sigval)\n",
        "        raise\n",
        "tests/test_launching.py test_a_signal",
    ),
    bug(
        0,
        "a billion ranks laid out",
        "megalora/planner/layouts.py",
        "require(num_ranks <= MAX_RANKS,",
        "require(True,",
        "tests/planner/test_layouts.py test_choices_that_are_none",
    ),
    # The lowest evaluation loss
    bug(
        0,
        "an equal loss taken for a new lowest one",
        BEST,
        "loss < self.loss)",
        "loss <= self.loss)",
        f"{FOLLOWING} of_transformers",
    ),
    bug(
        0,
        "a NaN that is the lowest loss",
        BEST,
        "if math.isfinite(loss) and (self.loss is None or loss < self.loss):",
        "if self.loss is None or not loss >= self.loss:",
        f"{FOLLOWING} never_the_lowest",
    ),
    bug(
        0,
        "patience that ends one evaluation late",
        BEST,
        "return 0 < patience <= self.since",
        "return 0 < patience < self.since",
        f"{FOLLOWING} of_transformers",
    ),
    bug(
        0,
        "the base's loss followed",
        BEST,
        "if loss is None or step == 0:",
        "if loss is None:",
        f"{FOLLOWING} ends_early",
    ),
    bug(
        0,
        "the best checkpoint forgotten with the old ones",
        SAVE,
        "if not (kept_for_loss and folder.name == checkpoint_name(best.step)):",
        "if True:",
        f"{FOLLOWING} ends_early",
    ),
    bug(
        0,
        "no checkpoint of an evaluation between saves",
        "megalora/train/loop.py",
        "saving = is_best and config.checkpoint.keep_best",
        "saving = False",
        f"{FOLLOWING} ends_early",
    ),
    bug(
        0,
        "a resumed run that counts anew",
        "megalora/train/loop.py",
        "now = Progress(step, step, at.state.folder, step, at.state.evaluations)",
        "now = Progress(step, step, at.state.folder, step, Evaluations(last_step=step))",
        f"{FOLLOWING} counts_on",
    ),
    bug(
        0,
        "best left on later steps when a run goes back",
        "megalora/train/loop.py",
        "    notes += restore_best(config, now.best)\n",
        "",
        f"{FOLLOWING} goes_back",
    ),
    bug(
        0,
        "every rank decides by its own loss",
        "megalora/train/batches.py",
        'values = on_first_rank(lambda: found, "the evaluation failed")',
        "values = dict(found)",
        f"{FOLLOWING} first_one_s_loss",
    ),
    bug(
        0,
        "RUN/best read as RUN/latest",
        "megalora/adapters/latest.py",
        "pointer = folder if is_pointer(folder) else folder / LATEST",
        "folder = folder.parent if is_pointer(folder) else folder\n    pointer = folder / LATEST",
        f"{FOLLOWING} ends_early",
    ),
)
