"""Encode clips for training: `tfm-prepare`."""

from tfm_jax.cli.prepare import main

if __name__ == "__main__":
    main()
