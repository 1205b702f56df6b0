"""Merge an adapter into the weights of a base model's folder: ``W' = cast(W + s * B A)``, computed
in float32 and rounded once.

Merging changes no tensor's name, size or place, so a safetensors file is written as it is read,
from front to back: adapted weights row block by row block, all other bytes as they are. Memory
holds the adapter and one block, never a model.

How a base stores an adapted linear, in rows of the stored tensor seen as [rows, in]:

    model.layers.N.mlp.experts.E.gate_proj.weight   [I, H]       all rows; so for every other linear
    model.layers.N.mlp.experts.gate_up_proj         [E, 2I, H]   for each expert, rows of gate, up
    model.layers.N.mlp.experts.down_proj            [E, H, I]    for each expert, H rows

The packed ones are transformers 5's own layout, which ``save_pretrained(...,
save_original_format=False)`` writes. An adapted lm_head that is tied to the embedding becomes a
weight of its own, behind the other tensors of the embedding's file, and ``tie_word_embeddings``
becomes false. A classifier's score head takes the place of lm_head (``merge_score.py``).
"""

import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from megalora.adapters.files import CONFIG
from megalora.adapters.merge_head import Shard, add_lm_head, replace_lm_head, untie
from megalora.adapters.merge_original import merged_into
from megalora.adapters.merge_report import REPORT, MergedModule, MergeReport, measured
from megalora.adapters.merge_score import make_classifier
from megalora.adapters.merge_whole import replace_whole
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.trained_on import notes_on_base
from megalora.atomic_folder import check_new, check_space, whole_or_gone
from megalora.hf.folder import INDEX, check_base_folder, local_folder, weight_shards
from megalora.hf.json_file import read_hf_config
from megalora.hf.safetensors import Stored, header_bytes, read_header
from megalora.hf.tensor_names import published_name
from megalora.lora.row_lengths import with_lengths
from megalora.lora.spec import Adapted, tensor_name
from megalora.model.base_weights import DTYPES
from megalora.model.fields import model_shape
from megalora.model.projections import HEAD, ways_to_store
from megalora.model.shape import ModelShape
from megalora.tiny_folder import MARKER

BLOCK_BYTES = 2**20
"""Size of a block in float32; about twenty times that is in use at once. Larger blocks are no
faster."""
_WEIGHT_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx",
    ".index.json",
)  # fmt: skip
"""Endings of files that hold a model's weights, and of their indexes."""
_NOT_OF_THE_RESULT = (CONFIG, REPORT, MARKER)
"""Files that would say something untrue of the result: the first makes transformers look for an
adapter, the last lets ``megalora tiny`` overwrite the folder."""


@dataclass(frozen=True)
class _Block:
    """The rows of a stored tensor, seen as [rows, in], that are one adapted module's weight, or
    all of its bias, seen as [rows, 1]."""

    module: str
    scale: float
    first: int
    rows: int
    columns: int
    is_bias: bool = False


def merge(
    adapter: Path, base: str, out: Path, original: str | None = None, *, allow_loss: bool = False
) -> MergeReport:
    """Write ``base``, a folder or hub name, with ``adapter`` merged into it to the folder ``out``,
    which must be new or empty. Of a quantised base, what is merged into is ``original``, from which
    it was made; less than ``SURVIVES`` of a delta is an error then, unless ``allow_loss``.

    Copied along: every file of the base's folder, except weights in other forms (.bin, .gguf, ...,
    and shards that the index does not name), hidden files and folders. A failure leaves nothing;
    the folder is called ``out`` only when it is complete.

    Returns how much of each module's delta survived the cast; the same lies in ``out`` as
    ``merge_report.json``. Raises ``ValueError``, nearly always before a weight is read: an adapter
    that does not fit or is not finite, a base that lacks an adapted weight or is quantized, a disk
    that is too small.
    """
    folder = local_folder(base, "--base")
    out = out.resolve()
    check_new(out, folder)
    shape = model_shape(read_hf_config(folder))
    about_base = notes_on_base(adapter, folder)
    folder, into_original = merged_into(folder, shape, original, adapter)
    check_new(out, folder)
    check_base_folder(folder)
    read = read_adapter(adapter, shape, base=folder, score=True)
    shards = {name: Shard(*read_header(folder / name)) for name in weight_shards(folder)}
    score = replace_lm_head(shards, read) if read.num_scores else None
    # The head's delta must not change the embedding: the two become weights of their own.
    untied = shape.tied_embeddings and any(a.projection in HEAD for a in read.adapted)
    if untied:
        add_lm_head(folder, shards)
    notes = [*into_original, *about_base, *read.notes, *replace_whole(folder, shards, read, shape)]
    blocks = _find_blocks(folder, read.adapted, shape, shards)
    others = copied_files(folder)
    num_bytes = _weight_bytes(shards)
    check_space(out, num_bytes + sum(path.stat().st_size for path in others))
    with whole_or_gone(out) as temporary, one_thread():
        merged: list[MergedModule] = []
        for name, shard in shards.items():
            merged += _write_shard(folder / name, temporary / name, shard, blocks, read.tensors)
        _check_all_merged(merged, read.adapted)
        for path in others:
            shutil.copyfile(path, temporary / path.name)
        if untied:
            untie(temporary, shards)
        if score is not None:
            make_classifier(temporary, read, *score)
        report = MergeReport(adapter, base, out, num_bytes, tuple(merged), tuple(notes))
        report.write(temporary, allow_loss=allow_loss or not into_original)
    return report


def _weight_bytes(shards: Mapping[str, Shard]) -> int:
    """Bytes of all tensors of the result."""
    total = 0
    for shard in shards.values():
        total += sum(tensor.num_bytes for tensor in shard.tensors)
    return total


def _check_all_merged(merged: list[MergedModule], adapted: list[Adapted]) -> None:
    """Every adapted module was met in some file, and once."""
    expected: list[str] = []
    for a in adapted:
        expected += a.hf_modules()
    assert sorted(m.module for m in merged) == sorted(expected)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread. Blocks are too small to share: on two cores with other work, two
    threads took five to seven times as long as one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _find_blocks(
    folder: Path, adapted: list[Adapted], shape: ModelShape, shards: dict[str, Shard]
) -> dict[str, list[_Block]]:
    """Stored tensor -> what is merged into it; proves that every adapted module is there, and
    once."""
    stored: dict[str, tuple[str, Stored]] = {}
    for shard_name, shard in shards.items():
        for tensor in shard.tensors:
            name = published_name(tensor.name)
            if name in stored:
                raise ValueError(
                    f"{folder}: {name} is both in {stored[name][0]} and in {shard_name}"
                )
            stored[name] = (shard_name, tensor)
    # A module may be stored in one of several ways; in two at once, they could contradict.
    blocks: dict[str, list[_Block]] = defaultdict(list)
    missing: list[str] = []
    for a in adapted:
        for expert, module in enumerate(a.hf_modules()):
            ways = ways_to_store(a.projection, shape, a.layer, expert)
            places = [way for way in ways if way.tensor in stored]
            if len(places) > 1:
                raise ValueError(
                    f"{folder} has {module} twice: as"
                    f" {' and in '.join(way.tensor for way in places)}"
                )
            for way in places:
                shard_name, tensor = stored[way.tensor]
                _check_tensor(folder / shard_name, tensor, way.size)
                # Of a tensor for all experts the rows are counted through all of them.
                first = way.first_row + (way.expert or 0) * way.size[-2]
                blocks[tensor.name].append(
                    _Block(module, a.scale, first, a.out_features, a.in_features)
                )
            if not places:
                missing.append(module)
            if "C" in a.factors:
                name, block = _bias_block(folder, a, module, stored)
                blocks[name].append(block)
    if missing:
        total = sum(len(a.hf_modules()) for a in adapted)
        raise ValueError(
            f"{folder} has no weight for {len(missing):,} of {total:,} adapted modules, such as"
            f" {missing[0]}; merge into the model that was trained, as published or as"
            " save_pretrained writes it"
        )
    return blocks


def _bias_block(
    folder: Path, a: Adapted, module: str, stored: Mapping[str, tuple[str, Stored]]
) -> tuple[str, _Block]:
    """Stored bias that takes the bias of a B in, and all of it as a block."""
    bias = f"{module}.bias"
    if bias not in stored:
        raise ValueError(f"{folder} has no {bias}, which takes a bias of B in")
    shard_name, tensor = stored[bias]
    _check_tensor(folder / shard_name, tensor, (a.out_features,))
    return tensor.name, _Block(module, a.scale, 0, a.out_features, 1, is_bias=True)


def _check_tensor(shard: Path, tensor: Stored, size: tuple[int, ...]) -> None:
    """Raise ``ValueError`` for a stored weight of another size, or of a quantized dtype."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{shard}: {tensor.name} is {tensor.dtype}; merging needs {', '.join(DTYPES)}. Merge"
            " into the model that this one was quantized from"
        )
    if tensor.shape != size:
        raise ValueError(
            f"{shard}: {tensor.name} is {tensor.shape}, but config.json and the adapter need {size}"
        )


def _write_shard(
    source: Path,
    target: Path,
    shard: Shard,
    blocks: dict[str, list[_Block]],
    factors: Mapping[str, Tensor],
) -> Iterator[MergedModule]:
    """Write one file of the result; yields what became of the modules in it."""
    with source.open("rb") as base, target.open("wb") as out:
        out.write(header_bytes(shard.header))
        for tensor in shard.tensors:
            if tensor.name in shard.added:
                out.write(shard.added[tensor.name].view(torch.uint8).numpy())
                continue
            base.seek(tensor.start)
            # Bytes between adapted rows are copied as they are.
            written = 0
            for block in sorted(blocks.get(tensor.name, []), key=lambda b: b.first):
                # Blocks are whole rows, so that a first row gives the place in bytes.
                dtype = DTYPES[tensor.dtype]
                row_bytes = block.columns * dtype.itemsize
                _copy(base, out, block.first * row_bytes - written)
                if block.is_bias:
                    _merge_bias(base, out, block, dtype, factors)
                else:
                    yield _merge_block(base, out, block, dtype, factors)
                written = (block.first + block.rows) * row_bytes
            _copy(base, out, tensor.num_bytes - written)


def _copy(base: BufferedReader, out: BufferedWriter, num_bytes: int) -> None:
    """Copy the bytes that come next in ``base``."""
    for start in range(0, num_bytes, BLOCK_BYTES):
        out.write(_read(base, min(BLOCK_BYTES, num_bytes - start)))


def _read(base: BufferedReader, num_bytes: int) -> bytearray:
    """The bytes that come next; raises ``OSError`` where there are fewer."""
    # A bytearray, because torch.frombuffer wants memory that may be written to.
    raw = bytearray(num_bytes)
    if base.readinto(raw) != num_bytes:
        raise OSError(f"{base.name} ended early")
    return raw


def _merge_bias(
    base: BufferedReader, out: BufferedWriter, block: _Block, dtype: torch.dtype,
    factors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Merge the bias that comes next in ``base``."""
    raw = _read(base, block.rows * dtype.itemsize)
    bias_O = torch.frombuffer(raw, dtype=dtype).float()
    merged_O = bias_O + block.scale * factors[tensor_name(block.module, "C")].float()
    out.write(merged_O.to(dtype).view(torch.uint8).numpy())


def _merge_block(
    base: BufferedReader, out: BufferedWriter, block: _Block, dtype: torch.dtype,
    factors: Mapping[str, Tensor],
) -> MergedModule:  # fmt: skip
    """Merge the rows that come next in ``base``. R: rank, O: out, I: in, P: those of O that are
    done at once."""
    a_RI = factors[tensor_name(block.module, "A")].float()
    b_OR = factors[tensor_name(block.module, "B")].float()
    sums = torch.zeros(3, dtype=torch.float64)
    m_O = factors.get(tensor_name(block.module, "M"))  # of DoRA alone
    at_once = max(1, BLOCK_BYTES // (4 * block.columns))
    for number, b_PR in enumerate(b_OR.split(at_once)):
        raw = _read(base, b_PR.shape[0] * block.columns * dtype.itemsize)
        w_PI = torch.frombuffer(raw, dtype=dtype).view(-1, block.columns).float()
        delta_PI = block.scale * (b_PR @ a_RI)
        if m_O is not None:
            m_P = m_O[number * at_once :][: len(w_PI)]
            delta_PI = with_lengths(w_PI + delta_PI, m_P) - w_PI
        merged_PI = (w_PI + delta_PI).to(dtype)
        out.write(merged_PI.view(torch.uint8).numpy())  # NumPy has no bfloat16, but bytes
        # What the cast left of the delta.
        sums += products(w_PI, delta_PI, merged_PI.float())
    name = str(dtype).removeprefix("torch.")
    if not sums[2].isfinite():
        raise ValueError(
            f"{block.module} would have NaN or infinite values ({name} holds up to"
            f" {torch.finfo(dtype).max:.3g}); look at the adapter with megalora inspect, or merge"
            " into a float32 copy of the base"
        )
    return measured(block.module, name, sums.tolist())


def products(w: Tensor, delta: Tensor, merged: Tensor) -> Tensor:
    """float64 ``[3]``: the sums that ``measured`` takes, of a delta or of some rows of it; the
    arguments are float32 ``[out, in]``."""
    # In float64: they run over millions of elements.
    kept = (merged - w).double().flatten()
    wanted = delta.double().flatten()
    lost = kept - wanted
    return torch.stack([kept.dot(wanted), wanted.dot(wanted), lost.dot(lost)])


def copied_files(folder: Path) -> list[Path]:
    """Files of a base's folder that belong to the result as they are: all but weights."""
    return [path for path in sorted(folder.iterdir()) if _is_copied(path)]


def _is_copied(path: Path) -> bool:
    """Whether a file of the base's folder belongs to the result too."""
    if path.name == INDEX:
        return True
    skipped = (
        path.name.startswith(".")
        or path.name.endswith(_WEIGHT_FILES)
        or path.name in _NOT_OF_THE_RESULT
    )
    return path.is_file() and not skipped
