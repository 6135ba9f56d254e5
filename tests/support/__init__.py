"""What tests share: toy models, oracles, makers of attention, checks of host codebases."""
