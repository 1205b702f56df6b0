"""Check that codes and scales of a held base are the bits that were loaded, once the first step is
done: no cast, optimizer or kernel may write to them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megalora.model.held_codes import HeldCodes
from megalora.train.drift import bit_hash
from megalora.wording import first_few


class HeldCheck:
    """Hashes of every held weight of this rank, as loaded. Without such weights it does nothing."""

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        self.held: dict[str, HeldCodes] = {}
        for number, chunk in enumerate(chunks):
            for name, module in chunk.named_modules():
                if isinstance(module, HeldCodes):
                    self.held[f"{number}.{name}"] = module
        self.loaded = [_hashes(module) for module in self.held.values()]

    def run_once(self) -> None:
        """``run`` behind the first step, where what would write to codes does so."""
        if self.loaded:
            self.run()
        self.loaded = []
        self.held = {}

    def run(self) -> None:
        """Raise ``RuntimeError`` that names the weights whose bits have changed."""
        changed: list[str] = []
        for (name, module), before in zip(self.held.items(), self.loaded, strict=True):
            if not torch.equal(_hashes(module), before):
                changed.append(name)
        if changed:
            raise RuntimeError(
                f"the codes of {len(changed):,} of {len(self.held):,} frozen weights are not those"
                f" that were loaded: {first_few(changed)}. This is a bug; please report it."
                " model.weight_format=plain trains without codes"
            )


def _hashes(module: HeldCodes) -> Tensor:
    """int64, on the device: of codes, of scales and of scales' codes."""
    found: list[Tensor] = []
    for buffer in module.buffers():
        # A hash of integers of 4 bytes; codes may end in fewer.
        flat = buffer.flatten().view(torch.uint8)
        whole = flat[: flat.numel() // 4 * 4].view(torch.int32)
        rest = flat[whole.numel() * 4 :].int()
        found.append(bit_hash(whole) + bit_hash(rest))
    return torch.stack(found)
