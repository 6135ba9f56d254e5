"""Finds the grid of the image on which the tokens of a captured attention call lie."""
