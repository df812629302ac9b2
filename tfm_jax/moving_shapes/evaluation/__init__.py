"""Metrics of motion: generated clips measured against real clips of the same world."""
