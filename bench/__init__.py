"""Accuracy-regression benchmarks for judges."""
