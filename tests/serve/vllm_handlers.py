"""Stand in for vLLM 0.32's handlers where they look up a request's model, with our plug-in's names
put in as in vLLM.

After vllm/entrypoints/serve/engine/serving.py and vllm/entrypoints/openai/models/serving.py;
``test_by_name.py`` runs the plug-in inside vLLM itself.
"""

from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

from megalora.serve.vllm_cpu.vllm_cpu_moe_lora import names


class ModelMissing(Exception):
    """vLLM's VLLMNotFoundError, which its server answers with 404."""


class Models:
    """OpenAIServingModels: one base model, and adapters in the order of loading."""

    def __init__(self, base: str, base_path: str, loaded: dict[str, Any]) -> None:
        """``loaded``: (folder, ...) of each adapter by its id."""
        self.base_model_paths = [SimpleNamespace(name=base, model_path=base_path)]
        self.lora_requests = loaded

    def is_base_model(self, name: str) -> bool:
        return any(base.name == name for base in self.base_model_paths)

    async def show_available_models(self) -> SimpleNamespace:
        cards = []
        for base in self.base_model_paths:
            cards.append(SimpleNamespace(id=base.name, root=base.model_path, parent=None))
        for name, (path, *_) in self.lora_requests.items():
            parent = self.base_model_paths[0].name
            cards.append(SimpleNamespace(id=name, root=path, parent=parent))
        return SimpleNamespace(data=cards)


class Serving:
    """BaseServing: a chat or a completion checks the model first, and takes the adapter later."""

    def __init__(self, models: Models) -> None:
        self.models = models

    async def _check_model(self, request: Any) -> SimpleNamespace | None:
        if not request.model or self.models.is_base_model(request.model):
            return None
        if request.model in self.models.lora_requests:
            return None
        bases = ", ".join(base.name for base in self.models.base_model_paths)
        message = f"The model `{request.model}` does not exist. Valid aliases: {bases}."
        return SimpleNamespace(
            error=SimpleNamespace(message=message, type="NotFoundError", param="model", code=404)
        )

    def _maybe_get_adapters(self, request: Any, supports_default_mm_loras: bool = False) -> Any:
        if request.model in self.models.lora_requests:
            return self.models.lora_requests[request.model]
        if not request.model or self.models.is_base_model(request.model):
            return None
        raise ModelMissing(f"The model `{request.model}` does not exist.")


class NamedModels(Models):
    """With the plug-in."""


class NamedServing(Serving):
    """With the plug-in."""


names.answer_by_name(NamedServing)
names.list_names(NamedModels)


def result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")
