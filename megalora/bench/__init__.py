"""Measures on the machine at hand: what a step takes (``runs.py``), and what the planner needs to
predict it (``calibrate.py``)."""
