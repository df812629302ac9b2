"""Inspect, convert, merge, compare and extract LoRA files; the same as `tfm-lora`."""

from tfm_jax.cli.lora import main

if __name__ == "__main__":
    main()
