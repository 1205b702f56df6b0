"""Bugs in what is trained of the base itself: embedding, head, norms, routers, rows of tokens. The
same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

UNFROZEN = "megalora/lora/unfrozen.py"
WEIGHT = "megalora/lora/trained_weight.py"
LOGPROBS = "megalora/model/token_logprobs.py"
CHUNK = "megalora/model/chunk_logits.py"
READERS = "megalora/model/chunked_readers.py"
READ = "megalora/adapters/read/whole.py"
WRITE = "megalora/adapters/write/whole.py"
PEFT = "tests/distributed/test_whole_against_peft.py"
RUNS = "tests/train/test_whole.py"
HEAD = "tests/model/test_head.py"
GRID = "tests/parity/test_grid.py"

WHOLE_BUGS: tuple[Bug, ...] = (
    # gradients
    bug(
        0,
        "a norm whose gradient is this rank's tokens' alone",
        WEIGHT,
        'parameter.sum_group = "tp" if replicas > 1 else None',
        "parameter.sum_group = None",
        f"{PEFT} tp2-ep2",
    ),
    bug(
        0,
        "an embedding that each rank takes for the whole",
        WEIGHT,
        "return min(group_size, self.max_shards or group_size)",
        "return 1",
        f"{PEFT} tp2-ep2",
    ),
    bug(
        0,
        "a tied embedding with the gradient of one stage",
        "megalora/train/step.py",
        'if getattr(parameter, "shared_embedding", False):',
        "if False:",
        f"{PEFT} dp2-pp2",
    ),
    bug(
        0,
        "a tied embedding that counts twice in the norm",
        UNFROZEN,
        "            rows.shared = True  # pyright: ignore[reportAttributeAccessIssue]\n",
        "",
        f"{GRID} tokens",
    ),
    bug(
        0,
        "rows of both stages in buckets of other neighbours",
        UNFROZEN,
        "weight.tied and not (chunk.pre_process and chunk.post_process)",
        "False",
        f"{PEFT} tp2-pp2",
    ),
    bug(
        0,
        "norms and routers summed twice, by Megatron too",
        "megalora/train/step.py",
        "            chunk.finish_grad_sync(force_all_reduce="
        'kwargs.get("force_all_reduce", False))\n',
        "            pass\n"
        "        from megatron.core.distributed import finalize_model_grads\n"
        "        finalize_model_grads(model, None, **kwargs)\n",
        f"{PEFT} tp2-ep2",
    ),
    bug(
        0,
        "a frozen norm of all heads",
        "megalora/model/full_width_norm.py",
        "if ctx.needs_input_grad[1]:",
        "if False:",
        f"{PEFT} olmoe",
    ),
    bug(
        0,
        "a weight of the head as it was before the chunk",
        LOGPROBS,
        "drows_KH += d_CV.t() @ x_CH",
        "drows_KH.copy_(d_CV.t() @ x_CH)",
        f"{HEAD} whole_logits",
    ),
    bug(
        0,
        "a trained row beside the base's in the gradient of x",
        LOGPROBS,
        "return d_CV.index_fill_(1, columns_K, 0) @ weight_VH + d_CK @ rows_KH",
        "return d_CV @ weight_VH + d_CK @ rows_KH",
        f"{HEAD} whole_logits",
    ),
    bug(
        0,
        "logits of the base's rows",
        CHUNK,
        "logits = logits.index_copy_(1, columns_K, F.linear(x_CH, rows_KH))",
        "pass",
        f"{PEFT} tp2-pp2",
    ),
    bug(
        0,
        "readers that see the base's rows",
        READERS,
        "h_CR, b_VR, rows_KH, self.columns_K)",
        "h_CR, b_VR, None, None)",
        f"{HEAD} whole_logits",
    ),
    bug(
        0,
        "columns of another rank's tokens",
        UNFROZEN,
        "columns = tokens_K - base.tp_group.rank() * width",
        "columns = tokens_K + 0 * width",
        f"{PEFT} tp2-pp2",
    ),
    bug(
        0,
        "tokens of the first rank on all",
        UNFROZEN,
        "own = tokens_BS.t().chunk(group.size())[group.rank()]",
        "own = tokens_BS.t().chunk(group.size())[0]",
        f"{PEFT} tp2-pp2",
    ),
    bug(
        0,
        "a token taken for its neighbour",
        UNFROZEN,
        "is_trained = trained[places] == own",
        "is_trained = trained[places] >= own",
        f"{PEFT} tp2-pp2",
    ),
    bug(
        0,
        "logits without trained rows outside of the loss",
        UNFROZEN,
        "return out.index_copy(2, own.columns_K, logits), bias",
        "return out, bias",
        f"{RUNS} stock_peft_computes",
    ),
    # the base beside it
    bug(
        0,
        "a reference that is trained along",
        "megalora/lora/switched_off.py",
        "                values[parameter] = kept\n",
        "                pass\n",
        f"{GRID} saved",
    ),
    bug(
        0,
        "the base compared behind a checkpoint",
        "megalora/train/loop.py",
        "    compared = compare_layers(run, is_over=finished >= num_steps or is_compared)\n"
        "    if at.state:\n"
        "        notes += load_checkpoint(at.state, run.model, run.optimizer)\n",
        "    if at.state:\n        notes += load_checkpoint(at.state, run.model, run.optimizer)\n"
        "    compared = compare_layers(run, is_over=finished >= num_steps or is_compared)\n"
        "    if at.state:\n",
        f"{RUNS} is_compared",
    ),
    # files
    bug(
        0,
        "a tied head that is not in the file",
        WRITE,
        "            yield weight_name(LM_HEAD), value.clone()\n",
        "            pass\n",
        f"{RUNS} stock_peft_computes",
    ),
    bug(
        0,
        "a tied embedding that PEFT unties",
        WRITE,
        '            options["ensure_weight_tying"] = True\n',
        "            pass\n",
        f"{RUNS} stock_peft_computes",
    ),
    bug(
        0,
        "a name whose end means other norms",
        "megalora/lora/whole.py",
        "entries += [name] if everywhere else modules",
        'entries += [name.split(".")[-1]]',
        f"{RUNS} stock_peft_computes",
    ),
    bug(
        0,
        "rows in the order of a file for others' tokens",
        READ,
        "rows[order].contiguous()",
        "rows.contiguous()",
        f"{RUNS} order_of_their_tokens",
    ),
    bug(
        0,
        "a copy taken for a tied weight",
        READ,
        'if not config.get("ensure_weight_tying"):',
        "if False:",
        f"{RUNS} untie",
    ),
    bug(
        0,
        "saved modules that a server is given",
        "megalora/adapters/write/engines.py",
        'if (shape.saved or shape.tokens or shape.biases) and name != "peft":',
        "if False:",
        f"{RUNS} no_server",
    ),
    bug(
        0,
        "a merged folder with the base's embedding",
        "megalora/adapters/merge_whole.py",
        "            shards[shard].added[stored.name] = values\n",
        "            pass\n",
        f"{RUNS} merged",
    ),
    bug(
        0,
        "weights that may change in the middle of a run",
        "megalora/train/checkpoint/same_run.py",
        '"lora.modules_to_save": [], ',
        "",
        f"{RUNS} other_weights",
    ),
    bug(
        0,
        "one learning rate for all",
        "megalora/train/optim.py",
        "if config.saved_lr_ratio != 1:",
        "if False:",
        "tests/train/test_loraplus.py trained_whole",
    ),
)
