"""An adapter is used whole or refused. vLLM drops what no wrapped module takes, without a word at
its default log level.

That is what happens to ``lm_head`` or the router when ``--lora-target-modules`` leaves them out,
and to the layers of a deeper base model. The answer to the request that loads such an adapter is
then an error that names the modules.
"""

from __future__ import annotations

MAX_NAMED = 3


def install() -> None:
    from vllm.lora.model_manager import LoRAModelManager

    add_adapter = LoRAModelManager._add_adapter

    def add_adapter_whole(self, lora) -> None:
        # packs q, k and v into qkv_proj and so on: names are the modules' afterwards
        add_adapter(self, lora)
        unused = unused_modules(lora.loras, self.modules)
        if unused and not _spread_over_stages():
            self.remove_adapter(lora.id)
            more = f" and {len(unused) - MAX_NAMED} more" if len(unused) > MAX_NAMED else ""
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
    return sorted(name for name in adapted if name.removesuffix(".base_layer") not in wrapped)


def _spread_over_stages() -> bool:
    """With pipeline parallelism each rank holds some layers and is right to drop the others'
    weights."""
    from vllm.distributed import get_pp_group

    return get_pp_group().world_size > 1
