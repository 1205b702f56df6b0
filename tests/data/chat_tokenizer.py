"""Train a byte-level BPE of 300 tokens for tests, with a chat template of each kind."""

from collections.abc import Iterable
from itertools import groupby

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Qwen's: the turn ends with <|im_end|>, which is the end-of-sequence token, too.
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
# As Qwen2, Yi and most fine-tuned models: every role has the same frame.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}\
{{- '\n<tool_call>\n' + call.name + '\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# As Qwen3: turns before the last question lose their reasoning; turns after it always get a think
# block, an empty one where the message has no reasoning.
QWEN3 = """\
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last_query = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n')\
.split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query %}
            {{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') \
+ '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# {% generation %} is the template's own statement of what the assistant generates; transformers
# makes its assistant mask of it.
# The block ends before the end-of-turn token ...
MARKED_OPEN = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content }}{% endgeneration %}
{%- else %}{{- message.content }}{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# ... or after it, where the next turn's special token follows directly.
MARKED_CLOSED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}\
{{- message.content + '<|im_end|>\n' }}{% endgeneration %}
{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}"""
# As Llama 2: no header for the assistant, spaces around what it says.
LLAMA2 = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- ' ' + message.content.strip() + ' ' + eos_token }}
{%- elif message.role == 'user' %}{{- '[INST] ' + message.content.strip() + ' [/INST]' }}
{%- else %}{{- raise_exception('only user and assistant are supported') }}{%- endif %}
{%- endfor %}"""
TEMPLATES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "marked_open": MARKED_OPEN,
    "marked_closed": MARKED_CLOSED,
    "llama2": LLAMA2,
}
# A few words of the tests, so that some tokens are whole words and others single bytes.
_TEXT = (
    "user assistant What is the sum of two numbers? The answer is forty two, I think. Good morning"
    " to you."
)


def make_tokenizer(
    template: str | None = "chatml",
    trim_offsets: bool = False,
    specials: Iterable[str] = (),
    **kwargs: str | None,
) -> PreTrainedTokenizerFast:
    """A fast tokenizer.

    Args:
        template: a key of ``TEMPLATES``; None for a tokenizer without a chat template.
        trim_offsets: leave white space out of the offsets of tokens, as Llama 3's tokenizer does.
        specials: special tokens beside ``SPECIALS``.
        kwargs: further arguments for ``PreTrainedTokenizerFast``, such as ``bos_token``.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    # All 256 bytes are tokens, so that any text can be tokenised and decoded again.
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # A dict drops repeated names and keeps the order.
    all_specials = list(dict.fromkeys([*SPECIALS, *specials]))
    trainer = trainers.BpeTrainer(
        # 256 bytes and 41 merges; 300 with the three of ``SPECIALS``.
        vocab_size=297 + len(all_specials),
        special_tokens=all_specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator([_TEXT] * 3, trainer)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **kwargs}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = TEMPLATES[template] if template else None
    return tokenizer


def learned(encoded, tokenizer):
    """The text of each run of tokens in the loss."""
    runs = []
    start = 0
    for in_loss, group in groupby(encoded.loss_mask.tolist()):
        length = len(list(group))
        if in_loss:
            runs.append(tokenizer.decode(encoded.input_ids[start : start + length].tolist()))
        start += length
    return runs
