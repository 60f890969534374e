"""GGUF files, run by llama.cpp."""

from .backend import open_artifact

__all__ = ["open_artifact"]
