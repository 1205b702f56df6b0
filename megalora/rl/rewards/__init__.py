"""Judge completions: rewards by name, functions of the user's, and a pool of processes for them."""
