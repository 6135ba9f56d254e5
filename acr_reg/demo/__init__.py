"""Trains a model without and with the consistency loss and compares them; needs `pip install -e ".[demo]"`."""
