"""Asks whether all-pairs consistency makes class maps better on photos."""
