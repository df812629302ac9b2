"""From folders of clips to a table: what is measured on every clip, over a set of them, and between two sets."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tfm_jax import video
from tfm_jax.data.metadata import METADATA_FILE, read_metadata
from tfm_jax.errors import InputError
from tfm_jax.moving_shapes.evaluation import thresholds
from tfm_jax.moving_shapes.evaluation.metrics import count_changes, frechet, measure_motion, variation, wasserstein
from tfm_jax.moving_shapes.evaluation.physics import residual
from tfm_jax.moving_shapes.evaluation.tracking import Pixels, Track, track
from tfm_jax.moving_shapes.world import DIRECTIONS, TURNS, Body, Stage, read_caption
from tfm_jax.prompts import read_prompts


class Measures(NamedTuple):
    """One clip. A number is NaN if it needs every object in every frame, or a caption, and the clip has not."""

    residual: float
    """Infinite where an object is missing."""
    speed: float
    roughness: float
    variation: float
    whole: float
    """1 if there are exactly the expected objects, each in one piece, in every frame; else 0."""
    colours: float
    shapes: float
    directions: float
    """1 if they are those of the caption, else 0."""
    features: Float[np.ndarray, "n d"]
    changes: Int[np.ndarray, "256"]


# --- One clip --------------------------------------------------------------------------------------------------------


def measure(clip: Pixels, caption: str | None, fps: float | int) -> Measures:
    """Everything about one clip.

    Without a caption of the world, the objects that are seen are taken as the expected ones, and the law as bouncing.
    """
    stage = Stage(len(clip), clip.shape[1:3], fps)
    law, bodies = (read_caption(caption) if caption else None) or ("bouncing", ())
    found = track(clip)
    tracks = _match(found, bodies) if bodies else found
    expected = len(bodies) or max(1, len(found))
    centres = np.full((expected, len(clip), 2), np.nan)
    for number, t in enumerate(tracks):
        centres[number] = t.centres
    motion = measure_motion(centres)
    missing = not np.isfinite(centres).all()
    pairs = list(zip(tracks, bodies, strict=False))
    return Measures(
        np.inf if missing else residual(law, centres, stage),
        motion.speed,
        motion.roughness,
        float(np.mean([variation(t.mass) for t in tracks])) if tracks else np.nan,
        float(len(found) == expected and all((t.parts == 1).all() for t in found)),
        float({t.colour for t in found} == {b.colour for b in bodies}) if bodies else np.nan,
        float(not missing and all(t.shape == b.shape for t, b in pairs)) if bodies else np.nan,
        float(not missing and all(goes(t.centres, law, b.direction) for t, b in pairs)) if bodies else np.nan,
        np.zeros((0, motion.features.shape[1])) if missing else motion.features,
        count_changes(clip),
    )


def _match(found: Sequence[Track], bodies: Sequence[Body]) -> list[Track]:
    """A track for each body, as far as there are: the one of its colour, else the largest that is left."""
    by_colour = {t.colour: t for t in found}
    wanted = {b.colour for b in bodies}
    others = iter([t for t in found if t.colour not in wanted])
    matched = [by_colour.get(b.colour) or next(others, None) for b in bodies]
    return [t for t in matched if t is not None]


def goes(centres: Float[np.ndarray, "t 2"], law: str, direction: str) -> bool:
    """Whether an object starts in the direction of its caption; one without a direction must stand still.

    It counts over the whole clip in uniform motion, sideways under gravity and around an orbit, and over the first
    quarter, in which nothing is met, before a wall or another body.
    """
    steps = np.diff(centres, axis=0)
    if not direction:
        return bool(np.linalg.norm(steps, axis=-1).mean() < thresholds.MOVING)
    if direction in TURNS:
        before, after = steps[:-1], steps[1:]
        turn = (before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]).sum()
        return bool(np.linalg.norm(steps, axis=-1).mean() > thresholds.MOVING and turn * TURNS[direction] > 0)
    if law in ("bouncing", "collision"):
        steps = steps[: max(1, len(steps) // 4)]
    mean, wanted = steps.mean(0), np.array(DIRECTIONS[direction])
    if law == "gravity":
        mean = mean * [1, 0]
    length = np.linalg.norm(mean)
    cosine = mean @ wanted / max(length, 1e-9) / np.linalg.norm(wanted)
    return bool(length > thresholds.MOVING and cosine > np.cos(np.radians(thresholds.SECTOR)))


# --- Sets of clips ---------------------------------------------------------------------------------------------------

Clips = Sequence[Measures]


def _mean(values: Sequence[float]) -> float:
    """Over the clips in which it can be measured."""
    measured = [value for value in values if np.isfinite(value)]
    return float(np.mean(measured)) if measured else np.nan


def _gap_of_motion(a: Clips, b: Clips) -> float:
    return frechet(np.concatenate([clip.features for clip in a]), np.concatenate([clip.features for clip in b]))


def _gap_of_changes(a: Clips, b: Clips) -> float:
    return wasserstein(*(np.sum([clip.changes for clip in clips], 0) for clips in (a, b)))


OF_A_SET: dict[str, tuple[str, Callable[[Clips], float]]] = {
    "tracked": (
        "clips with every object in every frame",
        lambda clips: _mean([float(np.isfinite(c.speed)) for c in clips]),
    ),
    "residual": ("physics residual R, median, pixels", lambda clips: float(np.median([c.residual for c in clips]))),
    "faithful": (
        f"clips with R < {thresholds.FAITHFUL}",
        lambda clips: _mean([float(c.residual < thresholds.FAITHFUL) for c in clips]),
    ),
    "speed": ("speed S, pixels per frame", lambda clips: _mean([c.speed for c in clips])),
    "moving": (
        f"clips with S > {thresholds.MOVING}",
        lambda clips: _mean([float(c.speed > thresholds.MOVING) for c in clips]),
    ),
    "roughness": ("roughness J: acceleration over speed", lambda clips: _mean([c.roughness for c in clips])),
    "variation": ("change of an object's size over a clip", lambda clips: _mean([c.variation for c in clips])),
    "whole": ("clips with the right number of objects, whole", lambda clips: _mean([c.whole for c in clips])),
    "colours": ("clips with the right colours", lambda clips: _mean([c.colours for c in clips])),
    "shapes": ("clips with the right shapes", lambda clips: _mean([c.shapes for c in clips])),
    "directions": ("clips with the right directions", lambda clips: _mean([c.directions for c in clips])),
}
"""Metric -> what it is, and how it is had from the clips of one set."""

BETWEEN_SETS: dict[str, tuple[str, Callable[[Clips, Clips], float]]] = {
    "smoothness_gap": (
        "difference in roughness",
        lambda a, b: abs(_mean([clip.roughness for clip in a]) - _mean([clip.roughness for clip in b])),
    ),
    "frechet": ("Frechet motion distance, pixels^2", _gap_of_motion),
    "wasserstein": ("distance of frame differences (Wasserstein)", _gap_of_changes),
}
"""Metric -> what it is, and how it is had from the clips of two sets."""

NEED_CAPTIONS = {"colours", "shapes", "directions"}

NOT_MEASURED = "sensitivity of a loss to the order of the frames: it needs a network, and is not measured here"


class Row(NamedTuple):
    """A line of the table; NaN where there is no such number."""

    metric: str
    generated: float
    reference: float
    floor: float


def compare(generated: Clips, reference: Clips) -> tuple[list[Row], int]:
    """The table, and of how many clips each side of a comparison is.

    Distances depend on the number of clips, so that all are taken between sets of n clips: generated ones against one
    half of the reference and, as the floor, the other half against it. The mean over SPLITS random halves is given.
    For a metric of one set the floor is by how much the halves differ.
    """
    rng = np.random.default_rng(0)
    size = min(len(generated), len(reference) // 2)
    rows = {name: [] for name in (*OF_A_SET, *BETWEEN_SETS)}
    for _ in range(thresholds.SPLITS):
        order = rng.permutation(len(reference))
        one, other = ([reference[i] for i in part] for part in (order[:size], order[size : 2 * size]))
        some = [generated[i] for i in rng.permutation(len(generated))[:size]]
        for name, (_, metric) in OF_A_SET.items():
            rows[name].append((np.nan, abs(_difference(metric(one), metric(other)))))
        for name, (_, distance) in BETWEEN_SETS.items():
            rows[name].append((distance(some, other), distance(one, other)))
    means = {name: [_mean(column) for column in zip(*values, strict=True)] for name, values in rows.items()}
    table = [Row(name, of(generated), of(reference), means[name][1]) for name, (_, of) in OF_A_SET.items()]
    table += [Row(name, means[name][0], np.nan, means[name][1]) for name in BETWEEN_SETS]
    return table, size


def _difference(a: float, b: float) -> float:
    return a - b if np.isfinite(a) and np.isfinite(b) else np.nan


# --- Folders, and what is printed ------------------------------------------------------------------------------------


class Captioned(NamedTuple):
    """A video file and what it should show."""

    path: Path
    caption: str | None


def measure_folder(folder: Path, prompts: Path | None, stage: Stage, least: int) -> list[Measures]:
    """Measure the clips that `list_clips` finds.

    Args:
        stage: frames, size and rate at which the clips are read.

    Raises:
        InputError: the folder, a clip or the captions are missing, damaged or too few.
    """
    return measure_clips(list_clips(folder, prompts, least), stage)


def list_clips(folder: Path, prompts: Path | None, least: int) -> list[Captioned]:
    """The clips of a folder: those of its metadata.csv with their captions, else every mp4 by the number in its name.

    Args:
        prompts: captions of the clips, one per line, for a folder without metadata.csv.
        least: how many clips are needed.

    Raises:
        InputError: the folder or the captions are missing, or too few.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder of mp4 files")
    captions: list[str] | list[None]
    if prompts is None and (folder / METADATA_FILE).exists():
        rows = read_metadata(folder)
        files, captions = [row.path for row in rows], [row.prompt for row in rows]
    else:
        files = video.find_clips(folder)
        captions = read_prompts(prompts) if prompts else [None] * len(files)
    if len(files) < least:
        raise InputError(f"{folder}: {len(files)} mp4 files; expected at least {least}")
    if len(captions) != len(files):
        raise InputError(f"{prompts}: {len(captions)} captions; expected {len(files)}, one for each mp4 of {folder}")
    return [Captioned(file, caption) for file, caption in zip(files, captions, strict=True)]


def measure_clips(clips: Sequence[Captioned], stage: Stage) -> list[Measures]:
    """Read and measure clips, one at a time.

    Raises:
        InputError: a clip is damaged or too short.
    """
    return [
        measure(video.read_clip(clip.path, stage.frames, *stage.size, stage.fps), clip.caption, stage.fps)
        for clip in clips
    ]


class Counts(NamedTuple):
    """Clips behind a table."""

    generated: int
    """In each folder."""
    reference: int
    compared: int
    """On each side of a distance between two sets."""


Tables = Mapping[str, Sequence[Row]]
"""Name of a set of generated clips -> its table, all against the same reference."""


def show(tables: Tables, counts: Counts) -> str:
    """For the console: a column for each set, the reference, the floor."""
    titles = {name: title for name, (title, _) in (*OF_A_SET.items(), *BETWEEN_SETS.items())}
    columns = max(11, *(len(name) + 2 for name in tables))
    lines = ["".join([" " * 46, *(f"{name:>{columns}}" for name in (*tables, "reference", "floor"))])]
    for rows in zip(*tables.values(), strict=True):
        values = [*(row.generated for row in rows), rows[0].reference, rows[0].floor]
        cells = "".join(f"{'-' if np.isnan(value) else f'{value:.4g}':>{columns}}" for value in values)
        lines.append(f"{titles[rows[0].metric]:46}{cells}")
    lines += _reasons(tables)
    lines += [
        f"{counts.generated} generated clips, {counts.reference} of the reference; "
        f"floor: halves of the reference, {counts.compared} clips each",
        f"not in the table: {NOT_MEASURED}",
    ]
    return "\n".join(lines)


def _reasons(tables: Tables) -> list[str]:
    """Why the table has cells without a number, one line for each reason."""
    infinite, missing = False, set()
    for row in (row for table in tables.values() for row in table):
        of_sets = [row.generated, row.floor] + [row.reference] * (row.metric in OF_A_SET)
        infinite = infinite or bool(np.isinf(of_sets).any())
        if np.isnan(of_sets).any():
            missing.add(row.metric)
    reasons = [
        (infinite, "inf: an object is missing in half of the clips or more"),
        (True, "-: a distance compares two sets, so the reference alone has none"),
        (missing & NEED_CAPTIONS, "-: colours, shapes and directions need captions (--prompts, or a metadata.csv)"),
        (missing - NEED_CAPTIONS, "-: too few clips have every object in every frame"),
    ]
    return [reason for holds, reason in reasons if holds]


def to_json(tables: Tables, counts: Counts) -> str:
    """The same numbers, and the thresholds they depend on; null where there is no number, or it is infinite."""
    limits = {name.lower(): value for name, value in vars(thresholds).items() if name.isupper()}

    def number(value: float) -> float | None:
        return value if np.isfinite(value) else None

    metrics = {
        rows[0].metric: {
            **{name: number(row.generated) for name, row in zip(tables, rows, strict=True)},
            "reference": number(rows[0].reference),
            "floor": number(rows[0].floor),
        }
        for rows in zip(*tables.values(), strict=True)
    }
    result = {"clips": counts._asdict(), "metrics": metrics, "not_measured": NOT_MEASURED, "thresholds": limits}
    return json.dumps(result, indent=1) + "\n"
