"""The pages of docs/hosts, from the docstrings that hold the lines to add."""
