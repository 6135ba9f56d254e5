"""Finds where on the image the tokens of a captured attention call lie."""
