"""Compute the contrast of the page's colours, and how far apart they are for people who confuse
some."""

import itertools
import re

import numpy as np
import pytest

from megalora.report.axis import brief, ticks
from megalora.report.colours import CIVIDIS, DASHES, SERIES, THEMES, style

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    """Linear RGB of ``#rrggbb``."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""
    luminances = sorted(float(XYZ[1] @ linear(colour)) for colour in (one, other))
    return (luminances[1] + 0.05) / (luminances[0] + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB, for the white of D65."""
    xyz = XYZ @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES)
def test_contrast_is_what_wcag_asks_for(theme: str) -> None:
    colours = THEMES[theme]
    for name in ("text", "muted"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    # Lines that carry meaning: 3.
    for name in SERIES:
        assert contrast(colours[name], colours["page"]) >= 3, name


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", THEMES)
def test_runs_can_be_told_apart(theme: str, vision: str) -> None:
    """A difference of 2.3 is just noticeable side by side; thin lines need more."""
    colours = [THEMES[theme][name] for name in SERIES]
    for one, other in itertools.combinations(colours, 2):
        seen = [lab(VISION[vision] @ linear(colour)) for colour in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) > 15, (one, other)
    # And without any colour.
    assert len(set(DASHES)) == len(SERIES)


@pytest.mark.parametrize("vision", VISION)
def test_a_heat_map_grows_lighter(vision: str) -> None:
    lightness = [lab(VISION[vision] @ linear(colour))[0] for colour in CIVIDIS]
    assert min(np.diff(lightness)) > 5


def test_the_style_sheet_has_both_themes() -> None:
    text = style()
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for theme, part in (("light", light), ("dark", dark)):
        found = dict(re.findall(r"--(\w+): (#\w{6});", part))
        assert found == THEMES[theme]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.2, 1.1, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 17, [0, 5, 10, 15]),
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (1.0e-5, 9.0e-5, [2e-5, 4e-5, 6e-5, 8e-5]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_numbers_are_brief() -> None:
    values = (0, 0.5, 1234567, 0.00012, 12345, 9999, -2.5e9)
    written = [brief(value) for value in values]
    assert written == ["0", "0.5", "1.235M", "1.2e-04", "12.35k", "9999", "-2.5G"]
