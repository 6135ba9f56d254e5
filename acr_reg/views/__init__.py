"""Augmentations that can be undone: the views, the samplers that draw them, and how a view carries a map."""
