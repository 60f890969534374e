"""GGUF files, run by llama.cpp. May import generation and what is below it."""

from .backend import open_artifact

__all__ = ["open_artifact"]
