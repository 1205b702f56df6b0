"""Write a config's options as a JSON schema, by which editors complete and check YAML files.

It knows the type and the meaning of each option. What depends on several options, on the model or
on the number of ranks is checked when the config is read.
"""

import types
from typing import Any, Literal, get_args, get_origin

from megalora.config.reference import BASE_MEANING, Option, options_of, sections
from megalora.config.tree import BASE
from megalora.config.type_words import alternatives

# The version that editors' YAML plug-ins read.
DRAFT = "http://json-schema.org/draft-07/schema#"
_NAMES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    types.NoneType: "null",
}


def schema() -> dict[str, Any]:
    """The schema of a config file.

    Nothing is required: a file may leave out what its base or the command line gives.
    """
    properties: dict[str, Any] = {BASE: {"type": "string", "description": BASE_MEANING}}
    for section in sections():
        # The purpose stands before the keys, as an editor shows it above them.
        properties[section.name] = {
            "description": section.purpose,
            **_mapping(section.options),
        }
    return {
        "$schema": DRAFT,
        "title": "megalora run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _mapping(options: tuple[Option, ...]) -> dict[str, Any]:
    """The schema of a mapping with these keys and no others."""
    properties = {}
    for option in options:
        # Of train.lr, lr: the section is the mapping around it.
        key = option.name.rpartition(".")[2]
        properties[key] = {"description": _description(option), **type_schema(option.hint)}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _description(option: Option) -> str:
    # In words: an editor would write a "default" into the file, where it hides later defaults.
    default = "required" if option.default == "required" else f"default: {option.default}"
    return f"{option.meaning.replace('``', '`')} ({default})"


def type_schema(hint: Any) -> dict[str, Any]:
    """The schema of the values that an annotation allows."""
    option, *others = alternatives(hint)
    if others:
        return {"anyOf": [type_schema(one) for one in (option, *others)]}
    # Texts: no option has a number or true among its values by name.
    if get_origin(option) is Literal:
        return {"enum": list(get_args(option))}
    if get_origin(option) in (list, tuple):
        return {"type": "array", "items": type_schema(get_args(option)[0])}
    if get_origin(option) is dict:
        return {"type": "object", "additionalProperties": type_schema(get_args(option)[1])}
    if option in _NAMES:
        return {"type": _NAMES[option]}
    # A mapping with keys of its own, which is given whole.
    keys = options_of(option, "")
    required = [key.name for key in keys if key.default == "required"]
    return {**_mapping(keys), "required": required}
