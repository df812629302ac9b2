"""Train the embedded model from scratch: `python scripts/pretrain.py runs/wan_tiny`."""

from tfm_jax.cli.pretrain import main

if __name__ == "__main__":
    main()
