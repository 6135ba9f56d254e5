"""Measures how much of the distance between two views' attention comes from resampling, before any training."""
