"""Export the LoRA of a run; the same as `tfm-export`."""

from tfm_jax.cli.export import main

if __name__ == "__main__":
    main()
