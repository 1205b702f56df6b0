"""Colours of the page, for light and dark screens; tests compute their contrast, and how far apart
they are for people who confuse colours.

Four colours, one a run; each run has a dash pattern of its own too. Heat maps use nine steps of
matplotlib's cividis (Nunez, Anderton, Renslow, 2018), whose lightness alone tells them apart.
"""

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#ffffff", "text": "#1b1f24", "muted": "#555c66", "rule": "#d0d5da",
        "s0": "#1f6fd0", "s1": "#d06000", "s2": "#101418", "s3": "#801a50",
    },
    "dark": {
        "page": "#14181c", "text": "#e8eaed", "muted": "#a9b2bc", "rule": "#3a424b",
        "s0": "#4da3ff", "s1": "#e0a000", "s2": "#f5f5f5", "s3": "#c04a7a",
    },
}  # fmt: skip
SERIES = ("s0", "s1", "s2", "s3")
DASHES = ("none", "7 3", "2 2", "9 3 2 3")
MOST_RUNS = len(SERIES)
CIVIDIS = (
    "#00224e", "#1a386f", "#434e6c", "#61656f", "#7d7c78", "#9b9476", "#bcae6c", "#dec958",
    "#fee838",
)  # fmt: skip


def style() -> str:
    """The page's style sheet."""
    lines = [_variables(":root", THEMES["light"])]
    lines.append(f"@media (prefers-color-scheme: dark) {{ {_variables(':root', THEMES['dark'])} }}")
    for number, name in enumerate(SERIES):
        dash = DASHES[number]
        lines.append(f".line.{name} {{ stroke: var(--{name}); stroke-dasharray: {dash}; }}")
        lines.append(f".band.{name}, .dot.{name} {{ fill: var(--{name}); }}")
    for number, colour in enumerate(CIVIDIS):
        lines.append(f".h{number} {{ fill: {colour}; }}")
    return "\n".join([*lines, _RULES])


def _variables(selector: str, theme: dict[str, str]) -> str:
    declared = " ".join(f"--{name}: {colour};" for name, colour in theme.items())
    return f"{selector} {{ color-scheme: light dark; {declared} }}"


_RULES = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 0.8rem; max-width: 76rem; background: var(--page);
  color: var(--text); font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 0.4rem 0; }
.muted, figcaption { color: var(--muted); font-size: 0.9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
  gap: 1rem; }
figure { margin: 0; min-width: 0; max-width: 36rem; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--text); font: 11px system-ui, sans-serif; }
.axis { stroke: var(--muted); } .rule { stroke: var(--rule); }
.line { fill: none; stroke-width: 1.6; } .line.pale { stroke-width: 0.7; } .band { opacity: 0.2; }
.frame { fill: none; stroke: var(--muted); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.15rem 0.6rem 0.15rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { overflow-x: auto; white-space: pre-wrap; border-left: 3px solid var(--rule);
  padding-left: 0.6rem; font-size: 0.85rem; unicode-bidi: isolate; }
mark { background: none; color: inherit; text-decoration: underline; font-weight: 600; }
.key svg { width: 2.4rem; display: inline-block; vertical-align: middle; }
.key span { display: inline-block; margin-right: 1rem; white-space: nowrap; }
"""
