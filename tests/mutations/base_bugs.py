"""Bugs in what a base folder's config and tensors are held to. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

FIELDS, ROPE, ROTARY = (f"megalora/model/{name}.py" for name in ("fields", "rope_fields", "rotary"))
RULES, DECODER, QWEN3 = (
    f"megalora/model/families/{name}.py" for name in ("rules", "decoder", "qwen3")
)
BUILD, SHAPE = (f"megalora/model/{name}.py" for name in ("build", "shape"))
ACCOUNT = "megalora/model/account.py"
STORED = "megalora/model/stored_tensors.py"
WEIGHTS = "megalora/model/base_weights.py"
FOLDER = "megalora/hf/safetensors.py"
CASES = "tests/cases/test_base_cases.py"
FIELDS_TEST = "tests/model/test_fields.py"
ACCOUNT_TEST = "tests/model/test_account.py"
FILES_TEST = "tests/model/test_account_files.py"
ROTARY_TEST = "tests/model/test_rotary.py"

BASE_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "unknown config fields pass",
        FIELDS,
        'if name not in known and value not in (None, False, "", [], {}):',
        "if name not in known and value is ...:",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "true counts as a number of layers",
        RULES,
        "isinstance(value, bool) or not isinstance(value, int):",
        "not isinstance(value, int):",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "a quantised config passes",
        FIELDS,
        "    scheme_of(hf, source)\n",
        "",
        f"{CASES} int8_is_refused",
    ),
    bug(
        0,
        "plan does not look at fields",
        "megalora/planner/models.py",
        "    check_fields(hf, path)\n",
        "",
        f"{CASES} partial_rotary_is_refused",
    ),
    bug(
        0,
        "rotary scaling passed over",
        BUILD,
        "        install_rotary(chunk, inv_freq)\n",
        "",
        f"{CASES} rope_scaling_is_computed",
    ),
    bug(
        0,
        "the attention factor applied once",
        ROTARY,
        "return factor**2 / math.sqrt(head_dim)",
        "return factor / math.sqrt(head_dim)",
        f"{ROTARY_TEST} turns_as_transformers_does",
    ),
    bug(
        0,
        "yarn's original length forgotten",
        ROPE,
        "        if value is not None:\n            settings[name] = value\n",
        '        if value is not None and name[:3] != "ori":\n            settings[name] = value\n',
        f"{ROTARY_TEST} frequencies_and_factor",
    ),
    bug(
        0,
        "type is not read where rope_type is the name",
        ROPE,
        'for name in ("rope_type", "type"):',
        'for name in ("rope_type",):',
        f"{ROTARY_TEST} frequencies_and_factor",
    ),
    bug(
        0,
        "o_proj's bias not built",
        BUILD,
        "o_bias=shape.o_bias,",
        "o_bias=False,",
        f"{CASES} attention_bias_is_computed",
    ),
    bug(
        0,
        "biases of k and v swapped",
        "megalora/model/hf_weights.py",
        "q=q, k=k, v=v)",
        'q=q, k=k if part == "weight" else v, v=v if part == "weight" else k)',
        f"{CASES} attention_bias_is_computed",
    ),
    bug(
        0,
        "o_proj's bias not counted",
        "megalora/planner/weights.py",
        "(q + shape.o_bias) * h",
        "q * h",
        "tests/planner/test_dryrun.py biased",
    ),
    bug(
        0,
        "a missing tensor is no matter",
        ACCOUNT,
        "            missing.append(name)\n",
        "",
        f"{ACCOUNT_TEST} missing_tensor_is_named",
    ),
    bug(
        0,
        "tensors that nothing reads are no matter",
        ACCOUNT,
        "left = [name for name in stored if name not in used and not may_be_left(name)]",
        "left = []",
        f"{ACCOUNT_TEST} that_nothing_reads_is_named",
    ),
    bug(
        0,
        "shapes are not compared",
        ACCOUNT,
        "if place.tensor.shape != wanted and holder not in used:",
        "if False:",
        f"{ACCOUNT_TEST} another_shape_is_named",
    ),
    bug(
        0,
        "the index alone is believed",
        STORED,
        "    unnamed = [name for name in there if name not in named and matters(name)]\n",
        "    unnamed = []\n",
        f"{FILES_TEST} index_and_its_files",
    ),
    bug(
        0,
        "stored dtypes are not compared",
        ACCOUNT,
        "strange = [name for name in used if stored[name].tensor.dtype not in DTYPES]",
        "strange = []",
        f"{ACCOUNT_TEST} quantised_weights_and_other_dtypes",
    ),
    bug(
        0,
        "a tied head that differs is dropped",
        STORED,
        '        return hf | {"tie_word_embeddings": False}\n',
        "        pass\n",
        f"{ACCOUNT_TEST} tie_flag_and_the_weights",
    ),
    bug(
        0,
        "packed gate and up swapped",
        "megalora/model/projections.py",
        'first = rows if projection.role == "up_proj" else 0',
        'first = rows if projection.role == "gate_proj" else 0',
        f"{CASES} packed_experts_are_read",
    ),
    bug(
        0,
        "packed experts read from the first on",
        WEIGHTS,
        "[place.expert, first:end]",
        "[0, first:end]",
        f"{CASES} packed_experts_are_read",
    ),
    bug(
        0,
        "unwritten parameters pass",
        BUILD,
        "            tensor.fill_(torch.nan)\n",
        "            tensor.fill_(0)\n",
        f"{ACCOUNT_TEST} leaves_out_stops",
    ),
    bug(
        0,
        "a cut-off shard passes",
        FOLDER,
        "        if end != num_bytes:\n",
        "        if end > num_bytes:\n",
        f"{FILES_TEST} no_safetensors",
    ),
    bug(
        0,
        "is_causal passes as unset",
        DECODER,
        '    "is_causal": only(True, because="every token sees the tokens before it alone;'
        ' transformers takes null for false"),\n',
        "",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "a base that rope_scaling hides is taken",
        ROPE,
        "scaling and hidden not in",
        "not places and hidden not in",
        f"{FIELDS_TEST} refused_by_name_and_value",
    ),
    bug(
        0,
        "headers are read twice",
        STORED,
        "        _, tensors = read_header(folder / shard)\n",
        "        read_header(folder / shard)\n        _, tensors = read_header(folder / shard)\n",
        f"{FILES_TEST} every_header_is_read_once",
    ),
    bug(
        0,
        "a cgroup's limit passed over",
        "megalora/verify/host_memory.py",
        "            found.append(max(0, int(most) - used + cached))\n",
        "",
        "tests/verify/test_host_memory.py narrowest_limit_counts",
    ),
    bug(
        0,
        "transformers' refusal of a config is a crash",
        "megalora/verify/reference.py",
        "    except Exception as error:  # a file of others",
        "    except OSError as error:  # a file of others",
        "tests/verify/test_layer_ranks.py does_not_take_is_a_line",
    ),
    bug(
        0,
        "attention biases of the config not in the shape",
        QWEN3,
        "qkv_bias=bias, o_bias=bias",
        "qkv_bias=bias",
        "tests/model/test_shape.py num_parameters_of_a_model",
    ),
)
