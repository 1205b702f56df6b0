"""Time the decoders of quantised weights on one core: ``python -m benchmarks.decoding``."""

import statistics
import time

import torch

from megalora.model.quantised.config import read_scheme
from megalora.model.quantised.decode import decode
from megalora.model.quantised.part import Part
from tests.oracles.quantised import CONFIGS, FORMS

SIZE = (768, 2048)
"""An expert's gate of Qwen3-30B-A3B."""
REPEATS = 7


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(*SIZE, generator=generator) * 0.02).bfloat16()
    for form, write in FORMS.items():
        stored, _ = write(weight)
        scheme = read_scheme(CONFIGS[form]())
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            decode(scheme, stored, Part.whole(SIZE), SIZE).bfloat16()
            times.append(time.perf_counter() - begin)
        print(f"{form}: {1e3 * statistics.median(times):.1f} ms")


if __name__ == "__main__":
    main()
