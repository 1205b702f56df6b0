"""Bugs in reading quantised weights. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

_FOLDER = "megalora/model/quantised"
_DECODERS = "tests/model/quantised/test_decoders.py"
_VALUES = f"{_DECODERS} test_values_are_those_of_the_library"
_PARTS = f"{_DECODERS} test_parts_are_those_of_the_whole"

QUANTISED_BUGS: tuple[Bug, ...] = (
    bug(
        0,
        "fp8's scale is dropped",
        f"{_FOLDER}/fp8.py",
        ".float() * by_row[:, group_of(k0, k1, block_columns)]",
        ".float()",
        _VALUES,
    ),
    bug(
        0,
        "fp8's ragged blocks are as tall as the others",
        f"{_FOLDER}/fp8.py",
        "by_row = touched[group_of(n0, n1, block_rows)]",
        "by_row = touched.repeat_interleave(-(-(n1 - n0) // len(touched)), 0)[: n1 - n0]",
        f"{_DECODERS} test_fp8_is_what_transformers_computes",
    ),
    bug(
        0,
        "a part's first scale is the matrix's",
        f"{_FOLDER}/part.py",
        "torch.arange(first, end) // step - first // step",
        "torch.arange(end - first) // step",
        _PARTS,
    ),
    bug(
        0,
        "nf4 has the low nibble first",
        f"{_FOLDER}/nf4.py",
        "codes = high_first(",
        "codes = low_first(",
        _VALUES,
        ("import high_first", "import low_first"),
    ),
    bug(
        0,
        "nf4's blocks begin anew in every row",
        f"{_FOLDER}/nf4.py",
        'group_of(first, end, state["blocksize"]).view(n1 - n0, columns)',
        'group_of(0, columns, state["blocksize"]).expand(n1 - n0, columns)',
        _VALUES,
    ),
    bug(
        0,
        "double quantisation without its offset",
        f"{_FOLDER}/nf4.py",
        'return values * scale + state["nested_offset"]',
        "return values * scale",
        _VALUES,
    ),
    bug(
        0,
        "a row of nf4 begins at a byte",
        f"{_FOLDER}/nf4.py",
        "codes[first % 2 :][: end - first]",
        "codes[: end - first]",
        f"{_DECODERS} test_odd_rows_of_nf4",
    ),
    bug(
        0,
        "int4's zero points packed along columns",
        f"{_FOLDER}/int4.py",
        "of_words(packed.t()).t()[n0 % 8 :][: n1 - n0].float()",
        "of_words(packed).reshape(-1, packed.shape[1])[n0 % 8 :][: n1 - n0].float()",
        _VALUES,
    ),
    bug(
        0,
        "GPTQ's zero points are as stored",
        f"{_FOLDER}/gptq.py",
        ".float() + zero_offset",
        ".float()",
        _VALUES,
    ),
    bug(
        0,
        "GPTQ's groups in order",
        f"{_FOLDER}/gptq.py",
        'if "g_idx" in stored:',
        'if "groups" in stored:',
        _VALUES,
    ),
    bug(
        0,
        "AWQ's outputs in the order of their bits",
        f"{_FOLDER}/awq.py",
        "(0, 4, 1, 5, 2, 6, 3, 7)",
        "(0, 1, 2, 3, 4, 5, 6, 7)",
        _VALUES,
    ),
    bug(
        0,
        "AWQ's order the other way round",
        f"{_FOLDER}/awq.py",
        "(0, 4, 1, 5, 2, 6, 3, 7)",
        "(0, 2, 4, 6, 1, 3, 5, 7)",
        _VALUES,
    ),
    bug(
        0,
        "nvfp4's global scale multiplies",
        f"{_FOLDER}/nvfp4.py",
        '_scale(stored, part) / stored["weight_global_scale"]',
        '_scale(stored, part) * stored["weight_global_scale"]',
        _VALUES,
    ),
    bug(
        0,
        "4-bit floats have the high nibble first",
        f"{_FOLDER}/nibbles.py",
        "return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)",
        "return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)",
        _VALUES,
    ),
    bug(
        0,
        "a part in the middle of a word begins with the word",
        f"{_FOLDER}/int4.py",
        "of_words(words)[:, k0 % 8 :][:, : k1 - k0]",
        "of_words(words)[:, : k1 - k0]",
        _PARTS,
    ),
)
