"""A checkpoint is a PEFT adapter folder plus ``training_state/``; written whole or not at all.

step_000050/
  adapter_config.json  adapter_model.safetensors     loads in PEFT as it is
  probe.json              log-probabilities that a server must repeat
  training_state/
    state.json            step, config, world
    index.json            which rank's file holds which part of each tensor (``state_index.py``)
    rank_00000.safetensors  float32 masters, Adam moments and generators of one rank
"""
