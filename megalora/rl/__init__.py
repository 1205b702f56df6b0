"""Learning from rewards: sample completions, judge them, train on them, and sample again."""
