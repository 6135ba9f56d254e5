"""Carries the tokens and the attention of a view back onto the image that the view was made from."""
