"""Preparation as a whole: two processes that are killed make the same files as one that is not."""

import json
from pathlib import Path

import pytest
from helpers.configured import configured
from helpers.launching import PATIENCE, Launcher, wait_for
from helpers.many_clips import BAD, PREPARING, preparing, write_many

from tfm_jax.data import blocks
from tfm_jax.data.format import read_index
from tfm_jax.data.prepare import PrepareRun, prepare


@pytest.fixture
def launch():
    launcher = Launcher()
    yield launcher
    launcher.kill()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_kills(folder: Path, launch: Launcher, good: int, bad: int) -> None:
    """Kill two processes of four devices each three times, and compare with what one process of one device makes."""
    many = write_many(folder / "clips", good, bad)
    limit = "--data.max_rejected=0.5"
    run = configured(PrepareRun, preparing(folder / "clips", folder / "alone", limit))
    assert prepare(run) == (good, bad)
    partial = folder / "two.partial"
    command = ["-c", PREPARING, *preparing(folder / "clips", folder / "two", limit)]
    number = -(-(good + bad) // blocks.MAX_ROWS)
    for kill in range(3):
        two = launch(2, command)
        wait_for(lambda wanted=1 + kill * number // 4: len(list(partial.glob("block-*"))) >= wanted, two)
        for process in two:
            process.kill()
        for process in two:
            process.communicate()
        assert not (folder / "two").exists()
    two = launch(2, command)
    ended = [process.communicate(timeout=PATIENCE) for process in two]
    assert [process.returncode for process in two] == [0, 0], ended
    summary = f"{folder}/two: {good} clips; {bad} videos rejected: see {folder}/two/rejected.jsonl\n"
    assert [out for out, _ in ended] == [summary, ""]
    assert f"of {number} blocks are finished" in ended[0][1]
    assert "preparing" in ended[0][1]
    assert "preparing" not in ended[1][1]

    assert sorted(entry.video for entry in read_index(folder / "two")) == sorted(many.good)
    lines = [json.loads(line) for line in (folder / "two" / "rejected.jsonl").read_text().splitlines()]
    assert {line["video"] for line in lines} == many.bad.keys()
    assert len(lines) == bad
    for line in lines:
        assert many.bad[line["video"]] in line["reason"], line
    assert [line["line"] for line in lines] == sorted(line["line"] for line in lines)
    assert contents(folder / "two") == contents(folder / "alone")
    assert not partial.exists()


def test_forty_clips(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_ROWS", 4)
    check_kills(tmp_path, launch, 40, len(BAD))


@pytest.mark.slow
def test_a_thousand_clips(tmp_path, launch, monkeypatch):
    monkeypatch.setattr(blocks, "MAX_ROWS", 4)
    check_kills(tmp_path, launch, 1000, 40)
