"""Host codebases, the file formats of their class maps, and folders of such files."""
