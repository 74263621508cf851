"""One file a command: each returns data, and prints last. A section of ``repro`` that is long has a file of its own."""
