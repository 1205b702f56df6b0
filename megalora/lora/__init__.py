"""LoRA layers, and the table of what is adapted, how it is named and how it is split."""
