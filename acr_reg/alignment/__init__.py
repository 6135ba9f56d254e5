"""Brings the tokens and the attention of a view back onto the image; a flip, like every view, goes through token_maps.py."""
