"""Export the LoRA of a run: `tfm-export`."""

from tfm_jax.cli.export import main

if __name__ == "__main__":
    main()
