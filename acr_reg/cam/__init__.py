"""Makes class activation maps from attention gradients, refines them, and computes them for whole models."""
