"""Write docs/scaling.md: `python scripts/scaling.py`."""

from tfm_jax.cli.scaling import main

if __name__ == "__main__":
    main()
