"""Watchers that send metrics to TensorBoard and Weights & Biases. Both packages are optional."""

import importlib
import math
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfm_jax.console import log
from tfm_jax.errors import InputError
from tfm_jax.train.watching import About, Event, Watcher


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers of a step or an evaluation by the names of their charts, such as validation/lora/fm."""
    if event.kind == "validation":
        values = {f"validation/{event.values['model']}/{name}": x for name, x in event.values["loss"].items()}
    elif event.kind == "step":
        values = {f"train/{name}": x for name, x in event.values.items()}
    else:
        values = {}
    return {name: x for name, x in values.items() if isinstance(x, float) and math.isfinite(x)}


class TensorBoard(Watcher):
    """Writes event files to tensorboard/ in the folder of the run.

    Raises:
        InputError: tensorboardX, which writes them without TensorFlow, is not installed.
    """

    def __init__(self) -> None:
        try:
            self._module: Any = importlib.import_module("tensorboardX")
        except ImportError:
            missing = "tensorboardX is not installed; expected it: pip install tensorboardX"
            raise InputError(f"train.tensorboard=true: {missing}") from None
        self._writer: Any = None

    def open(self, about: About) -> None:
        # purge_step hides what an interrupted run wrote after its last checkpoint.
        self._writer = self._module.SummaryWriter(str(about.output / "tensorboard"), purge_step=about.first + 1)

    def on_event(self, event: Event) -> None:
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event.step)

    def close(self) -> None:
        self._writer.close()


class Wandb(Watcher):
    """Sends metrics, configuration and samples to Weights & Biases.

    Whatever fails there is printed once; training goes on without it. A resumed run continues the same W&B run, whose
    identifier is in .wandb_id in the folder of the run.

    Args:
        project: the W&B project.
    """

    def __init__(self, project: str):
        self._project = project
        self._run: Any = None

    def open(self, about: About) -> None:
        self._try(lambda: self._start(about))

    def _start(self, about: About) -> None:
        wandb = importlib.import_module("wandb")
        file = about.output / ".wandb_id"
        if not file.exists():
            file.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=self._project, name=about.output.name, id=file.read_text(), resume="allow", dir=str(about.output),
            config=dict(about.config),
        )  # fmt: skip

    def on_event(self, event: Event) -> None:
        if not self._run:
            return
        if event.kind == "samples":
            self._try(lambda: self._send_videos(event))
        elif values := scalars(event):
            self._try(lambda: self._run.log(values, step=event.step))

    def _send_videos(self, event: Event) -> None:
        wandb = importlib.import_module("wandb")
        folder = Path(event.values["folder"])
        videos = {f"samples/{file.stem}": wandb.Video(str(file)) for file in sorted(folder.glob("*.mp4"))}
        self._run.log(videos, step=event.step)

    def close(self) -> None:
        if self._run:
            self._try(self._run.finish)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # any: W&B, its files or the network must not stop a training run
            self._run = None
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            log(f"note: train.wandb={self._project}: {reason}; training goes on without W&B")
