"""Measurements: `python -m benchmarks.<name>`; what each measures and its latest results are in README.md."""
