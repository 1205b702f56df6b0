"""Say how many tokens the head takes at once; the planner counts with the same numbers. No torch.

C = chunk_bytes / (V/t * bytes per logit)
"""

CHUNK_BYTES = 512 << 20
"""Room for the logits of a chunk. At 512 tokens and more, products with the output weight are bound
by arithmetic on an H100, so that a larger chunk is no faster."""
CHUNK_BYTES_BESIDE_TEACHER = CHUNK_BYTES * 2 // 5
"""The same where a teacher's logits are made beside the model's. ``head.py`` counts four tensors in
float32: with those of the teacher, its logarithms, probabilities and products there are ten."""


WIDE = 4
"""Bytes of a float32."""


def bytes_per_logit(element_bytes: int, by_kernel: bool) -> int:
    """Bytes that the logits of a chunk take at once, each.

    Args:
        element_bytes: of the model's dtype.
        by_kernel: whether kernels read them in that dtype and write their gradient over them, as on
            a GPU; torch widens them first.
    """
    if by_kernel:
        return element_bytes
    return max(WIDE, element_bytes) + element_bytes


def chunk_tokens(chunk_bytes: int, vocab: int, bytes_per_logit: int) -> int:
    """Tokens of a chunk: at least one, and multiples of 128, in which GPUs compute, from 128 on.

    Args:
        vocab: entries on this rank, V/t.
    """
    size = max(1, chunk_bytes // (vocab * bytes_per_logit))
    return size if size < 128 else size // 128 * 128
