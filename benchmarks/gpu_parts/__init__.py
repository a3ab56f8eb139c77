"""The parts of `benchmarks/gpu.py`, each a function from a setting to figures."""
