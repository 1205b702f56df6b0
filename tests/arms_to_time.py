"""Choose the arms of benchmarks that can be timed on a CPU."""


def without_triton(arms: dict) -> dict:
    """All arms but those whose kernels would be interpreted: that takes too long here, and
    tests/kernels has it."""
    kept = {}
    for name, build in arms.items():
        if "triton" not in name:
            kept[name] = build
    return kept
