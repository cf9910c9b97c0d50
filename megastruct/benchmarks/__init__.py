"""Sixth floor: benchmarks that compare this project with common alternatives, measured in one run on one machine."""
