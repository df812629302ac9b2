"""Write a page about a training run; the same as `tfm-report`."""

from tfm_jax.cli.report import main

if __name__ == "__main__":
    main()
