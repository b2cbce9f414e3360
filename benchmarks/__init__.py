"""Benchmarks: every figure a ratio against a peer that ran in the same run, a step of each in turn."""
