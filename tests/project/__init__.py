"""Rules of the project itself: imports, packaging, versions, documents, snippets."""
