"""Refuse adapters of which vLLM would use only a part.

vLLM drops weights that no wrapped module takes, without a word at its default log level: those of
``lm_head`` or the router when ``--lora-target-modules`` leaves them out, and those of the layers of
a deeper base model. With this, the request that loads such an adapter gets an error that names the
modules.
"""

from __future__ import annotations

MAX_NAMED = 3


def install() -> None:
    from vllm.lora.model_manager import LoRAModelManager

    add_adapter = LoRAModelManager._add_adapter

    def add_adapter_whole(self, lora) -> None:
        # Packs q, k and v into qkv_proj and so on, so that names are those of the modules after it.
        add_adapter(self, lora)
        unused = unused_modules(lora.loras, self.modules)
        if unused and not _spread_over_stages():
            self.remove_adapter(lora.id)
            more = ""
            if len(unused) > MAX_NAMED:
                more = f" and {len(unused) - MAX_NAMED} more"
            raise ValueError(
                f"nothing on this server uses the adapter's {', '.join(unused[:MAX_NAMED])}{more}:"
                f" its --lora-target-modules are {self.lora_config.target_modules or 'all'}, and"
                " its base model may be another"
            )

    LoRAModelManager._add_adapter = add_adapter_whole


def unused_modules(adapted, wrapped) -> list[str]:
    """Module names with adapter weights that no wrapped module will ask for.

    Stacked expert files have a second entry, ``experts.base_layer``, which the module named
    ``experts`` takes along.
    """
    unused = []
    for name in adapted:
        if name.removesuffix(".base_layer") not in wrapped:
            unused.append(name)
    return sorted(unused)


def _spread_over_stages() -> bool:
    """Whether the model has pipeline stages: then each rank holds some layers, and rightly drops
    the weights of the others."""
    from vllm.distributed import get_pp_group

    return get_pp_group().world_size > 1
