"""Measure layouts with the real training step, and the rates that the planner needs."""
