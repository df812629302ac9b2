"""The evaluation: clips with known damage, and formulas against independent implementations."""

import json

import numpy as np
import pytest
from helpers import damage
from scipy import linalg, stats

from tfm_jax.moving_shapes.captions import write_caption
from tfm_jax.moving_shapes.evaluation import metrics
from tfm_jax.moving_shapes.evaluation.clip_metrics import measure_clip
from tfm_jax.moving_shapes.evaluation.intervals import DIFFERENCE, METRICS, measure_intervals
from tfm_jax.moving_shapes.evaluation.report import ClipCounts, format_intervals, format_table, to_json
from tfm_jax.moving_shapes.evaluation.set_metrics import compare
from tfm_jax.moving_shapes.scene import LAWS, Scene
from tfm_jax.moving_shapes.world import make_scene

CLIPS = 16


def scene(law: str, number: int = 0, **options) -> Scene:
    return make_scene(np.random.default_rng((11, number)), laws=[law], **options)


def damaged(change) -> list:
    """Metrics of bouncing clips after `change` has damaged them."""
    rng = np.random.default_rng(5)
    clips = [scene("bouncing", number, num_objects=[1]) for number in range(CLIPS)]
    return [measure_clip(change(clip.pixels, rng), clip.caption, 16) for clip in clips]


@pytest.fixture(scope="module")
def reference() -> list:
    clips = [scene("bouncing", number, num_objects=[1]) for number in range(100, 100 + 2 * CLIPS)]
    return [measure_clip(clip.pixels, clip.caption, 16) for clip in clips]


@pytest.fixture(scope="module")
def table(reference):
    """Damage -> metric -> value; "clean" and "floor" have the values of undamaged clips and the floor."""

    def values(change) -> dict[str, float]:
        return {row.metric: row.generated for row in compare(damaged(change), reference)[0]}

    found = {change.__name__: values(change) for change in damage.DAMAGES}
    rows = compare(damaged(lambda clip, rng: clip), reference)[0]
    return found | {"clean": {r.metric: r.generated for r in rows}, "floor": {r.metric: r.floor for r in rows}}


# --- Known damage ----------------------------------------------------------------------------------------------------


def test_clean_clips(table):
    clean, floor = table["clean"], table["floor"]
    assert clean["residual"] < 0.1
    for share in ("tracked", "faithful", "moving", "whole", "colours", "shapes", "directions"):
        assert clean[share] == 1
    for distance in ("frechet", "wasserstein", "smoothness_gap"):
        assert clean[distance] < 3 * floor[distance]


@pytest.mark.parametrize("name", ["shuffled", "jittered", "swapped"])
def test_wrong_motion_is_noticed(table, name):
    """The residual, the smoothness and the Frechet distance detect it; size and number of objects do not change."""
    values, clean, floor = table[name], table["clean"], table["floor"]
    assert values["residual"] > 0.5 > 5 * clean["residual"]
    assert values["faithful"] < 0.5
    assert values["frechet"] > 4 * max(clean["frechet"], floor["frechet"])
    assert values["smoothness_gap"] > 10 * max(clean["smoothness_gap"], floor["smoothness_gap"])
    assert values["whole"] == values["tracked"] == 1
    assert values["variation"] < 2 * clean["variation"]


def test_frozen_clips_obey_the_law_and_do_not_move(table):
    values = table["frozen"]
    assert values["residual"] < 1e-6
    assert values["faithful"] == 1
    assert values["speed"] == values["moving"] == values["directions"] == 0
    assert values["variation"] == 0
    assert values["whole"] == values["colours"] == values["shapes"] == 1
    assert values["wasserstein"] > 3 * table["floor"]["wasserstein"]


@pytest.mark.parametrize("name", ["noisy", "blurred"])
def test_noise_and_blur_do_not_count_as_motion(table, name):
    """Only the difference of neighbouring frames mistakes noise for motion."""
    values, clean = table[name], table["clean"]
    assert values["residual"] < 0.1
    for share in ("tracked", "faithful", "moving", "whole", "colours", "shapes", "directions"):
        assert values[share] == 1
    assert values["speed"] == pytest.approx(clean["speed"], rel=0.02)
    assert values["frechet"] == pytest.approx(clean["frechet"], rel=0.1)
    assert values["wasserstein"] > 1.5 * clean["wasserstein"]


def test_objects_that_do_not_persist_are_noticed(table):
    clean = table["clean"]
    assert table["ghosting"]["variation"] > 5 * clean["variation"]
    assert table["ghosting"]["whole"] == 1  # a ghost that touches its object counts as a part of it
    assert table["fading"]["variation"] > 20 * clean["variation"]
    assert table["vanishing"]["tracked"] == table["vanishing"]["whole"] == table["vanishing"]["faithful"] == 0
    assert table["vanishing"]["residual"] == np.inf
    assert table["vanishing"]["variation"] > 20 * clean["variation"]


def test_a_second_object_and_another_colour_are_noticed():
    one = scene("uniform", num_objects=[1])
    two = scene("uniform", 1, num_objects=[2])
    assert measure_clip(two.pixels, one.caption, 16).whole == 0
    assert measure_clip(one.pixels, two.caption, 16).whole == 0
    assert measure_clip(one.pixels, two.caption, 16).residual == np.inf
    partly = measure_clip(one.pixels, two.caption, 16)  # one of its two objects is there
    assert np.isnan([partly.speed, partly.roughness]).all()
    assert {row.metric: row.generated for row in compare([partly] * 2, [partly] * 4)[0]}["tracked"] == 0
    obj = one.objects[0]
    for change, wrong in (
        ({"colour": "green" if obj.colour == "red" else "red"}, "colours"),
        ({"shape": "disc" if obj.shape == "square" else "square"}, "shapes"),
        ({"direction": "left" if obj.direction == "right" else "right"}, "directions"),
    ):
        caption = write_caption("uniform", [obj._replace(**change)], "black")
        found = measure_clip(one.pixels, caption, 16)
        assert {name: getattr(found, name) for name in ("colours", "shapes", "directions")} == {
            name: float(name != wrong) for name in ("colours", "shapes", "directions")
        }
        assert found.whole == 1
        assert found.residual < 0.1


@pytest.mark.parametrize("law", LAWS)
def test_directions_of_every_law(law):
    """The direction is right in the clip and wrong in the reversed clip, unless nothing moves or objects turn back."""
    for number in range(6):
        clip = scene(law, number)
        assert measure_clip(clip.pixels, clip.caption, 16).directions == 1
        if law not in ("bouncing", "collision"):
            assert measure_clip(clip.pixels[::-1], clip.caption, 16).directions == (law in ("still", "returning"))


def test_noise_has_no_objects():
    """Noise, as from a model with random weights, gives shares of 0, and NaN where a metric does not exist."""
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3)).astype(np.uint8)
    found = measure_clip(noise, "a red disc moves right, fast", 16)
    assert (found.whole, found.directions, found.residual) == (0, 0, np.inf)
    black = measure_clip(np.zeros_like(noise), None, 16)
    assert (black.whole, black.residual) == (0, np.inf)
    assert np.isnan([black.speed, black.roughness, black.variation, black.colours, black.directions]).all()
    assert len(black.features) == 0


# --- Formulas --------------------------------------------------------------------------------------------------------


def test_motion_by_hand():
    path = np.array([[[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]]])
    motion = metrics.measure_motion(path)
    assert motion.speed == 2.5
    assert motion.roughness == pytest.approx(5 / 2.55)
    assert motion.features.tolist() == [[3, 4, 0, 0, -3, -4]]


def test_frechet_against_a_matrix_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)), rng.normal(1, 2, size=(30, 5)) @ rng.normal(size=(5, 5))
    s, t = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(s @ t).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, a + 3) == pytest.approx(45)
    assert np.isnan(metrics.frechet(a[:1], b))


def test_wasserstein_against_sorted_samples():
    rng = np.random.default_rng(0)
    clips = [rng.integers(0, top, (3, 8, 8, 3)).astype(np.uint8) for top in (256, 90)]
    counts = [metrics.count_changes(clip) for clip in clips]
    changes = [abs(np.diff(clip.astype(int), axis=0)).ravel() / 255 for clip in clips]
    assert metrics.wasserstein(*counts) == pytest.approx(stats.wasserstein_distance(*changes))


# --- Intervals -------------------------------------------------------------------------------------------------------


def clips_with(reference: list, **values) -> list:
    """Clips with the given metrics, and with the others of real clips."""
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return [reference[0]._replace(**row) for row in rows]


def resampled(values: np.ndarray) -> np.ndarray:
    """An independent bootstrap: 20,000 resamples of the rows, from other random numbers."""
    return values[np.random.default_rng(99).integers(len(values), size=(20_000, len(values)))]


@pytest.fixture(scope="module")
def two_sets(reference) -> dict[str, list]:
    rng = np.random.default_rng(4)
    base = rng.uniform(2, 8, 24)
    lora = base - rng.uniform(0, 2, 24)
    right = rng.integers(0, 2, (2, 24)).astype(float)
    return {
        "base": clips_with(reference, residual=base, shapes=right[0]),
        "lora": clips_with(reference, residual=lora, shapes=right[1]),
    }


@pytest.mark.parametrize(("metric", "average"), [("residual", np.median), ("shapes", np.mean)])
def test_intervals_against_a_simple_bootstrap(two_sets, metric, average):
    found = measure_intervals(two_sets, paired=True)[metric]
    values = np.array([[getattr(clip, metric) for clip in clips] for clips in two_sets.values()]).T
    averages = average(resampled(values), axis=1)
    averages = np.c_[averages, averages[:, 1] - averages[:, 0]]
    expected = np.quantile(averages, (0.025, 0.975), axis=0).T
    assert list(found) == ["base", "lora", DIFFERENCE]
    assert np.array(list(found.values())) == pytest.approx(expected, abs=0.06)


def test_pairing_narrows_the_interval_of_the_difference(two_sets):
    paired = measure_intervals(two_sets, paired=True)["residual"][DIFFERENCE]
    others = {"base": two_sets["base"], "lora": two_sets["lora"][1:] + two_sets["lora"][:1]}
    shifted = measure_intervals(others, paired=True)["residual"][DIFFERENCE]
    assert paired.high < 0
    assert paired.high - paired.low < 0.8 * (shifted.high - shifted.low)
    assert DIFFERENCE not in measure_intervals(two_sets, paired=False)["residual"]


def test_intervals_with_lost_objects(reference):
    """A median is infinite if half of the clips lose their object; an undefined difference is unbounded."""
    most, few = np.full(16, np.inf), np.arange(16.0)
    most[:2], few[0] = (1.0, 2.0), np.inf
    sets = {"base": clips_with(reference, residual=most), "lora": clips_with(reference, residual=few)}
    intervals = measure_intervals(sets, paired=True)
    found = intervals["residual"]
    assert found["base"] == (np.inf, np.inf)
    assert 3 < found["lora"].low < found["lora"].high < 15
    assert found[DIFFERENCE] == (-np.inf, -np.inf)
    both = measure_intervals({"a": sets["base"], "b": sets["base"]}, paired=True)["residual"]
    assert both[DIFFERENCE] == (-np.inf, np.inf)
    tables = {name: compare(clips, reference)[0] for name, clips in sets.items()}
    numbers = json.loads(to_json(tables, ClipCounts(16, 32, 16), intervals))["intervals"]
    assert list(numbers) == list(METRICS)
    assert numbers["residual"]["base"] == numbers["residual"][DIFFERENCE] == [None, None]
    assert numbers["residual"]["lora"] == list(found["lora"])
    assert "inf [inf, inf]" in format_intervals(tables, intervals)


def test_cells_without_a_number_are_explained(reference):
    captions = "-: colours, shapes and directions need captions"
    lost = "-: too few clips have every object in every frame"
    infinite = "inf: at least half of the clips lose an object"

    def reasons(generated: list, real: list) -> list[str]:
        table, compared = compare(generated, real)
        printed = format_table({"samples": table}, ClipCounts(len(generated), len(real), compared)).splitlines()
        assert all(len(line) <= 120 for line in printed)
        return [reason for reason in (infinite, captions, lost) if any(line.startswith(reason) for line in printed)]

    clip = scene("uniform", num_objects=[1])
    bare, empty = measure_clip(clip.pixels, None, 16), measure_clip(np.zeros_like(clip.pixels), clip.caption, 16)
    assert reasons(reference[:4], reference[4:12]) == []
    assert reasons([bare] * 4, reference[:8]) == [captions]
    assert reasons([empty] * 4, reference[:8]) == [infinite, lost]
    assert reasons(reference[:4], [empty] * 8) == [infinite, lost]
