"""Load an adapter that came from a running training, inside vLLM's workers.

``arrival.py`` has written the message into a file, which the path names behind ``#``. A worker on
another machine does not see it, and fetches the message itself. Experts of a packed message go into
vLLM's own layout without a copy; all else goes vLLM's way of loading, by PEFT's names.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from . import arrival, wire


def install() -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager

    load_adapter = WorkerLoRAManager._load_adapter

    def load_live_adapter(self, request):
        if not arrival.is_live(request.lora_path):
            return load_adapter(self, request)
        return build(self, request, *message_at(request.lora_path, request.lora_name))

    WorkerLoRAManager._load_adapter = load_live_adapter


def message_at(path: str, ident: str) -> tuple[dict, Tensor]:
    """Header and buffer of an adapter, from this machine's file or from the training.

    Raises:
        Refused: the training is another one, is gone or has dropped the adapter.
        Damaged: the message is another one.
    """
    url = urlsplit(path)
    if url.fragment and Path(url.fragment).is_file():
        header, buffer = wire.split(arrival.read_file(Path(url.fragment)))
        # The bytes were hashed when the file was written.
        wire.check_header(header, ident)
        return header, buffer
    arrival.check_trainer(url, os.environ.get(arrival.TRAINER))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "message"
        arrival.fetch(url._replace(fragment=""), ident, place)
        # Still readable when the folder is gone.
        header, buffer = wire.split(arrival.read_file(place))
    wire.check(header, buffer, ident)
    return header, buffer


def build(manager, request, header: dict, buffer: Tensor):
    """vLLM's ``LoRAModel`` of a message, as ``WorkerLoRAManager._load_adapter`` makes it of a
    folder."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    adapters = manager._adapter_manager
    helper = PEFTHelper.from_dict(
        header["config"] | {"vllm_max_position_embeddings": manager.max_position_embeddings}
    )
    # Ranks beyond the server's and options that it lacks are refused here.
    helper.validate_legal(manager.lora_config)
    mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
    mapper = mapper.get_rename_mapper() if mapper is not None else None
    tensors, stacks = apart(wire.decode(header, buffer))
    model = LoRAModel.from_lora_tensors(
        request.lora_int_id,
        tensors,
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=mapper,
        skip_prefixes=getattr(adapters.model, "lora_skip_prefixes", None),
    )
    for block, factors in stacks.items():
        add_experts(manager, model, helper.r, block, factors, mapper)
    model.is_3d_lora_weight = False
    # As vLLM does after it has read a folder.
    adapters._validate_moe_lora_format(model)
    return model


def apart(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Tensors with PEFT's names, and stacks of experts: block -> ``w1.lora_A`` and so on."""
    plain = {}
    stacks: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        block, separator, factor = name.rpartition(".experts.w")
        if separator and tensor.dim() == 3:
            stacks[f"{block}.experts"][f"w{factor}"] = tensor
        else:
            plain[name] = tensor
    return plain, stacks


def add_experts(manager, model, rank: int, block: str, factors: dict, mapper) -> None:
    """Add the experts of a layer, whose B have their scale, as vLLM has them after packing."""
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.utils import parse_fine_tuned_lora_name

    # As vLLM finds the module of a tensor: without PEFT's prefix, renamed for this model.
    name, _ = parse_fine_tuned_lora_name(f"{block}.lora_A.weight", mapper)
    module = manager._adapter_manager.modules.get(name)
    if not isinstance(module, FusedMoEWithLoRA) or isinstance(module, FusedMoE3DWithLoRA):
        raise ValueError(
            f"the packed form does not fit {name} on this server ({type(module).__name__}); publish"
            " per_expert"
        )
    # Nothing is copied where the message has the server's dtype.
    dtype = manager.lora_config.lora_dtype
    a = [factors[f"w{number}.lora_A"].to(dtype) for number in (1, 2, 3)]
    b = [factors[f"w{number}.lora_B"].to(dtype) for number in (1, 2, 3)]
    # vLLM copies a smaller stack into a corner.
    if {stack.shape[0] for stack in (*a, *b)} != {module.global_num_experts}:
        raise ValueError(
            f"{name}: {a[0].shape[0]} experts were sent, and the base has"
            f" {module.global_num_experts}"
        )
    model.loras[name] = PackedLoRALayerWeights(name, rank, [rank] * 3, a, b, scaling=[1, 1, 1])
