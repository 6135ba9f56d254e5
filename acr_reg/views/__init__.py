"""Makes augmentations that can be undone: views, the samplers that draw them, and how a view carries a map."""
