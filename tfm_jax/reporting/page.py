"""The page itself: one HTML file that contains its styles, its program, plotly.js and all data.

The charts are drawn by plotly.js, which comes with the Python package plotly, so that pip installs it and nothing is
fetched. It adds about 5 MB to each page. A smaller chart library would have to be copied into this repository or
written here; with plotly, zooming, the values under the mouse and heat maps come tested.

The data are JSON, in two blocks that change at different times. The program of the page puts every text from a run into
the page as text, never as HTML. A content security policy forbids the page to load anything from elsewhere.
"""

import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from plotly.offline import get_plotlyjs

from tfm_jax.files import replacing
from tfm_jax.reporting.curves import build_curves
from tfm_jax.reporting.levels import build_training_levels, build_validation
from tfm_jax.reporting.overview import build_overview
from tfm_jax.reporting.records import check_run, read_records, record_files
from tfm_jax.reporting.samples import build_samples, sample_files

REPORT = "report.html"
"""The page, in the folder of its run."""

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; media-src data:"
)
"""What the page may load: only what it contains."""

BLOCKS = ("curves", "samples")
"""The blocks of data: everything but the videos, and the videos."""


class Block(NamedTuple):
    """A block of the data of the page."""

    version: str
    """Changes when the files change that the block is built from."""
    text: str
    """JSON."""


def write_report(folder: Path) -> Path:
    """Write the page of a run to report.html in its folder, and return the path.

    Raises:
        InputError: `folder` is not the folder of a run, or its config.yaml or its prompts cannot be read.
    """
    check_run(folder)
    page = render({name: build_block(folder, name) for name in BLOCKS})
    with replacing(folder / REPORT) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return folder / REPORT


def version(folder: Path, name: str) -> str:
    """Return the version that a block has if it is built now."""
    paths = record_files(folder) if name == "curves" else sample_files(folder)
    return hashlib.sha256("\n".join(map(_stamp, paths)).encode(errors="surrogateescape")).hexdigest()[:16]


def build_block(folder: Path, name: str) -> Block:
    """Build a block from the files of a run. `write_report` names the errors."""
    before = version(folder, name)  # of the files as they were before: if they change now, the block is built again
    data = _build_curves(folder) if name == "curves" else build_samples(folder)
    return Block(before, json.dumps(data, allow_nan=False, separators=(",", ":")))


def render(blocks: Mapping[str, Block], live: bool = False) -> str:
    """Return the HTML of the page.

    Args:
        live: whether the page asks the server it came from for newer blocks.
    """
    name = json.loads(blocks["curves"].text)["name"]
    return Template(_read("page.html")).substitute(
        title=escape(f"{name}: training report"),
        policy=f"{POLICY}; connect-src 'self'" if live else POLICY,
        live=str(live).lower(),
        style=_read("page.css"),
        plotly=get_plotlyjs(),
        program="\n".join(_read(file) for file in ("charts.js", "page.js")),
        # Without "<", no text in the data can end the script element that contains it.
        **{name: block.text.replace("<", r"\u003c") for name, block in blocks.items()},
        **{f"{name}_version": block.version for name, block in blocks.items()},
    )


def _build_curves(folder: Path) -> dict[str, Any]:
    records = read_records(folder)
    return {
        **build_overview(folder, records),
        "curves": build_curves(records.metrics),
        "training_levels": build_training_levels(records.metrics),
        "validation": build_validation(records.validation),
    }


def _stamp(path: Path) -> str:
    try:
        about = path.stat()
    except FileNotFoundError:
        return f"{path} missing"
    return f"{path} {about.st_mtime_ns} {about.st_size}"


def _read(name: str) -> str:
    return (resources.files("tfm_jax.reporting") / name).read_text(encoding="utf-8")
