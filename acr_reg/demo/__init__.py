"""The command `python -m acr_reg demo`: does all-pairs consistency make class maps better? Needs the `demo` extra."""
