"""Shows what a capture sees of a model, and where its tokens lie on the image."""
