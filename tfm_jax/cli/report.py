"""Write a page about a training run: its curves, evaluations, samples, settings and events.

    tfm-report runs/kites
    tfm-report runs/kites --serve

The page, `report.html` in the folder of the run, is one file that needs no network, so it can be sent to others. It
shows the loss and its terms, the gradient norm, the learning rate and the speed, as curves to zoom into; the validation
loss by noise level, with the base model beside the LoRA; the samples of every saved step side by side; and settings,
environment and events. The run may still be going on, and nothing but its config.yaml and metrics.jsonl has to exist.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field
from tyro.conf import Positional

from tfm_jax.cli import command
from tfm_jax.config import NonEmptyPath, section
from tfm_jax.reporting.page import write_report
from tfm_jax.reporting.server import make_server


@section
class Options:
    run_folder: Positional[NonEmptyPath]
    """Folder of a training run, its train.output."""
    serve: Annotated[int | None, Field(ge=1, le=65535), command.ValueIfOmitted("8000")] = None
    """Then also show the page to browsers on this machine, at this port of 127.0.0.1 (8000 if no number is given), and
    refresh it while the run goes on. Ctrl-C ends this and writes the file again."""


def execute(argv: Sequence[str]) -> None:
    options = command.parse(Options, argv, "tfm-report", __doc__).options()
    _write(options.run_folder)
    if options.serve is not None:
        _serve(options.run_folder, options.serve)


def _write(run_folder: Path) -> None:
    file = write_report(run_folder)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB", flush=True)


def _serve(run_folder: Path, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    with make_server(run_folder, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows the run until Ctrl-C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # SIGTERM, too
            server.serve_forever()
    _write(run_folder)


def main() -> None:
    command.run(execute)
