"""What scale bytes are and where they lie: nothing here allocates or launches."""
