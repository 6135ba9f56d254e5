"""Computes the all-pairs consistency loss: its terms as pure functions, evaluated at once or in blocks of rows."""
