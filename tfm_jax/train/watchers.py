"""The watchers of a training run that its configuration asks for."""

from jax.sharding import Mesh

from tfm_jax import processes
from tfm_jax.data.records import Records
from tfm_jax.train.metrics import Console, EventLog, MetricsFile
from tfm_jax.train.run import TrainRun
from tfm_jax.train.samples import SampleVideos
from tfm_jax.train.trackers import TensorBoard, Wandb
from tfm_jax.train.validation import Validation
from tfm_jax.train.watching import Watcher


def configured_watchers(run: TrainRun, records: Records, mesh: Mesh) -> list[Watcher]:
    """Make the watchers of this process. Call this before the transformer is loaded, because the text encoder may be.

    Raises:
        InputError: validation has no clips, sampling has no prompts or no autoencoder, or a package is missing.
    """
    settings = run.train
    watchers: list[Watcher] = []
    if processes.is_first():
        watchers += [MetricsFile(), Console(settings.log_every), EventLog()]
        watchers += [TensorBoard()] if settings.tensorboard else []
        watchers += [Wandb(settings.wandb)] if settings.wandb else []
    if settings.eval_every:
        watchers.append(Validation(run, records, mesh))
    if settings.sample_every:
        watchers.append(SampleVideos(run, mesh))
    return watchers
