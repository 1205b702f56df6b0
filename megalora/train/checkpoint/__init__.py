"""A checkpoint is a PEFT adapter folder plus ``training_state/``; written whole or not at all.

step_000050/
  adapter_config.json  adapter_model.safetensors     loads in PEFT as it is
  probe.json              log-probabilities that a server must repeat
  training_state/
    state.json            step, config, world
    optimizer.safetensors float32 masters and Adam moments under HF names, whole tensors
    rng.safetensors       every rank's generators (dropout)
"""
