"""Sample videos; the same as `tfm-sample`."""

from tfm_jax.cli.sample import main

if __name__ == "__main__":
    main()
