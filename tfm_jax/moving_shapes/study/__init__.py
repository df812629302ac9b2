"""The study of flow matching and TFM on the embedded model: protocol.py says what is compared, runs.py runs it."""
