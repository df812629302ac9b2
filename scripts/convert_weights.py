"""Convert weights between layouts: `tfm-convert`."""

from tfm_jax.cli.convert import main

if __name__ == "__main__":
    main()
