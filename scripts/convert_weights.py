"""Convert weights between layouts; the same as `tfm-convert`."""

from tfm_jax.cli.convert import main

if __name__ == "__main__":
    main()
