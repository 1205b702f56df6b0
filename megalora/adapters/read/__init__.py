"""Adapter folders of every layout, read into one form."""
