"""A finished study as tables for the terminal, a page for the browser, an object for the notebook."""
