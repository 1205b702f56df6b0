"""Answer to an adapter's plain name with its newest version, inside vLLM's HTTP server.

Adapters are loaded as NAME@VERSION, and vLLM 0.32 knows no other name for them. Here NAME means the
version that was loaded last, at every route that takes a model.

vLLM's handlers look at a request's model twice: ``_check_model`` as it arrives, and, once its
prompt is rendered, ``_maybe_get_adapters``, which ties the request to one adapter for good. NAME is
looked up at both moments: a version that is unloaded in between is replaced by the newer one, so
that a swap loses no request. Bodies and streams are not touched.
"""

from __future__ import annotations

import copy

NOT_FOUND = 404


def install() -> None:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    answer_by_name(BaseServing)
    list_names(OpenAIServingModels)


def newest(loaded, name: str | None) -> str | None:
    """The id that a request for ``name`` means; None where no adapter has this name.

    Args:
        loaded: adapters by id, in the order of loading.
    """
    # Requests without a model are the base's.
    if not name or name in loaded:
        return name or None
    # A dict keeps the order of loading; an id that is loaded again in place stays where it is.
    for model in reversed(loaded):
        if name_of(model) == name:
            return model
    return None


def name_of(model: str) -> str | None:
    """NAME of an id NAME@VERSION; None for other ids."""
    return model.rpartition("@")[0] or None


def answer_by_name(serving) -> None:
    """Make the handlers of this class take plain names of adapters, and name what is served where a
    name is unknown."""
    check_model = serving._check_model
    get_adapter = serving._maybe_get_adapters

    async def check_by_name(self, request):
        # Through vLLM's own check, which also writes its log of requests.
        answer = await check_model(self, by_id(self.models, request))
        if answer is not None and answer.error.code == NOT_FOUND:
            answer.error.message = (
                f"The model `{request.model}` does not exist."
                f" Valid aliases: {', '.join(_served(self.models))}."
            )
        return answer

    def get_by_name(self, request, *args, **kwargs):
        return get_adapter(self, by_id(self.models, request), *args, **kwargs)

    serving._check_model = check_by_name
    serving._maybe_get_adapters = get_by_name


def by_id(models, request):
    """The request with the id that its name means; the request itself where it names the base or
    nothing that is served."""
    # As vLLM decides: a base comes first, whatever adapters are called.
    if models.is_base_model(request.model):
        return request
    model = newest(models.lora_requests, request.model)
    if model in (None, request.model):
        return request
    # A shallow copy, however long the prompt. The request keeps the name, which is looked up again.
    named = copy.copy(request)
    named.model = model
    return named


def list_names(models) -> None:
    """Make ``/v1/models`` list plain names behind the base models. ``parent`` of a name is the
    version that it means now."""
    show_available_models = models.show_available_models

    async def show_names_too(self):
        answer = await show_available_models(self)
        cards = {card.id: card for card in answer.data}
        bases = [card for card in answer.data if card.parent is None]
        named = []
        for name in _names(self.lora_requests):
            # Taken by a base, or by an adapter that somebody loaded without a version.
            if name not in cards:
                model = newest(self.lora_requests, name)
                card = copy.copy(cards[model])
                card.id = name
                card.parent = model
                named.append(card)
        # Base models stay first: clients take the first model for the default.
        answer.data = bases + named + answer.data[len(bases) :]
        return answer

    models.show_available_models = show_names_too


def _names(loaded) -> list[str]:
    """NAMEs of the adapters, each once, in the order of loading."""
    names = {}
    for model in loaded:
        if name_of(model):
            names[name_of(model)] = None
    return list(names)


def _served(models) -> list[str]:
    """All that a request may name: base models, names, ids."""
    bases = [base.name for base in models.base_model_paths]
    return list(dict.fromkeys([*bases, *_names(models.lora_requests), *models.lora_requests]))
