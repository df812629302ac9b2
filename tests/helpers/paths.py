"""Where the tests find the repository, the embedded model and each other."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
WAN_TINY = ROOT / "tfm_jax" / "moving_shapes" / "wan_tiny"
