"""Choose ticks of an axis and write numbers briefly."""

import math


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most ``most`` of them, at distances of 1, 2 or 5 times a
    power of ten.

    >>> ticks(0.2, 1.1)
    [0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not low < high:
        return [low]
    distance = (high - low) / most
    power = 10.0 ** math.floor(math.log10(distance))
    step = 10 * power
    for factor in (1, 2, 5):
        if factor * power >= distance * (1 - 1e-9):
            step = factor * power
            break
    # Counted in whole steps: adding would gather rounding errors.
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def brief(value: float) -> str:
    """A number in at most four digits.

    >>> [brief(v) for v in (0, 0.5, 1234567, 0.00012, 12345)]
    ['0', '0.5', '1.235M', '1.2e-04', '12.35k']
    """
    size = abs(value)
    if size == 0:
        return "0"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            # From 10,000 on in thousands.
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    return f"{value:.1e}" if size < 1e-3 else f"{value:.4g}"
