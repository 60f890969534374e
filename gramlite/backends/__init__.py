"""Backends: a file or folder each runs one artifact format. They know nothing of judging. May import generation and what is below it."""
