"""Tests of acr_reg.attention."""
