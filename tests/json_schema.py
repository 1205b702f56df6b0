"""Judge values by a JSON schema: the keywords of draft 7 that megalora's schema uses, no others."""

from typing import Any

KNOWN = {
    "$schema", "title", "description", "type", "enum", "properties", "additionalProperties",
    "required", "items", "anyOf",
}  # fmt: skip
TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
    "null": type(None),
}  # fmt: skip


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether ``value`` is one that ``schema`` describes."""
    # A keyword that is not judged here would let anything pass.
    assert set(schema) <= KNOWN, f"unknown keywords {set(schema) - KNOWN}"
    if "anyOf" in schema and not any(is_valid(value, option) for option in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "type" in schema and not _is_of_type(value, schema["type"]):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(is_valid(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        return _is_valid_mapping(value, schema)
    return True


def _is_of_type(value: Any, name: str) -> bool:
    # To JSON, true is no number and 2.0 is an integer; megalora refuses the latter itself.
    if name in ("integer", "number") and isinstance(value, bool):
        return False
    if name == "number":
        return isinstance(value, int | float)
    return isinstance(value, TYPES[name])


def _is_valid_mapping(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    if not set(schema.get("required", ())) <= set(value):
        return False
    for key, item in value.items():
        # Of keys that are not named: a schema, or false for none.
        of_key = schema.get("properties", {}).get(key, schema.get("additionalProperties", {}))
        if of_key is False or not is_valid(item, of_key):
            return False
    return True
