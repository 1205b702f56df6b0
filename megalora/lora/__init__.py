"""LoRA layers, and the one table that says what is adapted, how it is named and how it is split."""
