"""The benchmarks of `scripts/benchmark.py`, one module for each subject.

A subject is a module with a function `measure(sizes)` that yields rows (`timing.Row`). Each row has a figure of ours
and the figure of a peer that does the same work, from the same run.
"""
