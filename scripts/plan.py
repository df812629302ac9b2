"""Check whether a run fits on a machine; the same as `tfm-plan`."""

from tfm_jax.cli.plan import main

if __name__ == "__main__":
    main()
