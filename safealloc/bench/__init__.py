"""What ``safealloc bench`` measures, side by side in one run."""
