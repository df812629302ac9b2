"""Measure the motion in clips; the same as `tfm-evaluate`."""

from tfm_jax.cli.evaluate import main

if __name__ == "__main__":
    main()
