"""Bugs that a pretended GPU meets, a tensor on the wrong device or a new wait of the host, and
those of what was mended for it; and bugs of the optimizer's groups."""

from tests.mutations.bugs import Bug, bug

STEP, INPUTS, COVERAGE, DRIFT, OPTIM, ASSEMBLE = (
    f"megalora/{name}.py"
    for name in (
        "train/step",
        "train/inputs",
        "lora/coverage",
        "train/drift",
        "train/optim",
        "train/assemble",
    )
)
DISPATCHER = "megalora/model/dispatcher.py"
EXPERTS = "megalora/lora/experts.py"
ROUTER = "megalora/lora/router.py"
ROUTE, REGROUP, ENGINE = (
    f"kernels/megalora_kernels/{name}.py" for name in ("route", "regroup", "engine")
)
WAITS = "tests/pretended/test_waits.py"
ONE_GPU, TP_EP, PP, MANY_ROWS = (
    f"{WAITS} {name}" for name in ("one_gpu", "tp2_ep2", "pp2_first_stage", "many_rows")
)

WAIT_BUGS: tuple[Bug, ...] = (
    # A tensor on the wrong device
    bug(
        0,
        "slots made on the host",
        ROUTE,
        "slots_TK = torch.empty(num_tokens, top_k, **new)",
        "slots_TK = torch.empty(num_tokens, top_k, dtype=torch.int32)",
        ONE_GPU,
    ),
    bug(
        0,
        "counts of an exchange left on the host",
        DISPATCHER,
        "self.counts_RE = pairs.flatten(0, 1)",
        "self.counts_RE = pairs.flatten(0, 1).cpu()",
        TP_EP,
    ),
    # A wait of the host
    bug(
        0,
        "the loss read before the optimizer's step",
        ASSEMBLE,
        "        with around_optimizer or nullcontext():\n",
        "        float(sum_and_count[0])\n        with around_optimizer or nullcontext():\n",
        ONE_GPU,
    ),
    bug(
        0,
        "the norm of every gradient read",
        OPTIM,
        "torch.stack(torch._foreach_norm(gradients))",
        "torch.tensor([float(g.norm()) for g in gradients], device=total.device)",
        ONE_GPU,
    ),
    bug(
        0,
        "a gradient read for every projection",
        COVERAGE,
        "found.append(parameter.main_grad[index].any())",
        "found.append(torch.tensor(bool(parameter.main_grad[index].any()), device=alive.device))",
        ONE_GPU,
    ),
    bug(
        0,
        "a hash read for every parameter",
        DRIFT,
        "torch.stack([bit_hash(tensor) for tensor in tensors])",
        "torch.tensor([int(bit_hash(tensor)) for tensor in tensors], device=places.device)",
        ONE_GPU,
    ),
    bug(
        0,
        "the router looks at its logits",
        ROUTER,
        "        h = self.factors.times_a(",
        "        assert logits.isfinite().all()\n        h = self.factors.times_a(",
        ONE_GPU,
    ),
    bug(
        0,
        "the dispatcher looks for idle experts",
        DISPATCHER,
        "        sending, values_M = route_to_ranks(",
        "        self.idle = (routing_map.sum(0) == 0).nonzero()\n        sending, values_M ="
        " route_to_ranks(",
        TP_EP,
    ),
    bug(
        0,
        "rows of a size that the host must ask for",
        REGROUP,
        "source_M = torch.empty(num_pairs, **new)",
        "source_M = torch.empty(int(counts_RE.sum()), **new)",
        TP_EP,
    ),
    bug(
        0,
        "the check of every token's experts waits",
        ROUTE,
        "    if routing_map_TE.is_cuda and routing_map_TE.shape[0]:",
        "    bool((routing_map_TE.sum(1) == top_k).all())\n    if routing_map_TE.is_cuda and"
        " routing_map_TE.shape[0]:",
        ONE_GPU,
    ),
    bug(
        0,
        "stages wait for the device behind messages",
        "megalora/model/build.py",
        "batch_p2p_sync=False",
        "batch_p2p_sync=True",
        PP,
    ),
    bug(
        0,
        "stages ask for shapes",
        "megalora/model/build.py",
        "variable_seq_lengths=False",
        "variable_seq_lengths=p.pp > 1 and p.vpp == 1",
        PP,
    ),
    bug(
        0,
        "the router compiled on a GPU",
        "megalora/host.py",
        "    megatron_patches.leave_router_uncompiled()\n    if torch",
        "    if torch",
        ONE_GPU,
    ),
    # Batches
    bug(
        0,
        "batches from pageable memory",
        "megalora/host.py",
        "tensor.pin_memory().to(device(), non_blocking=True)",
        "tensor.to(device(), non_blocking=True)",
        ONE_GPU,
    ),
    bug(
        0,
        "a copy that is waited for",
        "megalora/host.py",
        "tensor.pin_memory().to(device(), non_blocking=True)",
        "tensor.pin_memory().to(device())",
        ONE_GPU,
    ),
    bug(
        0,
        "a copy for every microbatch's tensors",
        INPUTS,
        "    flat = host.to_device(torch.cat(pieces).int())\n",
        "    flat = torch.cat([host.to_device(piece.int()) for piece in pieces])\n",
        ONE_GPU,
    ),
    # The back end
    bug(
        0,
        "passes chosen by a device's name",
        ENGINE,
        "IN_TRITON if routing.offsets_E.is_cuda else IN_TORCH",
        'IN_TRITON if routing.offsets_E.device.type == "cuda" else IN_TORCH',
        MANY_ROWS,
    ),
    bug(
        0,
        "no room for adapters on a GPU",
        EXPERTS,
        'return device.type != "cpu" and prefers_grouped_mm',
        'return device.type == "cpu" and prefers_grouped_mm',
        MANY_ROWS,
    ),
    # Values
    bug(
        0,
        "a stage receives the next microbatch's length",
        "megalora/train/known_shapes.py",
        "self.coming_backward = iter(shapes)",
        "self.coming_backward = iter(shapes[1:] + shapes[:1])",
        "tests/train/test_inputs.py test_stages",
    ),
    bug(
        0,
        "labels outside of the loss in the loss",
        INPUTS,
        "np.flatnonzero(own(batch.loss_mask).numpy())",
        "np.flatnonzero(own(batch.labels).numpy())",
        "tests/train/test_inputs.py test_what_arrives",
    ),
    bug(
        0,
        "gradients of the ranks' own norm",
        OPTIM,
        "    dist.all_reduce(total, group=group)\n",
        "",
        "tests/train/test_optim.py test_a_step",
    ),
    bug(
        0,
        "experts of two ranks hashed as replicas",
        DRIFT,
        "share = groups.ep.rank() if shard.is_expert else 0",
        "share = 0",
        "tests/train/test_drift.py test_tensors",
    ),
    bug(
        0,
        "experts hashed as one whole",
        DRIFT,
        "share = groups.ep.rank() if shard.is_expert else 0",
        "share = groups.ep.rank()",
        "tests/train/test_drift.py test_tensors",
    ),
    bug(
        0,
        "rows of another projection looked at",
        COVERAGE,
        "index = shard.index\n",
        "index = (slice(None),)\n",
        "tests/lora/test_coverage.py test_a_projection",
    ),
    bug(
        0,
        "one rank's tensors taken for all",
        COVERAGE,
        "    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)\n",
        "",
        "tests/lora/test_coverage.py test_every_rank",
    ),
    bug(
        0,
        "clipped though clipping is off",
        OPTIM,
        "part.config.clip_grad > 0 and clipped",
        "clipped",
        "tests/train/test_optim.py test_a_step",
    ),
    # one kernel for AdamW
    bug(
        0,
        "AdamW in passes on a GPU",
        OPTIM,
        "    if fuses():\n",
        "    if False:\n",
        "tests/pretended/test_waits.py one_launch",
    ),
    bug(
        0,
        "an optimizer of the experts alone in one kernel",
        OPTIM,
        "    for part in _parts(optimizer):\n        # No state is there yet",
        "    for part in _parts(optimizer)[1:]:\n        # No state is there yet",
        "tests/pretended/test_waits.py one_launch",
    ),
    bug(
        0,
        "one kernel on the CPU, whose rounding depends on the layout",
        OPTIM,
        'return host.device().type != "cpu"',
        "return True",
        "tests/train/test_fused.py differs",
    ),
    bug(
        0,
        "a count of steps that begins anew under one kernel",
        OPTIM,
        'state["step"].fill_(step)',
        'state["step"].fill_(0)',
        "tests/train/test_fused.py changes",
    ),
    bug(
        0,
        "square roots planned that one kernel does not keep",
        "megalora/planner/state_bytes.py",
        "    return 2 * GRADIENT * max(over_tp, over_etp)\n",
        "    return 2 * GRADIENT * max(over_tp, over_etp) + adapters_of(chunks, model, p)\n",
        "tests/planner/test_memory.py tables_alone",
        (
            "def step_bytes(",
            "def adapters_of(chunks, model, p):\n"
            "    from megalora.planner.adapter_count import adapter_parameters\n"
            "    return sum(adapter_parameters(model, p, chunk).expert for chunk in chunks)\n\n\n"
            "def step_bytes(",
        ),
    ),
    # LoRA+
    bug(
        0,
        "LoRA+ overwritten with one rate for all",
        OPTIM,
        'group["lr"] = lr * (group["max_lr"] / peak)',
        'group["lr"] = lr',
        "tests/train/test_loraplus.py test_groups_are_those_of_peft",
    ),
    bug(
        0,
        "the higher rate given to A",
        OPTIM,
        'ParamKey(name=f"*.lora_{factor}.*")',
        'ParamKey(name="*.lora_A")',
        "tests/train/test_loraplus.py test_two_rates_in_every_layout",
    ),
    bug(
        0,
        "experts left out of LoRA+",
        OPTIM,
        'ParamKey(name=f"*.lora_{factor}.*")',
        'ParamKey(name=f"*.self_attention.*.lora_{factor}.*")',
        "tests/train/test_loraplus.py test_two_rates_in_every_layout",
    ),
)
