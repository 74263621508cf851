"""``safealloc repro``: ``command`` runs the sections, each of which is a module; ``operands`` is what they share."""
