"""Encode clips for training; the same as `tfm-prepare`."""

from tfm_jax.cli.prepare import main

if __name__ == "__main__":
    main()
