"""Bugs that only a GPU would meet: a tensor on the wrong device, a new wait of the host. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

STAGED, STAGED_TEST = "megalora/staged.py", "tests/distributed/test_staged.py"
MODEL, MODEL_TEST = "benchmarks/tile_model.py", "tests/test_tile_model.py"
QUACK, QUACK_TEST = "benchmarks/quack_gemm.py", "tests/test_quack_arm.py"
EVIDENCE, EVIDENCE_TEST = "benchmarks/evidence.py", "tests/test_evidence.py"
ANCHORS_TEST = "tests/kernels/test_anchors.py"
ENVIRONMENT, SHARE_TEST = "megalora/environment.py", "tests/test_share_gpu.py"

ALL, MACHINE, OUTCOMES = "benchmarks/gpu_all.py", "benchmarks/gpu_machine.py", "benchmarks/gpu_outcomes.py"
TRACE, PLAN, TIMING = "benchmarks/step_trace.py", "benchmarks/model_plan.py", "benchmarks/gpu_timing.py"
ALL_TEST, TRACE_TEST = "tests/test_gpu_all.py", "tests/test_step_trace.py"
SCRIPTS_TEST, SUMMARY_TEST = "tests/test_benchmark_scripts.py", "tests/test_gpu_summary.py"

PEERS_TEST, ROWS = "tests/test_peers.py", "benchmarks/peer_rows.py"

# fmt: off
GPU_BUGS: tuple[Bug, ...] = (
    bug(0, "a descriptor whose rows overlap", "kernels/megalora_kernels/descriptors.py", "shape, [w.stride(1), 1], block)", "shape, [w.shape[2] // 2, 1], block)", "tests/kernels/test_launch_path.py reach"),
    bug(0, "a tile's rows by descriptor that were asked for by pointers", "kernels/megalora_kernels/gemm_kernel.py", '    if variant.rows == "tma":\n        x_operand', '    if variant.weight == "tma":\n        x_operand', "tests/kernels/test_launch_path.py reach"),
    bug(0, "a stale page of evidence that passes", EVIDENCE, "    if args.check:\n", "    if args.check and now == before:\n", f"{EVIDENCE_TEST} stale"),
    bug(0, "a dry run taken for a measurement", EVIDENCE, "{} if dry or on_cpu else found", "{} if on_cpu else found", f"{EVIDENCE_TEST} dry"),
    bug(0, "an H200's bandwidth beside an H100's constant", EVIDENCE, "digits(None if other_card else value)", "digits(value)", f"{EVIDENCE_TEST} fill"),
    bug(0, "ratios to another back end's base", EVIDENCE, 'arm, f"base {backend}")', 'arm, "base triton")', f"{EVIDENCE_TEST} ratios"),
    bug(0, "an anchor timed before it is checked", "benchmarks/anchor_lab.py", "        if not error <= ALLOWED[self.dtype]:", "        if error > 9:", f"{ANCHORS_TEST} wrong"),
    bug(0, "anchors measured again by a second call", "benchmarks/anchors.py", "        if anchor.name in kept:", "        if anchor.name in not_reached:", f"{ANCHORS_TEST} goes_on"),
    bug(0, "an anchor above its range as expected", "benchmarks/anchors.py", 'if row["value"] > row["expected"]["high"]:', 'if row["value"] < row["expected"]["low"] / 2:', f"{ANCHORS_TEST} range"),
    bug(0, "a product of which no expert is checked", "benchmarks/anchor_cases.py", "        for e in (0, experts - 1):\n            mine = slice(e * rows, (e + 1) * rows)\n            taken", "        for e in ():\n            mine = slice(e * rows, (e + 1) * rows)\n            taken", f"{ANCHORS_TEST} wrong"),
    bug(0, "torch's GEMM timed as quack's", QUACK, "    module._grouped_mm = gemm", "    gemm.calls += 0", f"{QUACK_TEST} agrees"),
    bug(0, "quack handed the ends of experts alone", QUACK, "F.pad(offs, (1, 0))", "offs", f"{QUACK_TEST} agrees"),
    bug(0, "quack left in torch's place", QUACK, "        module._grouped_mm = torch_s", "        pass", f"{QUACK_TEST} afterwards"),
    bug(0, "quack's goal against its slower tile", "benchmarks/goals.py", "max(speeds))]", "min(speeds))]", f"{QUACK_TEST} goal"),
    bug(0, "a last wave that costs its share alone", MODEL, "        waves = math.ceil(waves)", "        pass", f"{MODEL_TEST} hand"),
    bug(0, "tiles that are half empty cost half", MODEL, "math.ceil(product.rows_per_expert / variant.block_m)", "product.rows_per_expert / variant.block_m", f"{MODEL_TEST} published"),
    bug(0, "copies into shared memory are free", MODEL, "(read + copied) / gpu.shared", "read / gpu.shared", f"{MODEL_TEST} tensor_rate"),
    bug(0, "weights read once for all experts", MODEL, "experts * depth * product.N)", "depth * product.N)", f"{MODEL_TEST} bound_by_hbm"),
    bug(0, "a collective's result left on the host", STAGED, "tensor.detach().copy_(result.view(tensor.shape))", "result.view(tensor.shape)", f"{STAGED_TEST} delivers"),
    bug(0, "a result taken before gloo has it", STAGED, "        for part in self._parts:\n            part.wait()", "        if self._deliver is not None:\n            self._deliver()\n            self._deliver = None\n        for part in self._parts:\n            part.wait()", f"{STAGED_TEST} delivers"),
    bug(0, "a result delivered as often as it is waited for", STAGED, "        self._deliver = None\n        return True", "        return True", f"{STAGED_TEST} behave"),
    bug(0, "an average over ranks that is a sum", STAGED, "opts.reduceOp = dist.ReduceOp.SUM\n        return self.size()", "opts.reduceOp = dist.ReduceOp.SUM\n        return 1", f"{STAGED_TEST} behave"),
    bug(0, "of unequal parts only the first rank's kept", STAGED, "[received.sum(0)]", "[received[0]]", f"{STAGED_TEST} behave"),
    bug(0, "a copy for gloo that is the tensor itself", STAGED, 'to("cpu", copy=True, memory_format=torch.contiguous_format)', 'to("cpu")', f"{STAGED_TEST} delivers"),
    bug(0, "a share of a GPU without room for the process", "megalora/host.py", "total // world_size() - CONTEXT_BYTES", "total // world_size()", f"{SHARE_TEST} share"),
    bug(0, "ranks of several nodes on one GPU", ENVIRONMENT, 'if value == "1" and here != world:', 'if value == "1" and here > world:', f"{SHARE_TEST} refused"),
    bug(0, "NCCL's watchdog kills the process", ENVIRONMENT, '_set(variables, ERROR_HANDLING, "2")', '_set(variables, ERROR_HANDLING, "3")', f"{SHARE_TEST} variables"),
    bug(0, "a user's allocator settings lose", ENVIRONMENT, "if not any(name in variables for name in names):", "if names[0] not in variables:", f"{SHARE_TEST} user"),
    bug(0, "the allocator told after torch was imported", "megalora/train/__main__.py", "    set_defaults(Path(config.checkpoint.dir))  # before torch is imported\n    from megalora import host\n", "    from megalora import host\n\n    set_defaults(Path(config.checkpoint.dir))\n", f"{SHARE_TEST} before_its_import"),
    bug(0, "vLLM started beside our model", "megalora/serve/verify.py", "    host.release_memory()  # vLLM takes nearly all of a GPU\n", "", "tests/serve/test_verify_memory.py vllm"),
    bug(0, "memory kept by torch's cache", "megalora/host.py", "        torch.cuda.empty_cache()", "        pass", f"{SHARE_TEST} memory_goes"),
    bug(0, "a communicator's abort that is no lost peer", "megalora/train/lost.py", "|NCCL communicator was aborted", "", f"{SHARE_TEST} nccl_lost"),
    bug(0, "aliases counted as one value each", "megalora/yaml_limits.py", "num_nodes += size", "num_nodes += 1", "tests/test_config.py hostile_file"),
    bug(0, "an alias inside what it names", "megalora/yaml_limits.py", "if size == 0:", "if size < 0:", "tests/test_config.py hostile"),
    bug(0, "an override's value read unchecked", "megalora/config_file.py", "            check_yaml(value)\n", "", "tests/test_config.py hostile_override"),
    bug(0, "a failed step's exit code swallowed", MACHINE, "        if code:\n            return \"failed\"", "        if code < 0:\n            return \"failed\"", f"{ALL_TEST} named"),
    bug(0, "a step's budget not passed on", "benchmarks/gpu_steps.py", 'BUDGET: f"{budget_s:.0f}"', 'BUDGET: f"{SECONDS:.0f}"', f"{ALL_TEST} leaves_over"),
    bug(0, "time left over kept from the next step", ALL, "left_s = ends[step.name] - (time.monotonic() - start)", "left_s = seconds * step.share / sum(s.share for s in steps)", f"{ALL_TEST} leaves_over"),
    bug(0, "a second call runs done steps again", OUTCOMES, 'if self.outcomes[step.name].result != "ok"', 'if self.outcomes[step.name].result != "never"', f"{ALL_TEST} second_call"),
    bug(0, "what failed before comes first again", OUTCOMES, 'key=lambda step: self.outcomes[step.name].result == "failed"', "key=lambda step: 0", f"{ALL_TEST} second_call"),
    bug(0, "a step with cases left over called done", MACHINE, '("part", f"{len(left)} cases not reached, first {left[0]}") if left else ("ok", "")', '("ok", "")', f"{ALL_TEST} second_call"),
    bug(0, "a stopped step's ranks live on", MACHINE, "    os.killpg(process.pid, signal.SIGTERM)\n    end", "    process.kill()\n    process.wait()\n    return\n    end", f"{ALL_TEST} beyond_its_share"),
    bug(0, "a step that outlives the script", MACHINE, "        _end(process)\n        raise", "        raise", f"{ALL_TEST} script_that_is_ended"),
    bug(0, "torchrun killed before it has ended its ranks", MACHINE, "time.monotonic() + GRACE_S", "time.monotonic()", f"{ALL_TEST} has_time_to_end"),
    bug(0, "tests that passed are run again", "benchmarks/gpu_tests.py", "items[:] = [item for item in items if item.nodeid not in passed]", "items[:] = list(items)", f"{ALL_TEST} tests_step"),
    bug(0, "tests without time taken for skipped ones", "benchmarks/gpu_tests.py", "if why == OUT_OF_TIME:", "if why == DEADLINE:", f"{ALL_TEST} tests_step"),
    bug(0, "a committed JSON counts as this run's", ALL, "    if not before.calls:\n", "    if before.calls:\n", f"{ALL_TEST} another_run"),
    bug(0, "a dry run's results continued on a GPU", OUTCOMES, "if was_dry != self.dry:", "if was_dry and was_dry == self.dry:", f"{ALL_TEST} another_kind"),
    bug(0, "overlapping work of the device counted twice", TRACE, "busy += max(0.0, span.end - max(span.begin, last.end))", "busy += span.us", f"{TRACE_TEST} gaps_are_between"),
    bug(0, "a gap measured from the last start, not the last end", TRACE, "        if span.end > last.end:\n            last = span", "        last = span", f"{TRACE_TEST} overlaps"),
    bug(0, "waits of the measurement counted as the step's", TRACE, "step.begin <= s.begin <= step.end", "step.begin <= s.begin", f"{TRACE_TEST} waits"),
    bug(0, "kernels of backward counted as forward's", TRACE, 'phase, backward_seen = "backward", True', 'phase, backward_seen = "forward", True', f"{TRACE_TEST} phase"),
    bug(0, "steps of a trace added up, not averaged", TRACE, '"idle_us": idle / count', '"idle_us": idle', f"{TRACE_TEST} averaged"),
    bug(0, "an error in percent of what was predicted", PLAN, "100 * (predicted / measured - 1)", "100 * (1 - measured / predicted)", f"{TRACE_TEST} percent"),
    bug(0, "the planner's seconds taken for milliseconds", PLAN, '"step_ms": 1e3 * found.time.seconds', '"step_ms": found.time.seconds', f"{TRACE_TEST} very_configuration"),
    bug(0, "the CUDA context counted as the allocator's", PLAN, " - found.memory[CONTEXT]", "", f"{TRACE_TEST} very_configuration"),
    bug(0, "a record of other settings continued", TIMING, "if record.get(name) != value]", "if name not in record]", f"{SCRIPTS_TEST} measured_alike"),
    bug(0, "a budget that begins after the imports", TIMING, "time.monotonic() + seconds - gone", "time.monotonic() + seconds", f"{SCRIPTS_TEST} budget"),
    bug(0, "layouts that passed are trained again", "benchmarks/shared_gpu.py", "missing = [case for case in cases if case.name not in passed]", "missing = list(cases)", f"{SCRIPTS_TEST} held_against"),
    bug(0, "more taken for better of every goal", "benchmarks/gpu_summary.py", "value / goal.must - 1 if goal.at_least else 1 - value / goal.must", "value / goal.must - 1", f"{SUMMARY_TEST} by_how_much"),
    bug(0, "the untuned value decides", "benchmarks/gpu_summary.py", "last = before if after is None else after", "last = after if before is None else before", f"{SUMMARY_TEST} last_measurement"),
    bug(0, "A's of one input that drift apart", "benchmarks/peer_case.py", "                gradient.copy_(total)", "                gradient.add_(0)", f"{PEERS_TEST} all_installed"),
    bug(0, "a shared adapter held against one per expert", "benchmarks/peer_megatron.py", "Tied([]), not shared, chunk)", "Tied([]), True, chunk)", f"{PEERS_TEST} all_installed"),
    bug(0, "Bridge takes Transformer Engine to be installed", "benchmarks/bridge_lora.py", ".HAVE_TE = False", ".HAVE_TE = True", f"{PEERS_TEST} all_installed"),
    bug(0, "the stand-in for Transformer Engine stays importable", "benchmarks/bridge_lora.py", "    with patch.dict(sys.modules, {engine.__name__: engine, pytorch.__name__: pytorch}):\n        spec.loader.exec_module(layers)", "    sys.modules |= {engine.__name__: engine, pytorch.__name__: pytorch}\n    spec.loader.exec_module(layers)", f"{PEERS_TEST} stays_missing"),
    bug(0, "a loss that is not a number agrees", ROWS, "if not all(abs(a - b) <= limit for", "if any(abs(a - b) > limit for", f"{PEERS_TEST} let_through"),
    bug(0, "a peer's base not compared", ROWS, "if not abs(row[\"losses\"][0] - want[0]) <=", "if not 0 * abs(row[\"losses\"][0] - want[0]) <=", f"{PEERS_TEST} let_through"),
    bug(0, "times of arms that do not agree", ROWS, "for key, value in row.items() if key not in TIMES}", "for key, value in row.items()}", f"{PEERS_TEST} one_round"),
    bug(0, "a comparison that failed ends well", "benchmarks/peers.py", "any(case[\"wrong\"] or not case", "any(not case", f"{PEERS_TEST} leaves_no_times"),
    bug(0, "a median of each arm's steps, rounds apart", ROWS, "getattr(a, field.name) / getattr(b, field.name) for a, b in pairs", "getattr(a, field.name) / getattr(reference[0], field.name) for a, b in pairs", f"{PEERS_TEST} one_round"),
    bug(0, "a finished row of an earlier call run again", "benchmarks/peers.py", "name not in self.rows or self.rows[name][\"status\"].startswith(CUT_OFF)", "True", f"{PEERS_TEST} all_installed"),
    bug(0, "gate and up exchanged in the shared weights", "benchmarks/random_weights.py", "halves[projection == \"up_proj\"]", "halves[projection == \"gate_proj\"]", f"{PEERS_TEST} published_names"),
)
# fmt: on
