"""Brings the tokens and the attention of a view back onto the image that it was made from."""
