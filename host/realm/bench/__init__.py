"""Benchmarks of a whole host, for ``realm bench``."""
