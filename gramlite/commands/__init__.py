"""One file a command: it parses, calls one function and prints. May import everything but the command line above it."""
