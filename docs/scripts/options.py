"""Write docs/options.md: every key of a config with its values, default and meaning."""

from megalora.config.reference import Option, Section, sections, with_keys

HEAD = """# Options

Every key of a config file, by section. On the command line any of them can be overridden as
`section.key=value`, for example `train.lr=2e-4` or `lora.target_modules=[q_proj,v_proj]`. A mapping
replaces the mapping before it: `lora.rank_pattern={q_proj: 8}` leaves no other entry, and
`lora.rank_pattern.q_proj=8` leaves all others. An unknown key is an error that names the nearest
known one.

`base: other.yaml` beside the sections takes what a file does not say from another one.

`megalora options` prints this page by section or option (`megalora options train.lr`), and
`megalora options --schema` a JSON schema, by which editors complete and check config files. All of
them are written from the docstrings in [`megalora/config`](../megalora/config), the page by
`make docs`.
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([HEAD, *map(_section, sections())])


def _section(section: Section) -> str:
    """One section: its heading, what it is about, and a table of its keys."""
    lines = [f"## `{section.name}`\n", f"{section.purpose}\n"]
    lines += ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    options = [one for option in section.options for one in with_keys(option)]
    for option in options:
        # From reStructuredText to Markdown; a bare | would end the cell.
        meaning = option.meaning.replace("``", "`").replace("|", "\\|")
        lines.append(f"| `{option.name}` | {option.values} | {_default(option)} | {meaning} |")
    return "\n".join([*lines, ""])


def _default(option: Option) -> str:
    return option.default if option.default == "required" else f"`{option.default}`"
