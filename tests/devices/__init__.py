"""Tests of what no CPU shows: which device a tensor lies on, and how often one is read."""
