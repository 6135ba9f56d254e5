"""Tests of integrations/hosts."""
