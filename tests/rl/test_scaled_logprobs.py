"""Tell raw log-probabilities from those at a temperature."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megalora.rl.scaled_logprobs import check_scaled
from megalora.serve.errors import ServerError
from megalora.serve.vllm import Client

LOGITS = [0.3, -1.2, 2.0, 0.9, -0.4, 1.1, -2.0]


def server(is_scaled: bool, logits: list[float]) -> Client:
    """Answers as vLLM, of which it is known; samples the least likely token."""

    def completion(model: str, fields: dict[str, Any]) -> dict[str, Any]:
        assert fields["prompt"] == [3, 4] and fields["max_tokens"] == 1
        # Of the base's generation_config.json they would otherwise be.
        assert fields["top_p"] == 1.0 and fields["top_k"] == 0
        divisor = fields["temperature"] if is_scaled else 1.0
        total = math.log(sum(math.exp(logit / divisor) for logit in logits))
        logprobs = sorted((logit / divisor - total for logit in logits), reverse=True)
        likely = [*logprobs[: fields["logprobs"]], logprobs[-1]]
        top = {f"token_id:{place}": value for place, value in enumerate(likely)}
        return {"choices": [{"logprobs": {"top_logprobs": [top]}}]}

    return cast(Client, SimpleNamespace(api=SimpleNamespace(url="http://a", completion=completion)))


def test_log_probabilities_at_the_temperature() -> None:
    check_scaled(server(True, LOGITS), "rl@v0.aa", [3, 4])
    with pytest.raises(ServerError, match=r"http://a: rl@v0.aa: its log-prob.*factor 1, 4 is want"):
        check_scaled(server(False, LOGITS), "rl@v0.aa", [3, 4])
    # Nothing to divide.
    for is_scaled in (True, False):
        with pytest.raises(ServerError, match="equally likely .* cannot be told"):
            check_scaled(server(is_scaled, [0.001 * logit for logit in LOGITS]), "m", [3, 4])
