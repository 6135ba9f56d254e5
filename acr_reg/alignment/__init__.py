"""Brings the tokens and the attention of a view, a flip like any other, back onto the image that it was made from."""
