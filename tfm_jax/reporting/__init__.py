"""The report of a training run: one HTML page, built from the files in the run's folder, that needs no network."""
