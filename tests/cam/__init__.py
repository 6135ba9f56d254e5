"""Tests of cam."""
