"""Tests of integrations/formats."""
