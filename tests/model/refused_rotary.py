"""List rotary settings of ``config.json`` that must be refused, as ``refused_fields.py`` lists
others."""

from typing import Any

REFUSED_ROTARY: list[tuple[str, dict[str, Any], str]] = [
    # Frequencies that depend on the length of each input, or on more than one position (Qwen2-VL):
    # they cannot be a table that is made once.
    (
        "qwen3",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling is of type 'dynamic', whose frequencies",
    ),
    ("qwen3", {"rope_scaling": {"rope_type": "longrope"}}, "is of type 'longrope'"),
    (
        "qwen3",
        {"rope_scaling": {"type": "mrope", "mrope_section": [16]}},
        "is of type 'mrope'; megalora computes default, linear",
    ),
    # A setting that the kind needs, one that it does not read, and values of a wrong type or range.
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "linear"}},
        "rope_scaling of type 'linear' must have factor",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
        "has beta_fast=3, which type 'linear'",
    ),
    (
        "qwen3",
        # The older spelling and the newer one at odds.
        {"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
        "must name one kind, as rope_type or as",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": "4"}},
        "has factor='4'; it must be a number of at least 1",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}},
        "has factor=0.5; it must be a number of at least 1",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": 0}},
        "has truncate=0; it must be true or false",
    ),
    (
        "qwen3",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 4.5,
            }
        },
        "has original_max_position_embeddings=4.5; it must be a whole number above 0",
    ),
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
        "must have low_freq_factor, high_freq_factor",
    ),
    # vLLM multiplies by attn_factor, transformers ignores it: a model that two engines compute
    # differently.
    (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.88}},
        "remove it and set attention_factor",
    ),
    ("qwen3", {"rope_scaling": "yarn"}, "rope_scaling='yarn'; it must be an object or null"),
    # The base stands only in the dictionary that transformers drops.
    (
        "qwen3",
        {
            "rope_theta": ...,
            "rope_scaling": {"type": "yarn", "factor": 4.0},
            "rope_parameters": {"rope_theta": 1e6},
        },
        (
            "has rope_scaling, which transformers lets replace rope_parameters with its"
            " rope_theta=1000000.0; it would then take 10,000"
        ),
    ),
    # Frequencies are powers of theta: with 1 all would be equal, below 1 they would grow.
    ("qwen3", {"rope_theta": None}, "rope_theta=None; it must be a number above 1"),
    ("qwen3", {"rope_theta": 1}, "rope_theta=1; it must be a number above 1"),
    # Beyond float64.
    ("qwen3", {"rope_theta": 10**400}, "0000; it must be a number above 1"),
    (
        "qwen3",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 0,
                "high_freq_factor": 4.0,
            }
        },
        "has low_freq_factor=0; it must be a number above 0",
    ),
    ("qwen3", {"rope_theta": -1}, "rope_theta=-1; it must be a number above 1"),
    # Two spellings that disagree; the published rope_theta is 1,000,000.
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "several rope_theta: 10000.0, 1000000",
    ),
    (
        "qwen3",
        {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        "has both rope_scaling=",
    ),
    (
        "qwen3",
        # One rotary setting for each kind of layer.
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters has full_attention=",
    ),
    # GLM turns half a head; transformers' Qwen3 would ignore the field or fail on it.
    (
        "qwen3",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5; models of this family rotate whole heads",
    ),
    (
        "qwen3",
        {"rope_parameters": {"partial_rotary_factor": 0.25}},
        "partial_rotary_factor=0.25; models of this family",
    ),
]
