"""Bugs in DoRA: the magnitude's place in the table of factors, norms, scaling, files. The same form
as ``bugs.py``."""

from tests.mutations.bugs import Bug, bug

SPEC = "megalora/lora/spec.py"
MAGNITUDE = "megalora/lora/magnitude.py"
TABLE = "tests/lora/test_factors.py"
NORMS = "tests/lora/test_magnitude.py"

DORA_BUGS: tuple[Bug, ...] = (
    bug(0, "a magnitude that is split like A", SPEC, '"M": Factor("B",', '"M": Factor("A",', TABLE),
    bug(0, "a magnitude in bfloat16", SPEC, "float32=True, decays", "decays", TABLE),
    bug(0, "magnitudes that are not counted", SPEC, "if FACTORS[factor].trained:",
        "if not FACTORS[factor].is_vector:", f"{TABLE} counted"),
    bug(0, "norms without the product of W and B A", MAGNITUDE, "(2 * wa_OR + b_OR @ gram_RR)",
        "(b_OR @ gram_RR)", f"{NORMS} definition"),
)  # fmt: skip
