"""Say which of the tokens whose rows are trained the data does not have."""

from collections.abc import Iterable, Sequence

import numpy as np

from megalora.data.chat import Encoded
from megalora.wording import first_few


def unseen_note(tokens: Sequence[int], samples: Iterable[Encoded]) -> list[str]:
    """A line about tokens of ``lora.trainable_token_indices`` that no sample has, where there are
    any: the embedding gives their rows no gradient."""
    missing = set(tokens)
    for sample in samples:
        # Most often after a few samples: then the rest need not be read.
        if not missing:
            return []
        wanted = np.fromiter(missing, dtype=np.int64, count=len(missing))
        missing -= set(wanted[np.isin(wanted, sample.input_ids)].tolist())
    if not missing:
        return []
    return [
        f"lora.trainable_token_indices: no training sample has {first_few(sorted(missing), 5)}:"
        " only a head that is tied to the embedding gives such a row a gradient"
    ]
