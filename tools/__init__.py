"""Run by hand, from the root: python -m tools.NAME."""
