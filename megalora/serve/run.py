"""Run ``megalora serve``: start vLLM, prove that every adapter acts as it was trained, and stay
until told to stop."""

from collections.abc import Callable, Sequence

from megalora.hf.folder import local_folder
from megalora.hf.json_file import read_hf_config
from megalora.serve.proof import Proof, prove
from megalora.serve.server import Server

UNPROVEN = 1
"""Exit code where an adapter does not act, or not as it was trained."""


def serve(
    adapters: Sequence[str], base: str, say: Callable[[str], None],
    *, host: str = "127.0.0.1", port: int = 8000, atol: float = 1e-4, unproven: bool = False,
    extra: Sequence[str] = (),
) -> int:  # fmt: skip
    """Serve ``adapters`` (folders, or NAME=FOLDER) until vLLM ends or SIGTERM or Ctrl-C comes;
    returns an exit code.

    Args:
        say: called with lines for the user.
        atol: largest difference of a log-probability from the training side, in float32
            (``proof.py`` on bfloat16).
        unproven: serve even where the proof fails.
        extra: further arguments for vLLM.
    Raises:
        ValueError: vLLM would refuse or ignore an adapter, is not installed, or does not start.
    """
    hf = read_hf_config(local_folder(base, "--base", weights=False))
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    server = Server(base, adapters, host=host, port=port, dtype=dtype, extra=extra)
    say(f"starting vLLM for {base} ({server.dtype}); its log is {server.log}")
    with server, server.client() as client:
        proofs = []
        for name, folder in server.named.items():
            proof = prove(
                client,
                name,
                folder,
                served_dtype=str(server.dtype),
                atol=atol,
                fallback=lambda: _fallback(base),
            )
            proofs.append(proof)
            say(proof.text())
        # All of them are shown before one that failed ends the server.
        if not all(proof.ok for proof in proofs) and not unproven:
            say(
                "stopped: an adapter is not served as it was trained; --unproven serves it all the"
                " same"
            )
            return UNPROVEN
        say(_ready(server, proofs))
        return server.wait()


def _fallback(base: str) -> list[int]:
    """Tokens of the probe text, for adapters made elsewhere."""
    from megalora.data.probe_text import probe_tokens
    from megalora.data.tokenizer import load_tokenizer

    return probe_tokens(load_tokenizer(local_folder(base, "--base", weights=False), "--base"))


def _ready(server: Server, proofs: list[Proof]) -> str:
    """What can be asked now, and how: an adapter, or the base where there is none."""
    models = [str(server.base)]
    for proof in proofs:
        models.append(proof.model)
    model = proofs[0].model if proofs else server.base
    return (
        f"ready at {server.url}. Models: {', '.join(models)}\n"
        f"  curl {server.url}/v1/completions -H 'Content-Type: application/json'"
        f""" -d '{{"model": "{model}", "prompt": "..."}}'\n"""
        f"  a training pushes its checkpoints here with checkpoint.serve={server.url}; Ctrl-C"
        " stops it"
    )
