"""Tasks: documents and the questions about them, read, written and generated."""
