"""Decode the videos of a round on several devices at once, and write them; each process writes its own videos."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from tfm_jax import processes, video
from tfm_jax.errors import InputError
from tfm_jax.sampling.decoding import FrameLatents, check_latents, check_size, decode
from tfm_jax.sampling.latents import read_latents, write_latents
from tfm_jax.sampling.outputs import Samples
from tfm_jax.sharding import batch_mesh, first_devices
from tfm_jax.wan import load_vae

RoundLatents = Float[np.ndarray, "b f h w c"]


class VideoWriter:
    """Decodes and writes the videos of one round at a time.

    A round has one video for each shard of a batch: the first device of the shard decodes the video, and the process of
    this device writes it. In a run of several processes, all of them call the methods, with the same arguments. The
    program that a device runs does not depend on the number of devices.

    Raises:
        InputError: the autoencoder is damaged, or makes videos of another size than the configuration's.
    """

    def __init__(self, samples: Samples, mesh: Mesh):
        self._samples, self._run, self._rounds = samples, samples.run, 0
        devices = dict(enumerate(first_devices(mesh)))
        own = {place: device for place, device in devices.items() if device.process_index == jax.process_index()}
        self._places = list(own)
        if own:  # otherwise this process has nothing to decode
            self._mesh = batch_mesh(list(own.values()))
            self._vae = load_vae(self._run.model.path, mesh=self._mesh)
            check_size(self._vae, self._run)

    def rehearse(self, numbers: Sequence[int], latents: RoundLatents) -> None:
        """Decode the latents of a round without writing anything.

        Raises:
            InputError: latents or pixels are not finite.
        """
        own = {numbers[place]: latents[place] for place in self._places}
        _raise_first(self._decode(own, lambda _, frames: deque(frames, maxlen=0)))
        self._meet()

    def write(self, numbers: Sequence[int], wanted: Collection[int], latents: RoundLatents | None = None) -> None:
        """Write the videos of a round that are `wanted`.

        Args:
            latents: the latents of the round, which are saved first; None if those of the wanted videos have been.

        Raises:
            InputError: latents or a video are not finite; the others have been written.
        """
        # A round that is filled up with copies has one video at several places. The first place is used.
        own = {numbers[place]: place for place in self._places if numbers.index(numbers[place]) == place}
        own = {number: place for number, place in own.items() if number in wanted}
        errors = []
        if latents is not None:
            errors += _attempt(lambda number: self._save(number, latents[own[number]]), own)
        saved = {number: self._read(number) for number in own if self._samples.latents_file(number).exists()}
        errors += self._decode(saved, self._write)
        self._meet()  # the first error ends all processes
        _raise_first(errors)

    def _decode(
        self, latents: Mapping[int, FrameLatents], use: Callable[[int, Iterator[np.ndarray]], object]
    ) -> list[InputError]:
        """Call `use` with the number and the frames of each video, and return the errors."""
        if not latents:
            return []
        numbers = list(latents)
        copies = [latents[numbers[-1]]] * (len(self._places) - len(numbers))  # for devices that would have no video
        with jax.set_mesh(self._mesh):
            frames = decode(self._vae, np.stack([*latents.values(), *copies]), numbers, self._run)
            return _attempt(lambda number: use(number, frames[number]), numbers)

    def _save(self, number: int, latents: FrameLatents) -> None:
        check_latents(latents, number, self._run)
        write_latents(self._samples.latents_file(number), latents[None])

    def _read(self, number: int) -> FrameLatents:
        size = (*self._run.clip.latent_size, self._vae.config.z_dim)
        [latents] = read_latents(self._samples.latents_file(number), size)
        return latents

    def _write(self, number: int, frames: Iterator[np.ndarray]) -> None:
        samples = self._samples
        video.write_clip(samples.video(number), frames, self._run.clip.rate, samples.about(number))

    def _meet(self) -> None:
        """Wait until every process has written its videos of this round."""
        self._rounds += 1
        processes.meet(f"{self._samples.folder}: round {self._rounds}")


def _attempt(action: Callable[[int], object], numbers: Iterable[int]) -> list[InputError]:
    """Call `action` for every number, in order, and return the errors."""
    errors = []
    for number in sorted(numbers):
        try:
            action(number)
        except InputError as error:
            errors.append(error)
    return errors


def _raise_first(errors: Sequence[InputError]) -> None:
    if errors:
        raise errors[0]
