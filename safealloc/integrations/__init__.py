"""What makes frameworks use the pool."""
