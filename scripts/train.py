"""Train a LoRA; the same as `tfm-train`."""

from tfm_jax.cli.train import main

if __name__ == "__main__":
    main()
