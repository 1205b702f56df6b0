"""Bugs in weights that stay codes in memory. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

_KERNEL = "tests/kernels/test_coded_weight.py"
_HELD = "tests/model/quantised/test_held.py"
_PARTS = f"{_HELD} test_values_of_every_part"
_LAYOUT = "kernels/megalora_kernels/quantised_weight.py"
_CODED = "kernels/megalora_kernels/coded_weight.py"
_LOADING = "megalora/model/held_loading.py"

HELD_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "the scale of held fp8 is dropped",
        _LAYOUT,
        "torch.mul(values, scale, out=out)",
        "out.copy_(values)",
        f"{_KERNEL} test_a_value_is",
    ),
    bug(
        0,
        "held nf4 has neighbours in a byte",
        _LAYOUT,
        "packed[..., : columns - h] |= blocks[..., h:] << 4",
        "packed = (blocks[..., 0::2] | blocks[..., 1::2] << 4).clone()",
        f"{_KERNEL} test_a_value_is",
    ),
    bug(
        0,
        "a layer computes with the weight that was decoded last",
        _CODED,
        "if self.owner is not owner:",
        "if self.owner is None:",
        f"{_KERNEL} test_a_layer_beside_another_rank",
    ),
    bug(
        0,
        "an adapter of another layer beside the weight",
        _CODED,
        "                buffer.zero_()\n",
        "                pass\n",
        f"{_KERNEL} test_output_and_gradients",
    ),
    bug(
        0,
        "the decoded weight is kept for backward",
        "kernels/megalora_kernels/engine.py",
        "return None if isinstance(self.given, AugmentedWeight) else self.given",
        "return self.w_ENK",
        f"{_KERNEL} test_what_is_kept",
    ),
    bug(
        0,
        "gate and up share scales",
        _LOADING,
        "held.scales[run.expert, rows.start // p : rows.stop // p].copy_(scales)",
        "held.scales[run.expert, : len(scales)].copy_(scales)",
        _PARTS,
    ),
    bug(
        0,
        "a cut within a block of fp8 takes the first block's scale",
        _LOADING,
        "rows = torch.arange(n0, n1, grain[0]) // block[0] - n0 // block[0]",
        "rows = torch.arange(n0, n1, grain[0]) // block[0] * 0",
        _PARTS,
    ),
    bug(
        0,
        "a shard is quantised instead of the matrix",
        _LOADING,
        "first = k0 // NF4_BLOCK * NF4_BLOCK",
        "first = k0",
        _PARTS,
    ),
    bug(
        0,
        "a cast reaches the scales",
        "megalora/model/held_codes.py",
        "scales = torch.empty(of_scales, dtype=torch.int32, device=device)",
        "scales = torch.empty(of_scales, dtype=torch.float32, device=device)",
        _PARTS,
    ),
    bug(
        0,
        "codes that were written to are not noticed",
        "megalora/train/held_check.py",
        "found.append(bit_hash(whole) + bit_hash(rest))",
        "found.append(bit_hash(rest) if buffer is module.scale_bits else bit_hash(whole))",
        _PARTS,
    ),
    bug(
        0,
        "scales are not counted",
        "megalora/model/formats/coded.py",
        "return experts * n * self.width(k) + scales * SCALE_BYTES",
        "return experts * n * self.width(k)",
        f"{_HELD} test_the_plan_is",
    ),
    bug(
        0,
        "a second scale for rows of two blocks",
        "megalora/model/formats/coded.py",
        "math.gcd(span // columns, rows)",
        "rows",
        f"{_HELD} test_places_of_second",
    ),
    bug(
        0,
        "an offset of gate for up",
        _LOADING,
        '_part(nested.offsets[run.expert], rows, double.run).fill_(state["nested_offset"])',
        'nested.offsets[run.expert].fill_(state["nested_offset"])',
        _PARTS,
    ),
    bug(
        0,
        "experts take the second scales of the first one",
        _LAYOUT,
        "scales, offsets = (t[first:end] for t in nested[1:])",
        "scales, offsets = (t[: end - first] for t in nested[1:])",
        f"{_KERNEL} test_a_scale_is",
    ),
    bug(
        0,
        "weights are planned to be decoded in forward alone",
        "megalora/planner/decode_cost.py",
        "self._decode(backward, layer, decoded_in(reversed(order), last))",
        "self._decode(backward, layer, [])",
        "tests/planner/test_decode_cost.py test_a_step_grows",
    ),
    bug(
        0,
        "what recomputation has decoded is planned to be decoded again",
        "megalora/planner/decode_cost.py",
        "if module not in in_load and last.get(place) != module:",
        "if module not in in_load:",
        "tests/planner/test_decode_cost.py test_a_layer_decodes",
    ),
    bug(
        0,
        "few rows are planned to be decoded into memory",
        "megalora/planner/decode_cost.py",
        "return reads and self.batch.rows <= IN_LOAD_ROWS * sizes[0]",
        "return False",
        "tests/planner/test_decode_cost.py test_few_rows",
    ),
    bug(
        0,
        "AWQ is quantised again to nf4",
        "megalora/model/held.py",
        'if stored == asked or (asked == "nf4" and stored is None):',
        'if stored == asked or asked == "nf4":',
        f"{_HELD} test_what_would_be",
    ),
)
