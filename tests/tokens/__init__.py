"""Tests of acr_reg.tokens."""
