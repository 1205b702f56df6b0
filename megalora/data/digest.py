"""Identify data by its content, whatever its path: digests of sources and of samples."""

import hashlib
import json
from collections.abc import Sequence

from megalora.config import Source
from megalora.data.chat import Encoded
from megalora.data.sources import locate, read_hub
from megalora.digests import Digests, sha256_of_file


def source_digest(source: str, digests: Digests) -> str:
    """Digest of a file's bytes, or of a hub data set's revision; a slice at the source's end is
    part of it."""
    found = locate(source)
    if found.file is not None:
        return f"sha256:{digests.of(found.file, 'bytes', sha256_of_file)}{found.slice_text}"
    # A hash of the downloaded files, the split and the library's way to read them. Private to
    # datasets, which names its own cache by it; no public attribute tells two revisions apart.
    fingerprint = read_hub(source, *found.hub)._fingerprint
    # (name, config, split); the config may be None.
    where = ":".join(map(str, found.hub))
    return f"hub:{where}@{fingerprint}{found.slice_text}"


def mixture_digest(sources: Sequence[Source], digests: Digests) -> str:
    """Digest of the sources of training data with their weights and formats, in their order; that
    of a single source is ``source_digest``."""
    found = []
    for source in sources:
        digest = source_digest(source.path, digests)
        if source.format is not None:
            # A mapping in one order, whatever the order of its keys in the config.
            digest += f" as {json.dumps(source.format, sort_keys=True)}"
        # By repr, so that two weights that print alike but differ are two.
        found.append(digest if source.weight is None else f"{source.weight!r}*{digest}")
    return " + ".join(found)


def samples_digest(samples: Sequence[Encoded]) -> str:
    """Digest of what is trained on as checkpoints of earlier versions hold it; see
    ``digest_of_samples`` for today's.

    It reads all tokens, which takes a second for 300,000 short samples.
    """
    digest = hashlib.sha256()
    for sample in samples:
        # With its length, or two samples would have the same bytes as one that joins them.
        digest.update(len(sample.input_ids).to_bytes(8, "little"))
        # In a fixed byte order, so that every machine gets the same digest.
        digest.update(sample.input_ids.astype("<i4").tobytes())
        digest.update(sample.loss_mask.tobytes())
    return digest.hexdigest()
