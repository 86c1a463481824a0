"""Benchmarks speed and memory of models, on this machine and on a phone."""
