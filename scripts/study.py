"""Compare TFM with flow matching: `python scripts/study.py`."""

from tfm_jax.cli.study import main

if __name__ == "__main__":
    main()
