"""Bad input through the real programs: one clear line each, the right exit code, nothing written, nothing compiled."""

from collections import Counter
from pathlib import Path
from string import Template

import pytest
from helpers.bad_clips_table import CLIP_FILES
from helpers.bad_data_table import DATA_FILES
from helpers.bad_input_table import OPTIONS, Row
from helpers.bad_models_table import MODEL_FILES
from helpers.bad_runs_table import RUNS
from helpers.breaking import Place
from helpers.tiny_world import without_arithmetic, write_world

from tfm_jax.moving_shapes.pretraining import recipe
from tfm_jax.moving_shapes.study import clips
from tfm_jax.train import loop
from tfm_jax.wan.transformer import WanTransformer
from tfm_jax.wan.vae import WanVae


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A world with a run that has checkpoints after steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("sound")
    with pytest.MonkeyPatch.context() as patched:
        without_arithmetic(patched)
        write_world(folder, steps=3, checkpoint_every=1)
    return folder


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """What takes long, to compile or to run, fails the test: bad input has to be found before it.

    The text encoder gives zeros instead: the weights that come after it cannot be looked at before.
    """

    def started(*_, **__):
        pytest.fail("the program began to work")

    without_arithmetic(monkeypatch)
    monkeypatch.setattr(loop, "_compile", started)
    for network, method in ((WanTransformer, "__call__"), (WanVae, "encode"), (WanVae, "decode")):
        monkeypatch.setattr(network, method, started)
    monkeypatch.setattr(recipe, "draw_clips", started)
    monkeypatch.setattr(clips, "write_clips", started)


def files(*folders: Path) -> dict[Path, tuple | None]:
    """Every path below the folders; of a file what changes when it is written."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    found = {}
    for path in paths:
        about = path.lstat()
        found[path] = None if path.is_dir() else (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


@pytest.mark.parametrize(
    "row", [*OPTIONS, *RUNS, *CLIP_FILES, *DATA_FILES, *MODEL_FILES], ids=lambda row: f"{row.program}: {row.wrong}"
)
def test_bad_input(row: Row, sound, tmp_path, call, monkeypatch):
    place = Place(sound, tmp_path / "tmp")
    for folder in (place.tmp, tmp_path / "here"):
        folder.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    for change in row.broken:
        change(place)
    before = files(sound, tmp_path)

    def filled(text: str) -> str:
        return Template(text).safe_substitute(world=place.world, tmp=place.tmp)

    outcome = call(row.program, *map(filled, row.arguments))
    assert outcome.code == row.code, outcome
    *others, last = outcome.err.splitlines()
    if row.malformed:
        report, others = outcome.err, [*others, last]
    else:
        report = last
        assert last.startswith("error: "), outcome.err
    assert not any(line.startswith(("error: ", "Traceback")) for line in others), outcome.err
    for word in row.words:
        assert filled(word) in report, report
    after = files(sound, tmp_path)
    if row.set_aside:
        assert Counter(after.values()) == Counter(before.values())
    else:
        assert after == before
