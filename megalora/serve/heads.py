"""Score heads of the adapters that vLLM serves."""

from megalora.adapters.files import CONFIG, WEIGHTS
from megalora.adapters.read.options import has_score
from megalora.adapters.read.weights import FLOATS
from megalora.hf.tensor_names import SCORE, weight_name
from megalora.model.shape import ModelShape
from megalora.serve.adapter_files import AdapterFiles
from megalora.serve.errors import AdapterForOtherBase, AdapterInvalid

SCORE_WEIGHT = weight_name(SCORE)


def num_scores(files: AdapterFiles, shape: ModelShape | None) -> int:
    """Numbers that the adapter's score head gives; 0 where it has none.

    Raises:
        AdapterInvalid, or a subclass that says more: the head is not there or does not fit.
    """
    if not has_score(files.config):
        return 0
    path = files.folder / WEIGHTS
    tensor = files.tensors.get(SCORE_WEIGHT)
    if tensor is None:
        raise AdapterInvalid(
            f"{path} has no {SCORE_WEIGHT}, which {CONFIG} says was trained; export it again"
        )
    if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
        raise AdapterInvalid(
            f"{path}: {SCORE_WEIGHT} is {tensor.dtype} {list(tensor.shape)}; must be a matrix of"
            " floats"
        )
    scores, hidden = tensor.shape
    if shape is not None and hidden != shape.hidden:
        raise AdapterForOtherBase(
            f"{path}: {SCORE_WEIGHT} is {scores} x {hidden}, and the base model's hidden size is"
            f" {shape.hidden}"
        )
    return scores


def kind_of(num_scores: int) -> str:
    """What an adapter with this many scores is, in words."""
    return f"a classifier of {num_scores} scores" if num_scores else "a language model"
