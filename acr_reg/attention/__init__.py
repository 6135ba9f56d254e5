"""What attention leaves behind when a model runs: one call, one layer, and the maps of one encoder run."""
