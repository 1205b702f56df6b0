"""Whole examples over the library, one folder each, that run as they are."""
