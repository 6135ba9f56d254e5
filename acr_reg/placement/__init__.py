"""Finds which grid of the image, if any, the tokens of a captured attention call lie on."""
