"""Write the rooflines in docs/performance.md: `python scripts/rooflines.py`."""

from tfm_jax.cli.rooflines import main

if __name__ == "__main__":
    main()
