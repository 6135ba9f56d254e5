"""Class activation maps: made from attention gradients, refined, and computed for whole models."""
