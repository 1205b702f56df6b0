"""Decode bitsandbytes' nf4.

    W.flat[i] = NF4[code[i]] * absmax[i // B]        i = n K + k

    weight          uint8 [ceil(N K / 2), 1]: codes 2j (high nibble) and 2j + 1 of the flattened
                    matrix in byte j
    absmax          float32 [ceil(N K / B)]; doubly quantised uint8, and then
                    absmax[j] = nested_quant_map[absmax[j]] * nested_absmax[j // C] + offset
    nested_absmax   float32 [ceil(ceil(N K / B) / C)]
    quant_state     JSON as bytes: block sizes B and C, shape [N, K], offset

Blocks run over the flattened matrix, so where B does not divide K they go over the ends of rows.
"""

from typing import Any

import torch
from torch import Tensor

from megalora.json_text import is_number, parse_json
from megalora.model.quantised.nibbles import high_first
from megalora.model.quantised.part import Part, Stored, covering, group_of

STATE = "weight.quant_state.bitsandbytes__nf4"


def decode(stored: Stored, part: Part, size: tuple[int, int]) -> Tensor:
    """``part`` of the matrix in float32; ``size`` is [N, K]. Raises ``ValueError`` as ``codes_of``
    does."""
    codes, block_of, blocks, state = codes_of(stored, part, size)
    scale = absmax(stored, blocks, state)[block_of]
    return stored["weight.quant_map"][...].float()[codes.long()] * scale


def codes_of(
    stored: Stored, part: Part, size: tuple[int, int]
) -> tuple[Tensor, Tensor, slice, dict[str, Any]]:
    """Codes of a part, one to a byte, and where their scales are.

    Returns:
        uint8 ``[n, k]``, the place ``[n, k]`` of each code's scale among those of the blocks that
        the part touches, these blocks, and what ``quant_state`` says.

    Raises:
        ValueError: ``quant_state`` is of another matrix, or does not fit the tensors.
    """
    n0, n1, k0, k1 = part
    columns = size[1]
    state = _state(stored, size)
    # Whole rows are read: a row of 4-bit codes is shorter than the page that a file is read by.
    first = n0 * columns
    end = n1 * columns
    codes = high_first(stored["weight"][covering(first, end, 2)].flatten())
    # A row may begin in the middle of a byte.
    codes = codes[first % 2 :][: end - first].view(n1 - n0, columns)
    blocks = covering(first, end, state["blocksize"])
    block_of = group_of(first, end, state["blocksize"]).view(n1 - n0, columns)
    return codes[:, k0:k1], block_of[:, k0:k1], blocks, state


def absmax(stored: Stored, blocks: slice, state: dict[str, Any]) -> Tensor:
    """Scales of some blocks in float32."""
    found = stored["weight.absmax"][blocks]
    if found.dtype != torch.uint8:
        return found
    # The second quantisation has blocks of its own, over the scales of the whole matrix.
    step = state["nested_blocksize"]
    nested = stored["weight.nested_absmax"][covering(blocks.start, blocks.stop, step)]
    scale = nested[group_of(blocks.start, blocks.stop, step)]
    values = stored["weight.nested_quant_map"][...][found.long()]
    return values * scale + state["nested_offset"]


def _state(stored: Stored, size: tuple[int, int]) -> dict[str, Any]:
    """What ``quant_state`` says; raises ``ValueError`` where it does not fit the matrix."""
    try:
        state = parse_json(bytes(stored[STATE][...].tolist()))
    except ValueError as error:
        raise ValueError(f"its quant_state is {error}") from None
    if not isinstance(state, dict):
        raise ValueError("its quant_state is not a JSON object")
    if state.get("quant_type") != "nf4" or state.get("shape") != list(size):
        raise ValueError(
            f"its quant_state is of a {state.get('quant_type')} matrix {state.get('shape')}, not of"
            f" nf4 {list(size)}"
        )
    for key in ("blocksize", "nested_blocksize", "nested_offset"):
        if key not in state and (key == "blocksize" or "weight.nested_absmax" in stored):
            raise ValueError(f"its quant_state has no {key}")
    if not is_number(state.get("nested_offset", 0)):
        raise ValueError(f"its quant_state has the nested_offset {state['nested_offset']!r}")
    # Scales that are counted in blocks of another size would be other weights' without a word.
    blocks = _num_blocks(size[0] * size[1], state["blocksize"])
    _require_length(stored, "weight.absmax", blocks)
    if "weight.nested_absmax" in stored:
        nested = _num_blocks(blocks, state["nested_blocksize"])
        _require_length(stored, "weight.nested_absmax", nested)
    return state


def _num_blocks(elements: int, block: Any) -> int:
    if type(block) is not int or block < 1:
        raise ValueError(f"its quant_state has blocks of {block!r}")
    return -(-elements // block)


def _require_length(stored: Stored, name: str, length: int) -> None:
    # The last one alone is read.
    if len(stored[name][length - 1 :]) != 1:
        raise ValueError(f"{name} has not the {length} scales that quant_state's blocks want")
