"""Shows what a capture sees of a model, and where its tokens stand on the image."""
