"""`python -m gramlite` is the command line."""

from .cli import main

main()
