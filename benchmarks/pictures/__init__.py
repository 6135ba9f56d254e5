"""The pictures of the documentation, drawn by the library itself."""
