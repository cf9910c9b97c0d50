"""Benchmarks that compare this project with common alternatives, both measured in one run on one machine."""
