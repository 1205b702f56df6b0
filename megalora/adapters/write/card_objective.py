"""Say in an adapter's card what its training minimised."""

from typing import Any


def objective_line(options: dict[str, Any]) -> str:
    """What was minimised, with what the config has set of it."""
    if options["name"] == "sft":
        return "supervised fine-tuning"
    # The loss is one of several of DPO, and says nothing of the others.
    shown = [f"loss {options['loss']}"] if options["name"] == "dpo" else []
    if options["name"] == "distill":
        teacher = options["teacher"]
        shown += ["the base" if teacher == "base" else f"`{teacher}`", options["divergence"]]
        shown.append(f"temperature {options['temperature']:g}")
    if options["name"] == "grpo":
        # null is all of its defaults.
        policy = options["policy"] or {}
        shown += [f"loss {policy.get('loss', 'clip')}"]
        if policy.get("kl_coef"):
            shown.append(f"kl_coef {policy['kl_coef']:g} to the {options['reference']}")
    names = ["beta", "label_smoothing", "sft_weight", "margin", "centre"]
    if options["name"] == "kto":
        names = ["beta", "desirable_weight", "undesirable_weight"]
    for name in names:
        # null stands for a default; a label smoothing of 0 for none. Earlier versions lack some.
        value = options.get(name)
        if value is not None and (name, value) != ("label_smoothing", 0):
            shown.append(f"{name} {value:g}")
    reference = ""
    if options["name"] in ("dpo", "kto"):
        # Checkpoints of earlier versions have no such option.
        is_start = options.get("reference") == "start"
        reference = f"; the reference is {'the adapter at the start' if is_start else 'the base'}"
    return f"{options['name']}{''.join(f', {part}' for part in shown)}{reference}"
