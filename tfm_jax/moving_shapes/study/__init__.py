"""Compares flow matching and TFM on the embedded model: protocol.py defines the study, and runs.py runs it."""
