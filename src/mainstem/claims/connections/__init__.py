"""Claims about connections."""
