"""Augmentations that know how to be undone: the views, what draws them at random, and how they carry maps."""
