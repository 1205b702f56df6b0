"""``megalora serve``: start vLLM, prove of every adapter that it acts as it was trained, and stay
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
        say: gets lines for the user.
        atol: largest difference of a log-probability from the training side, in float32
            (``proof.py`` on bfloat16).
        unproven: serve on where the proof fails.
        extra: further arguments of vLLM's.
    Raises: ``ValueError`` for an adapter that vLLM would refuse or ignore, a vLLM that does not
        start or is not there.
    """
    hf = read_hf_config(local_folder(base, "--base", weights=False))
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    server = Server(base, adapters, host=host, port=port, dtype=dtype, extra=extra)
    say(f"starting vLLM for {base} ({server.dtype}); its log is {server.log}")
    with server, server.client() as client:
        proofs = [
            prove(
                client,
                name,
                folder,
                served_dtype=str(server.dtype),
                atol=atol,
                fallback=lambda: _fallback(base),
            )
            for name, folder in server.named.items()
        ]
        for proof in proofs:
            say(proof.text())
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
    model = proofs[0].model if proofs else server.base
    return (
        f"ready at {server.url}. Models:"
        f" {', '.join([str(server.base), *(p.model for p in proofs)])}\n"
        f"  curl {server.url}/v1/completions -H 'Content-Type: application/json'"
        f""" -d '{{"model": "{model}", "prompt": "..."}}'\n"""
        f"  a training pushes its checkpoints here with checkpoint.serve={server.url}; Ctrl-C"
        " stops it"
    )
