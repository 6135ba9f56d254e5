"""Tests of runs over many images."""
