"""What the ways to keep padding zero cost, measured side by side in a checkout: ``python -m benchmarks``."""
