"""The benchmark suites of the paper, and quick checks without benchmarks."""
