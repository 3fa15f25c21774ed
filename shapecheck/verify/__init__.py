"""How we prove it: an exported file against its contract."""
