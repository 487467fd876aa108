"""Benchmarks: figures that no test asserts, each beside something to compare it with."""
