"""Draws class maps and attention over photos."""
