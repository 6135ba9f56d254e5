"""Adds the loss to host codebases, and reads and writes their class maps."""
