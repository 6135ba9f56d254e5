"""Watches a model while it runs and hands out the attention that it computed."""
