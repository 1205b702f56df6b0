"""Make tokenised conversations of given token ids, for tests of what comes after tokenising."""

import numpy as np

from megalora.data.chat import Encoded


def sample(ids, mask):
    """A tokenised conversation of these token ids; ``mask`` says which are in the loss."""
    return Encoded(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool))
