"""Bugs in live sync: what a message holds, whom a server believes, which versions there are. The
same form as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

PLUGIN = "megalora/serve/vllm_cpu/vllm_cpu_moe_lora"
WIRE = f"{PLUGIN}/wire.py"
ARRIVAL = f"{PLUGIN}/arrival.py"
MESSAGE = "megalora/serve/live/message.py"
PUBLISHER = "megalora/serve/live/publisher.py"
CHECKS = "megalora/serve/live/checks.py"
SENT = "tests/serve/test_message.py"
PUBLISHED = "tests/serve/test_publisher.py"

# fmt: off
LIVE_BUGS: tuple[Bug, ...] = (
    bug(0, "the hash of what arrives is not compared", WIRE,
        'if found != header["hash"]:', "if False:", f"{SENT} not_whole"),
    bug(0, "another version taken for the one that was asked for", WIRE,
        'if identity(ident.rpartition("@")[0], header) != ident:', "if False:",
        f"{SENT} not_whole"),
    bug(0, "tensors that are missing are not counted", WIRE,
        'if len(header["tensors"]) != header["count"]:', "if False:", f"{SENT} not_whole"),
    bug(0, "an adapter's config outside its hash", WIRE,
        'described = [header["form"], header["config"], header["tensors"]]',
        'described = [header["form"], header["tensors"]]', f"{SENT} not_whole"),
    bug(0, "down and up exchanged in the packed form", WIRE,
        'W = {"gate_proj": 1, "down_proj": 2, "up_proj": 3,',
        'W = {"gate_proj": 1, "down_proj": 3, "up_proj": 2,', f"{SENT} order_of_vllm"),
    bug(0, "B scaled twice in the packed form", MESSAGE,
        "tensor.mul_(part.scale)", "tensor.mul_(part.scale**2)", f"{SENT} order_of_vllm"),
    bug(0, "A scaled instead of B", MESSAGE,
        'if factor == "B":', 'if factor == "A":', f"{SENT} order_of_vllm"),
    bug(0, "the scale of a pattern left out of the packed form", MESSAGE,
        "return rules.scale(factor[0], rank, name)",
        'return rules.scale("lm_head", rank, name)', f"{SENT} order_of_vllm"),
    bug(0, "a version published as the one before", PUBLISHER,
        'label or f"v{version}"', 'label or f"v{version - 1}"', f"{PUBLISHED} in_use"),
    bug(0, "a version dropped before it is unloaded", PUBLISHER,
        "            try:\n                for server in self.servers:\n",
        "            self.source.messages.pop(version.id)\n"
        "            try:\n                for server in self.servers:\n",
        f"{PUBLISHED} before_it_is_dropped"),
    bug(0, "a version unloaded on the first server alone", PUBLISHER,
        "                for server in self.servers:\n                    with server.lock:\n",
        "                for server in self.servers[:1]:\n                    with server.lock:\n",
        f"{PUBLISHED} to_all_servers"),
    bug(0, "a version unloaded under its requests", PUBLISHER,
        "if version.number in in_use:", "if False:", f"{PUBLISHED} in_use"),
    bug(0, "a restarted server gets the newest version first", PUBLISHER,
        "for version in missing:", "for version in reversed(missing):",
        f"{PUBLISHED} catches_up"),
    bug(0, "in service without a proof", PUBLISHER,
        "if newest.probe is not None:", "if False:", f"{PUBLISHED} not_in_service"),
    bug(0, "a version that a server refuses tried again with the next", PUBLISHER,
        "                self._withdraw(ident)\n", "", f"{PUBLISHED} not_in_service"),
    bug(0, "an older version published again is not the newest", PUBLISHER,
        "if newest.id in loaded[:-1]:", "if False:", f"{PUBLISHED} going_back"),
    bug(0, "a restarted server believed to have its version", PUBLISHER,
        "if server.current is not None and server.current.id not in loaded:", "if False:",
        f"{PUBLISHED} catches_up"),
    bug(0, "what a server says it took is not compared", CHECKS,
        "if found != expected:", "if False:", f"{PUBLISHED} says_it_took"),
    bug(0, "in bfloat16 every server agrees", CHECKS,
        "return error <= max(RELATIVE * effect, ROUNDING)", "return True",
        f"{PUBLISHED} server_agrees"),
    bug(0, "adapters taken from anybody", ARRIVAL,
        "if url.hostname != allowed.hostname or not same_port:", "if False:",
        f"{PUBLISHED} only_the_training"),
    bug(0, "adapters given to anybody", "megalora/serve/live/source.py",
        "if not self._token:", "if True:", f"{PUBLISHED} only_the_training"),
    bug(0, "files of unloaded versions fill the memory", ARRIVAL,
        "while len(self.unloaded) > RETAINED:", "while False:", f"{PUBLISHED} to_all_servers"),
)
# fmt: on
