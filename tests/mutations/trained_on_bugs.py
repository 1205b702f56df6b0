"""Bugs in what an adapter says of its base, in commands that follow it, and in merging into a
quantised base. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

_TRAINED_ON = "tests/adapters/test_trained_on.py"
_MERGED = "tests/adapters/test_merge_requantised.py"
_KEPT = "tests/model/quantised/test_kept.py"
_FOLDERS = "tests/model/quantised/test_folders.py"
_KNOWN = "megalora/adapters/trained_on.py"
_ENCODE = "megalora/model/quantised/encode.py"

TRAINED_ON_BUGS: tuple[Bug, ...] = (
    bug(
        9,
        "nobody asks for the values that an adapter was trained on",
        _KNOWN,
        "    return ModelConfig(path=str(base), dtype=dtype, **model_options(known))",
        "    return ModelConfig(path=str(base), dtype=dtype)",
        f"{_TRAINED_ON} test_09_chat",
    ),
    bug(
        9,
        "verify's own model decodes nothing",
        "megalora/verify/peft.py",
        "            held=held_in(config, open_folder(folder)),\n",
        "",
        f"{_TRAINED_ON} test_09_verify",
    ),
    bug(
        9,
        "PEFT's model of verify has the plain values",
        "megalora/verify/peft.py",
        "base = load_stock(folder, torch.float32, nf4=nf4)",
        "base = load_stock(folder, torch.float32)",
        f"{_TRAINED_ON} test_09_verify",
    ),
    bug(
        9,
        "chat computes with the plain base of an adapter of nf4",
        "megalora/chat/local.py",
        "model: Any = load_stock(base, dtype, nf4=nf4)",
        "model: Any = load_stock(base, dtype)",
        f"{_TRAINED_ON} test_09_chat",
    ),
    bug(
        9,
        "eval computes with the plain base of an adapter of nf4",
        "megalora/evaluate/request.py",
        "overrides = [*one_rank, *held, *request.overrides]",
        "overrides = [*one_rank, *request.overrides]",
        f"{_TRAINED_ON} test_09_eval",
    ),
    bug(
        9,
        "an export forgets its base",
        "megalora/adapters/export.py",
        "            **metadata_of(known),\n",
        "",
        f"{_TRAINED_ON} test_09_metadata",
    ),
    bug(
        9,
        "another base of the same sizes passes",
        _KNOWN,
        "is_other = is_other or weights_digest(base, Digests()) != known.digest",
        "pass",
        f"{_TRAINED_ON} test_what_differs",
    ),
    bug(
        9,
        "merging into another base says nothing",
        "megalora/adapters/merge.py",
        "    about_base = notes_on_base(adapter, folder)\n",
        "    about_base: list[str] = []\n",
        f"{_TRAINED_ON} test_merging_says",
    ),
    bug(
        9,
        "an adapter of nf4 merges into the plain base unasked",
        "megalora/adapters/merge_original.py",
        "if scheme is None and known is not None and known.is_rounded:",
        "if scheme is None and known is not None and known.quantised:",
        f"{_TRAINED_ON} test_merging_says",
    ),
    bug(
        8,
        "with the original given, the delta is added to the decoded base",
        "megalora/adapters/merge_requantised.py",
        "        source = BaseWeights(open_folder(found))\n",
        "",
        f"{_MERGED} test_08_from_the_original",
    ),
    bug(
        8,
        "a delta that rounded away is no error",
        "megalora/adapters/merge_report.py",
        "if m.survived is not None and not m.survived >= SURVIVES:",
        "if m.survived is not None and m.survived != m.survived:",
        f"{_MERGED} test_08_less",
    ),
    bug(
        8,
        "requantised nf4 has the first code in the low nibble",
        _ENCODE,
        "pairs[:, :1] << 4 | pairs[:, 1:]",
        "pairs[:, 1:] << 4 | pairs[:, :1]",
        f"{_MERGED} test_08_from_the_original",
    ),
    bug(
        8,
        "requantised fp8 keeps the published scales",
        _ENCODE,
        'return {"weight": codes, "weight_scale_inv": scales}',
        'return {"weight": codes}',
        f"{_MERGED} test_08_from_the_original",
    ),
    bug(
        5,
        "a frozen weight's scales that were cast pass step 1",
        "megalora/train/held_check.py",
        "        if self.loaded:\n            self.run()\n",
        "",
        f"{_KEPT} test_05_a_run",
    ),
    bug(
        5,
        "a cast reaches the scales of a whole model",
        "megalora/model/held_codes.py",
        "scales = torch.empty(of_scales, dtype=torch.int32, device=device)",
        "scales = torch.empty(of_scales, dtype=torch.float32, device=device)",
        f"{_KEPT} test_05_a_cast",
    ),
    bug(
        6,
        "a dense linear keeps its decoded weight for backward",
        "megalora/model/coded_linear.py",
        "        out = torch.matmul(x, held.decoded()[0].t())\n",
        "        weight = held.decoded()[0]\n        ctx.save_for_backward(weight)\n"
        "        out = torch.matmul(x, weight.t())\n",
        f"{_KEPT} test_06",
    ),
    bug(
        6,
        "experts keep their decoded weights for backward",
        "kernels/megalora_kernels/engine.py",
        "return None if isinstance(self.given, AugmentedWeight) else self.given",
        "return self.w_ENK",
        f"{_KEPT} test_06",
    ),
    bug(
        0,
        "a weight_shape of another matrix passes",
        "megalora/model/quantised/int4.py",
        'if tuple(stored["weight_shape"][...].tolist()) != size:',
        'if len(stored["weight_shape"][...]) != 2:',
        f"{_FOLDERS} test_a_transposed",
    ),
    bug(
        0,
        "GPTQ's biases are lost whatever they hold",
        "megalora/model/account.py",
        "            if not any(file.read(tensor.num_bytes)):\n                zeros.add(name)\n",
        "            zeros.add(name)\n",
        f"{_FOLDERS} test_biases_of_zeros",
    ),
    bug(
        0,
        "a quantised teacher is known by its codes alone",
        "megalora/hf/base_identity.py",
        "    if settings:\n",
        "    if False:\n",
        "tests/hf/test_base_identity.py test_the_same_codes",
    ),
)
