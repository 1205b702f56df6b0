"""Adapter folders, written for each engine."""
