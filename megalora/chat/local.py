"""Answer with transformers and stock PEFT in this process, on one device."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from megalora import host
from megalora.adapters.read.adapter import read_adapter
from megalora.adapters.trained_on import model_config
from megalora.chat.session import Message
from megalora.data.conversation import Conversation
from megalora.data.template import ChatTemplate
from megalora.data.tokenizer import load_tokenizer
from megalora.generate.choose import Draws, choose
from megalora.generate.options import Sampling, model_sampling, stop_tokens
from megalora.model.account import open_folder
from megalora.model.held import rounded_names
from megalora.model.quantised.scheme import UNROUNDED, Rounded
from megalora.verify.stock_model import load_stock
from megalora.verify.stock_peft import check_for_peft, load_by_peft


class LocalEngine:
    """The base model, with an adapter that can be turned off."""

    has_base = True

    def __init__(self, base: Path, adapter: Path | None, dtype: str = "auto") -> None:
        """
        Args:
            base: folder of the base model.
            adapter: a PEFT folder; None for the base alone.
            dtype: of the weights; ``auto`` takes that of the base's files.

        Raises:
            ValueError: PEFT would not load the adapter, or would ignore a part of it.
        """
        self.base = base
        self.tokenizer = load_tokenizer(base, "--base")
        # Raises for a tokenizer without one.
        self.template = ChatTemplate(self.tokenizer)
        self.stop = stop_tokens(base)
        self.defaults = model_sampling(base)
        nf4: Rounded = UNROUNDED
        if adapter is not None:
            shape = open_folder(base).shape
            check_for_peft(adapter, read_adapter(adapter, shape, base=base), shape)
            # The values that training computed with, whatever the folder stores.
            nf4 = rounded_names(model_config(adapter, base, "float32"), base)
        model: Any = load_stock(base, dtype, nf4=nf4)
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        model = model.to(host.device())
        if adapter is not None:
            model = load_by_peft(model, adapter)
        self.has_adapter = adapter is not None
        self.model = model.eval()

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the conversation, up to where the answer begins, as in training."""
        conversation = Conversation(messages=[dict(message) for message in messages])
        return self.template.prompt_tokens(conversation)

    def stream(
        self, messages: Sequence[Message], options: Mapping[str, Any], *, by_base: bool, number: int
    ) -> Iterator[str]:
        """As the protocol says."""
        tokens = self.encode(messages)
        if self.max_positions is not None and len(tokens) >= self.max_positions:
            raise ValueError(
                f"the conversation has {len(tokens):,} tokens, and the model takes"
                f" {self.max_positions:,}; /reset begins a new one"
            )
        sampling = Sampling(**{**self.defaults, **options})
        without = nullcontext()
        if by_base and self.has_adapter:
            without = self.model.disable_adapter()
        shown = text = ""
        answer: list[int] = []
        with without:
            for token in self._tokens(tokens, sampling, number):
                answer.append(token)
                # All of it anew: how a token is written depends on those before it.
                text = self.tokenizer.decode(answer, skip_special_tokens=True)
                # A character of several tokens is not whole yet.
                if not text.endswith("\ufffd"):
                    yield text[len(shown) :]
                    shown = text
        yield text[len(shown) :]

    @torch.no_grad()
    def _tokens(self, prompt: list[int], sampling: Sampling, number: int) -> Iterator[int]:
        """The answer's tokens, without the one that ends it."""
        draws = [Draws(sampling.seed, number)]
        # The whole prompt at first, then one token a pass: its keys and values stay in ``past``.
        new = torch.tensor([prompt], device=host.device())
        past = None
        for _ in range(self._room(len(prompt), sampling.max_new_tokens)):
            # Logits of the last place alone: those of a long prompt would be gigabytes.
            out = self.model(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = out.past_key_values
            chosen, _ = choose(out.logits[:, -1], draws, sampling)
            token = int(chosen.item())
            if token in self.stop:
                return
            yield token
            new = chosen[:, None]

    def _room(self, num_prompt: int, wanted: int) -> int:
        """Tokens that the answer may have."""
        if self.max_positions is None:
            return wanted
        return min(wanted, self.max_positions - num_prompt)
