"""Quantization calibrated on judging."""
