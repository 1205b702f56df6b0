"""Find out whether a vLLM server's log-probabilities are of the distribution that it samples from.

A server says it nowhere, and by default they are those of the logits at a temperature of 1
(``raw_logprobs``), whatever temperature a request asks for. Learned from as if they were scaled,
every ratio of the loss would be wrong.
"""

from collections.abc import Sequence
from typing import Any

from megalora.rl.draft import AS_TRAINED
from megalora.serve.errors import ServerError
from megalora.serve.vllm import Client

SCALED = ("--logprobs-mode", "processed_logprobs")
"""Arguments with which vLLM divides by the temperature first."""
LIKELY = 5
"""Number of the most likely tokens that are asked for."""
COLD = 0.25
"""The temperature that is compared with 1: it multiplies differences of log-probabilities by 4."""
SMALLEST_SPREAD = 1e-2
"""Nats below which rounding to bfloat16 could look like a temperature."""


def check_scaled(client: Client, model: str, tokens: Sequence[int]) -> None:
    """Raise ``ServerError`` unless log-probabilities are those at the temperature of a request.

    One token is sampled at 1 and one at ``COLD``. Of the most likely tokens, log p(a) - log p(b) is
    divided by the temperature where log-probabilities are scaled, and the same where they are not.

    Args:
        model: id of an adapter in service.
        tokens: any text.
    """
    where = f"{client.api.url}: {model}"
    warm = _spread(client, model, tokens, 1.0)
    cold = _spread(client, model, tokens, COLD)
    if warm < SMALLEST_SPREAD:
        raise ServerError(
            f"{where}: objective.policy.temperature needs log-probabilities at it, and this model"
            f" takes the {LIKELY} likeliest tokens for equally likely ({warm:.1e} nats), so that"
            " it cannot be told whether they are"
        )
    factor = cold / warm
    # Halfway between 1 and 1 / COLD, by ratio.
    if factor < COLD**-0.5:
        raise ServerError(
            f"{where}: its log-probabilities are not those at the temperature of a request (factor"
            f" {factor:.3g}, {1 / COLD:g} is wanted). For objective.policy.temperature start vLLM"
            f" with {' '.join(SCALED)}"
        )


def _spread(client: Client, model: str, tokens: Sequence[int], temperature: float) -> float:
    """Difference of the largest and the smallest of the ``LIKELY`` log-probabilities, in nats."""
    fields: dict[str, Any] = AS_TRAINED | {
        "prompt": [*tokens], "max_tokens": 1, "temperature": temperature, "logprobs": LIKELY,
        # By id, because two tokens may have the same text.
        "return_tokens_as_token_ids": True,
    }  # fmt: skip
    answer = client.api.completion(model, fields)
    (found,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    # The sampled token stands beside them, which may be a less likely one.
    likely = sorted(found.values(), reverse=True)[:LIKELY]
    return likely[0] - likely[-1]
