"""Judges in the shapes that other libraries ask for. Nothing here imports those libraries."""
