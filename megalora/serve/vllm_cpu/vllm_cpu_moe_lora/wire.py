"""Define the message in which a training sends an adapter to vLLM: a JSON header and one buffer of
bytes.

    8 bytes   length of the header, little-endian
    header    JSON, filled up with spaces so that the buffer begins at a multiple of 64
    buffer    the tensors, each beginning at a multiple of 16

Two forms of the same values:

    per_expert  all tensors as in ``adapter_model.safetensors``, with PEFT's names
    packed      the same, but the experts of a layer are six tensors, as vLLM keeps them:
                ``BLOCK.w1.lora_A`` [E, r, in], ``BLOCK.w1.lora_B`` [E, out, r] with the scale in
                it, and so on for w2 (down) and w3 (up)

The hash covers form, config, names, shapes and every byte of the buffer. It stands in the adapter's
id, NAME@LABEL.HASH, so that no other contents can have this id.

This file runs in training and inside vLLM. It needs torch and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; a multiple of every dtype's size."""
HEADER_ALIGNMENT = 64
HASH_DIGITS = 12
"""Digits of the hash in an id."""
FORMS = ("per_expert", "packed")
W = {"gate_proj": 1, "down_proj": 2, "up_proj": 3, "w1": 1, "w2": 2, "w3": 3}
"""Number that vLLM gives an expert's linear: w1 is gate, w2 is down, w3 is up."""
_HASHED_AT_ONCE = 16 << 20
"""Bytes of a piece that one thread hashes: a hash of all in one go is slower than the network."""
_LENGTH = struct.Struct("<Q")


class Damaged(ValueError):
    """What arrived is not what was sent."""


def header_bytes(header: dict[str, Any]) -> bytes:
    """The length and the JSON of a header, filled up."""
    text = json.dumps(header).encode()
    # JSON may end with spaces.
    missing = -(_LENGTH.size + len(text)) % HEADER_ALIGNMENT
    text += b" " * missing
    return _LENGTH.pack(len(text)) + text


def split(message: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Header and buffer of a message, uint8 [n]; the buffer is a view of it."""
    (length,) = _LENGTH.unpack(bytes(message[: _LENGTH.size].numpy()))
    start = _LENGTH.size + length
    if start > message.numel():
        raise Damaged(f"a header of {length} bytes in a message of {message.numel()}")
    header = json.loads(bytes(message[_LENGTH.size : start].numpy()))
    return header, message[start:]


def identity(name: str, header: dict[str, Any]) -> str:
    """The id under which vLLM has the adapter: NAME@LABEL.HASH."""
    return f"{name}@{header['label']}.{header['hash'][:HASH_DIGITS]}"


def digest(header: dict[str, Any], buffer: Tensor) -> str:
    """Hash of what a message holds, 32 hex digits."""
    described = [header["form"], header["config"], header["tensors"]]
    whole = hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16)
    view = memoryview(buffer.numpy())
    pieces = [view[at : at + _HASHED_AT_ONCE] for at in range(0, len(view), _HASHED_AT_ONCE)]
    # hashlib lets other threads run meanwhile.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for part in pool.map(_digest_of_piece, pieces):
            whole.update(part)
    return whole.hexdigest()


def _digest_of_piece(piece: memoryview) -> bytes:
    return hashlib.blake2b(piece, digest_size=16).digest()


def check(header: dict[str, Any], buffer: Tensor, ident: str) -> None:
    """Raise ``Damaged`` unless the message is whole and is the one that the id names."""
    check_header(header, ident)
    # Cheap checks first; hashing reads everything.
    if buffer.numel() != header["bytes"]:
        raise Damaged(f"{ident}: {buffer.numel()} bytes arrived of {header['bytes']}")
    found = digest(header, buffer)
    if found != header["hash"]:
        raise Damaged(
            f"{ident}: what arrived has the hash {found[:HASH_DIGITS]}; bytes were changed on the"
            " way"
        )


def check_header(header: dict[str, Any], ident: str) -> None:
    """Raise ``Damaged`` where a header contradicts the id or itself."""
    if header["form"] not in FORMS:
        raise Damaged(f"{ident}: its form is {header['form']!r}, not one of {', '.join(FORMS)}")
    if identity(ident.rpartition("@")[0], header) != ident:
        raise Damaged(
            f"{ident} was asked for, and {header['label']}.{header['hash'][:HASH_DIGITS]} arrived"
        )
    if len(header["tensors"]) != header["count"]:
        raise Damaged(
            f"{ident}: {header['count']} tensors were announced, and {len(header['tensors'])} came"
        )


def decode(header: dict[str, Any], buffer: Tensor) -> dict[str, Tensor]:
    """The tensors by name, as views of the buffer."""
    tensors = {}
    for name, dtype, shape, start, size in header["tensors"]:
        # A view: a buffer of gigabytes is not copied.
        part = buffer[start : start + size]
        tensors[name] = part.view(getattr(torch, dtype)).view(shape)
    return tensors
