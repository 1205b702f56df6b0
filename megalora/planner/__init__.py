"""Predict memory and time of every layout before anything is paid for. Needs no torch."""
