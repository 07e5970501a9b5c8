"""Benchmarks: one command each, a table out, never a timed assertion."""
