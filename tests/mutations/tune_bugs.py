"""Bugs in the table of measured variants, in the sweep that writes it, and in what is decided by it."""

from tests.mutations.bugs import Bug, bug

TUNED, TABLE, BACKEND = (f"kernels/megalora_kernels/{name}.py" for name in ("tuned", "tuned_table", "backend"))
SWEEP, RECORD, POINTS, COMPILE = (f"benchmarks/tune_{name}.py" for name in ("sweep", "record", "points", "compile"))
LOOK_UP, SWEPT = "tests/kernels/test_tuned.py", "tests/test_tune.py"
ROOM = "tests/planner/test_memory.py test_room"

# fmt: off
TUNE_BUGS: tuple[Bug, ...] = (
    # Looking up
    bug(0, "a row four times as many rows away", TUNED, "if bucket_steps > 1 or", "if bucket_steps > 2 or", f"{LOOK_UP} neighbours"),
    bug(0, "the upper of two neighbours", TUNED, "bucket_steps, key.rows_per_expert\n", "bucket_steps, -key.rows_per_expert\n", f"{LOOK_UP} lower_neighbour"),
    bug(0, "a row for any rank", TUNED, "(rank_steps > 1 and wanted.R > 0)", "(rank_steps > 9 and wanted.R > 0)", f"{LOOK_UP} half_or_double"),
    bug(0, "rows before the rank", TUNED, "return rank_steps, abs(key.blocks - wanted.blocks), bucket_steps,", "return bucket_steps, abs(key.blocks - wanted.blocks), rank_steps,", f"{LOOK_UP} own_rank"),
    bug(0, "buckets halved at the mean of two", TUNED, "math.sqrt(low * high)", "(low + high) / 2", f"{LOOK_UP} bucket_is"),
    bug(0, "a variant that the rank itself cannot run", TUNED, "if found is None or problem(found, product, *self.limits) is not None:", "if found is None:", f"{LOOK_UP} rank_itself"),
    bug(0, "the rule's answer remembered for a whole bucket", TUNED, "bucket, bisect_right(RULE_EDGES, rows))", "bucket)", f"{LOOK_UP} not_the_bucket"),
    bug(0, "an answer remembered for every rank", TUNED, "p.N, p.K, p.rank, p.blocks, p.gathered, bucket,", "p.N, p.K, p.blocks, p.gathered, bucket,", f"{LOOK_UP} half_or_double"),
    bug(0, "nothing remembered", TUNED, "found = self.known[asked] = self._look_up", "found = self._look_up", f"{LOOK_UP} remembered"),
    bug(0, "a named file that is not there overlooked", TUNED, "        if named is not None:\n", "        if named is not None and False:\n", f"{LOOK_UP} named_file"),
    bug(0, "MEGALORA_TUNED=off overlooked", TUNED, 'if named == "off":', 'if named == "OFF":', f"{LOOK_UP} ships"),
    bug(0, "the crossing of the farthest rank", TUNED, "nearest = min(like,", "nearest = max(like,", f"{LOOK_UP} nearest_rank"),
    # The file
    bug(0, "points where the rule stands not read", TABLE, "        _add(where, variants, _key(row), None)\n", "", f"{LOOK_UP} to_stand"),
    bug(0, "the table of another card", TABLE, 'if content["gpu"] != gpu:', "if False:", f"{LOOK_UP} refused"),
    bug(0, "unknown fields overlooked", TABLE, "if name not in wanted and name not in optional]", "if False]", f"{LOOK_UP} refused"),
    bug(0, "a variant that cannot run overlooked", TABLE, "        if why and same_triton:\n", "        if False:\n", f"{LOOK_UP} refused"),
    bug(0, "another Triton's variant ends a run", TABLE, "        if why and same_triton:\n", "        if why:\n", f"{LOOK_UP} another_triton"),
    bug(0, "limits of the card overlooked", TABLE, "problem(variant, _product(key), *limits)", "problem(variant, _product(key))", f"{LOOK_UP} this_card"),
    bug(0, "of two rows the last", TABLE, "    if key in found:\n", "    if False:\n", f"{LOOK_UP} refused"),
    bug(0, "never faster read as always", TABLE, 'math.inf if row["vendor_from"] is None', '0.0 if row["vendor_from"] is None', f"{LOOK_UP} nearest_rank"),
    # The back end, and room in the weights
    bug(0, "all rows taken for one expert's", BACKEND, "rows_per_expert = num_rows / weights[0].shape[0]", "rows_per_expert = num_rows", "tests/kernels/test_backend.py gpu_takes"),
    bug(0, "the back end without the table", BACKEND, "RULE_VENDOR_FROM if layer is None else vendor_from(", "RULE_VENDOR_FROM if layer else vendor_from(", "tests/kernels/test_backend.py test_the_table"),
    bug(0, "the table asked for another layer", "megalora/model/experts.py", "layer = (weight.shape[1], weight.shape[2])", "layer = (weight.shape[2], weight.shape[1])", "tests/planner/test_memory.py own_layer"),
    bug(0, "rows expected without expert parallelism", "megalora/model/shape.py", "self.top_k * p.etp * p.ep / self.num_experts", "self.top_k * p.etp / self.num_experts", ROOM),
    bug(0, "rows expected of one sample", "megalora/model/shape.py", "config.train.micro_batch_size * config.data.max_length)", "config.data.max_length)", ROOM),
    bug(0, "room planned by the number of experts", "megalora/planner/memory.py", "    return work.crossings.prefers_grouped_mm(rows, s.hidden,", "    return s.num_experts // p.ep <= 32 or work.crossings.prefers_grouped_mm(rows, s.hidden,", ROOM),
    bug(0, "planned with the rank of one projection", "megalora/planner/memory.py", "max((sum(a.rank for a in adapted) for adapted in modules), default=0)", "max((a.rank for adapted in modules for a in adapted), default=0)", ROOM + "_by_the_stacked"),
    bug(0, "planned by another card's table", "megalora/planner/crossings.py", "if words and words[0] in file.stem", "if words and words[0] not in file.stem", "tests/planner/test_crossings.py of_the_card"),
    bug(0, "planned by the farthest rank", "megalora/planner/crossings.py", "*_, least = min(like", "*_, least = max(like", "tests/planner/test_crossings.py answers_as"),
    bug(0, "never faster planned as always", "megalora/planner/crossings.py", 'return float("inf") if', "return 0.0 if", "tests/planner/test_crossings.py answers_as"),
    bug(0, "the table left out of a plan", "megalora/planner/command.py", "replace(Workload.of(config, options.imbalance), crossings=crossings_of(machine.name))", "Workload.of(config, options.imbalance)", "tests/planner/test_crossings.py plan_asks"),
    bug(0, "room at the last row alone", BACKEND, "NEARLY = 0.99", "NEARLY = 1.0", ROOM),
    bug(0, "a plan with room reused without", "megalora/planner/memory.py", "e, stage, has_room(model, layout, work))", "e, stage)", ROOM),
    bug(0, "training does not say which rows it expects", "megalora/train/loop.py", "                rows_per_expert=shape.rows_per_expert(config),\n", "", "tests/train/test_expected_rows.py expects"),
    # The sweep
    bug(0, "spread overlooked", RECORD, "max(GAIN, 2 * spread)", "GAIN", f"{SWEPT} noise_writes"),
    bug(0, "a hundredth is a row", RECORD, "GAIN = 0.02", "GAIN = 0.0", f"{SWEPT} one_per_cent"),
    bug(0, "spread of the best alone", SWEEP, "spread = max(spread, rule_spread)", "spread = spread", f"{SWEPT} noisier"),
    bug(0, "the rule's own left out of round two", SWEEP, "for v in (own, *best) if v in passed", "for v in best if v in passed", f"{SWEPT} round_two"),
    bug(0, "of equals not the rule's own", SWEEP, "if rule_us is None or beats(us, rule_us, spread):", "if rule_us is None or us <= rule_us:", f"{SWEPT} noise_writes"),
    bug(0, "the winner of round one", SWEEP, "best = min(second, key=lambda v: second[v][0])", "best = min(second, key=lambda v: first[v][0])", f"{SWEPT} round_one"),
    bug(0, "a wrong variant timed", SWEEP, "            if why is None:\n                passed.append(variant)\n                continue\n", "            passed.append(variant)\n            if why is None:\n                continue\n", f"{SWEPT} wrong_variant"),
    bug(0, "checked on uneven experts alone", SWEEP, "passed = self._passed(gemm, variants, operands)", "passed = variants", f"{SWEPT} many_rows_alone"),
    bug(0, "rows compared as a whole", POINTS, "error_M = (y_MN.float() - want_MN).norm(dim=1) / want_MN.norm(dim=1)", "error_M = ((y_MN.float() - want_MN).norm() / want_MN.norm())[None]", f"{SWEPT} one_wrong_row"),
    bug(0, "memory not filled before the check", POINTS, "    torch.use_deterministic_algorithms(True)  # fills what is allocated\n", "", f"{SWEPT} wrong_variant"),
    bug(0, "NaN is no error", POINTS, "nan_to_num(nan=torch.inf)", "nan_to_num(nan=0.0)", f"{SWEPT} wrong_variant"),
    bug(0, "the second run's bits not looked at", POINTS, "if not torch.equal(y_MN, again_MN):", "if False:", f"{SWEPT} wrong_variant"),
    bug(0, "a variant that raises ends the sweep", SWEEP, "except Exception as error:  # whatever a launch", "except ValueError as error:  # whatever a launch", f"{SWEPT} raises"),
    bug(0, "a dead device measured on", SWEEP, "        if not self.tools.alive():\n", "        if False:\n", f"{SWEPT} dead_device"),
    bug(0, "a failure ends the sweep", SWEEP, "except Exception as error:  # out of memory", "except MemoryError as error:  # out of memory", f"{SWEPT} point_that_fails"),
    bug(0, "a failed point tried again", SWEEP, "points = [p for p in points if p.label not in self.record.failures]", "points = list(points)", f"{SWEPT} same_point"),
    bug(0, "what took the process down tried again", RECORD, "        if self.running.is_file():\n", "        if False:\n", f"{SWEPT} took_the_process"),
    bug(0, "what was not compiled launched all the same", SWEEP, "or name in self.uncompiled", "", f"{SWEPT} not_reach"),
    bug(0, "all compiled again for the next group", SWEEP, "        self.compiled |= found.keys()\n", "", f"{SWEPT} nothing_twice"),
    bug(0, "compiled for one number of experts", SWEEP, "[len(self.tools.uneven), point.experts]", "[point.experts]", f"{SWEPT} experts_they"),
    bug(0, "a point begun that will not end in time", SWEEP, "max(LEAST_SECONDS, 1.2 * self.longest.get(kind, 0.0))", "LEAST_SECONDS", f"{SWEPT} slow_point"),
    bug(0, "a second call begins anew", SWEEP, "if p.label not in self.record.points]", "]", f"{SWEPT} second_call"),
    bug(0, "another Triton's file continued", RECORD, "if then != now:", "if False:", f"{SWEPT} another_machines"),
    bug(0, "a crossing with a gap below it", RECORD, "            break\n", "            continue\n", f"{SWEPT} from_where_on"),
    bug(0, "layers timed without the table", SWEEP, "        tuned.forget()\n", "", f"{SWEPT} so_far"),
    bug(0, "a dead device ends all", "benchmarks/tune.py", "if code in (0, 1, MISTAKE):", "if code in (0, 1, MISTAKE, DEAD_DEVICE):", f"{SWEPT} started_again"),
    bug(0, "the budget is a wish", "benchmarks/tune.py", "            code = process.wait(max(0.0, end - time.monotonic()))", "            code = process.wait()", f"{SWEPT} budget_is_spent"),
    bug(0, "a child that died asked again", COMPILE, "            if child.died:\n                child = None\n", "", f"{SWEPT} abort"),
)
# fmt: on
