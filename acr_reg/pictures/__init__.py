"""Draws class maps, label maps and attention over photos."""
