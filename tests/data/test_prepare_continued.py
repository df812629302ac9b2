"""Preparing clips: how a stopped run continues, and when it may not."""

import dataclasses
import resource
import shutil
from pathlib import Path

import pytest
from helpers.fake_encoders import FakeEncoders, use_fakes
from helpers.prepare_runs import beside, contents, prepare_run, with_clip, write_clips

from tfm_jax.data import blocks as blocks_module
from tfm_jax.data import prepare as prepare_module
from tfm_jax.data.prepare import PrepareRun, prepare
from tfm_jax.errors import InputError, Terminated


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    return write_clips(tmp_path / "clips", monkeypatch)


@pytest.fixture
def stopped(clips, monkeypatch):
    """A function that starts a run and raises an error after some calls of the autoencoder."""
    latents = FakeEncoders.latents

    def stop(run: PrepareRun, after: int, error: BaseException) -> None:
        def failing(self, pixels):
            if len(self.calls) == after:
                raise error
            return latents(self, pixels)

        monkeypatch.setattr(FakeEncoders, "latents", failing)
        with pytest.raises(type(error)):
            prepare(run)
        monkeypatch.setattr(FakeEncoders, "latents", latents)

    return stop


@pytest.mark.parametrize("error", [KeyboardInterrupt, Terminated, ZeroDivisionError])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stopped_run_is_continued(clips, stopped, capsys, error, after):
    """In each call, the two clips of a block are encoded."""
    run = prepare_run(clips)
    stopped(run, after, error())
    assert beside(clips) == (["latents.partial"] if after else [])
    capsys.readouterr()
    assert prepare(run) == (5, 0)
    assert len(FakeEncoders.calls) == 3 - after
    assert ("blocks are finished" in capsys.readouterr().err) == bool(after)
    whole = prepare_run(clips, clips.with_name("whole"))
    prepare(whole)
    assert contents(run.data.path) == contents(whole.data.path)
    assert beside(clips) == ["latents", "whole"]


def test_a_kill_while_finishing(clips, monkeypatch):
    """At each step, the process ends without any cleanup; a copy of the folder is what is left."""
    run = prepare_run(clips)
    whole = prepare_run(clips, clips.with_name("whole"))
    prepare(whole)
    partial, left = clips.with_name("latents.partial"), []

    def watched(owner, name):
        method = getattr(owner, name)

        def copying(*args, **kwargs):
            if partial.exists():
                left.append(clips.with_name(f"{len(left)}.copy"))
                shutil.copytree(partial, left[-1])
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, copying)

    for name in ("write_index", "write_description", "write_manifest"):
        watched(blocks_module.files, name)
    for name in ("unlink", "rename"):
        watched(Path, name)
    prepare(run)
    monkeypatch.undo()
    use_fakes(monkeypatch)
    monkeypatch.setattr(blocks_module, "MAX_ROWS", 2)
    assert len(left) > 8
    assert any((copy / "manifest.json").exists() and not list(copy.glob("block-*")) for copy in left)
    for copy in left:
        shutil.rmtree(run.data.path)
        copy.rename(partial)
        assert prepare(run) == (5, 0)
        assert contents(run.data.path) == contents(whole.data.path)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda run: with_clip(run, frames=1), "clip.frames=5, not 1"),
        (lambda run: with_clip(run, fps="native"), "clip.fps=16.0, not native"),
        (lambda run: prepare_run(run.data.source, dtype="float32"), "data.dtype=bfloat16, not float32"),
        (lambda run: prepare_run(run.data.source, seed=1), "data.seed=0, not 1"),
        (
            lambda run: dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float32")),
            "model.dtype=bfloat16, not float32",
        ),
    ],
)
def test_other_settings_are_refused(clips, stopped, change, difference):
    run = prepare_run(clips)
    stopped(run, 1, KeyboardInterrupt())
    before = contents(clips.with_name("latents.partial"))
    with pytest.raises(InputError) as caught:
        prepare(change(run))
    partial = clips.with_name("latents.partial")
    remedy = f"use the old settings to continue, or remove {partial}"
    assert str(caught.value) == f"{partial}: was begun with {difference}; {remedy}"
    assert contents(partial) == before


def test_another_list_is_refused(clips, stopped):
    run = prepare_run(clips)
    stopped(run, 1, KeyboardInterrupt())
    with (clips / "metadata.csv").open("a") as table:
        table.write("4.mp4,another prompt\n")
    with pytest.raises(InputError, match=r"was begun with data.source=a list of 5 clips .*, not a list of 6 clips"):
        prepare(run)


def test_other_weights_are_refused(clips, stopped, monkeypatch):
    run = prepare_run(clips)
    stopped(run, 1, KeyboardInterrupt())
    found = prepare_module.find_encoders(Path())
    other = found._replace(fingerprints=found.fingerprints | {"vae": "f" * 16})
    monkeypatch.setattr(prepare_module, "find_encoders", lambda model: other)
    message = r"was begun with model.path: vae=the weights 0{16}, not the weights f{16}"
    with pytest.raises(InputError, match=message):
        prepare(run)


def test_max_rejected_may_change(clips, stopped):
    stopped(prepare_run(clips), 1, KeyboardInterrupt())
    assert prepare(prepare_run(clips, max_rejected=0)) == (5, 0)


def test_damaged_files_of_an_unfinished_run(clips, stopped):
    run = prepare_run(clips)
    stopped(run, 2, KeyboardInterrupt())
    partial = clips.with_name("latents.partial")
    marker, shard = partial / "block-00000.json", next(partial.glob("*-00001-of-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{shard}: is missing or damaged; remove .*block-00001.json to continue"):
        prepare(run)
    shard.write_bytes(content)
    marker.write_text("{}")
    with pytest.raises(InputError, match=rf"{marker}: cannot be used .*; remove it to continue without this block"):
        prepare(run)
    marker.unlink()
    assert prepare(run) == (5, 0)
    assert len(FakeEncoders.calls) == 2


def test_a_full_disk(clips, monkeypatch):
    """The blocks that were finished before stay, and the same command continues when there is space again."""
    run = prepare_run(clips)
    write = prepare_module.files.write_shard
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(path, records):
        if "-00001-" not in path.name:
            return write(path, records)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            return write(path, records)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module.files, "write_shard", full)
        with pytest.raises(Exception, match="File too large"):
            prepare(run)
    names = contents(clips.with_name("latents.partial")).keys()
    assert "block-00000.json" in names
    assert not [name for name in names if "00001" in name]
    assert prepare(run) == (5, 0)
    assert len(FakeEncoders.calls) == 2
