"""Holds the attention that a model computed: one call, one layer, and the maps of one encoder run."""
