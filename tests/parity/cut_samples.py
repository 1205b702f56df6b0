"""Cut samples as ``data.too_long`` says, without a line of megalora's own cutting."""

from collections.abc import Iterable

from megalora.data.chat import Encoded
from tests.parity.grid import Case


def cut_by_hand(whole: Iterable[Encoded], case: Case) -> list[tuple[list[int], list[bool]]]:
    """(tokens, which of them are in the loss) of each sample that is trained on, as the options say
    it; the oracle does not take ours for the truth."""
    limit = case.data["max_length"]
    found = []
    for sample in whole:
        tokens = sample.input_ids.tolist()
        in_loss = sample.loss_mask.tolist()
        if len(tokens) <= limit:
            cuts = [slice(None)]
        elif case.too_long == "truncate_right":
            cuts = [slice(0, limit)]
        elif case.too_long == "truncate_left":
            cuts = [slice(len(tokens) - limit, None)]
        else:
            assert case.too_long == "split", f"{case.name}: a sample has {len(tokens)} tokens"
            # Neighbours share a token: the first one of a piece is predicted by nobody.
            cuts = [slice(at, at + limit) for at in range(0, len(tokens) - 1, limit - 1)]
        for cut in cuts:
            learned = in_loss[cut]
            if cut.start:
                learned[0] = False
            if any(learned):
                found.append((tokens[cut], learned))
    return found


def compare_samples(
    ours: Iterable[Encoded], theirs: Iterable[tuple[list[int], list[bool]]]
) -> None:
    found = [(sample.input_ids.tolist(), sample.loss_mask.tolist()) for sample in ours]
    assert found == list(theirs), "samples are not cut as data.too_long says"
