"""The demo's report and animation: the sentence and the table that state the finding, and the pictures."""

import numpy as np
import pytest
from PIL import Image

from tfm_jax.moving_shapes.captions import write_caption
from tfm_jax.moving_shapes.demo import animation, findings
from tfm_jax.moving_shapes.demo.animation import draw_frames, write_animation
from tfm_jax.moving_shapes.demo.examples import Example, measure, read_examples
from tfm_jax.moving_shapes.demo.overlay import overlay
from tfm_jax.moving_shapes.demo.report import draw_report, running_mean
from tfm_jax.moving_shapes.scene import ClipSpec, SceneObject
from tfm_jax.moving_shapes.world import make_scene, write_clips
from tfm_jax.video import read_clip

LAWS = {"base": "uniform", "LoRA": "gravity", "real": "gravity"}
SPEC = ClipSpec()


def evaluation(base=5.3, lora=1.2, difference=(-5.0, -3.2)) -> dict:
    """The part of evaluation.json that the report reads."""
    share = {"base": 0.25, "lora": 0.5, "reference": 1.0}
    ends = {"base": [0.1, 0.4], "lora": [0.35, 0.65], "difference": [-0.05, 0.5]}
    metrics = dict.fromkeys(findings.ROWS, share)
    intervals = dict.fromkeys(findings.ROWS, ends)
    metrics["residual"] = {"base": base, "lora": lora, "reference": 0.05}
    intervals["residual"] = {"base": [4.0, None], "lora": [1.0, 1.5], "difference": list(difference)}
    return {"clips": {"generated": 32}, "metrics": metrics, "intervals": intervals}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Two examples whose clips obey the laws of LAWS."""
    folder = tmp_path_factory.mktemp("demo")
    for seed, (source, law) in enumerate(LAWS.items()):
        write_clips(folder / source, 3, seed=seed, laws=[law], num_objects=[1])
    captions = [f"a red disc falls and bounces off the floor, drifting {side}, fast" for side in ("left", "right")]
    return read_examples({source: folder / source for source in LAWS}, captions, SPEC)


# --- The finding -----------------------------------------------------------------------------------------------------


def test_the_finding_follows_the_interval_of_the_difference():
    assert findings.finding(evaluation(), "gravity") == (
        "The LoRA brings motion closer to gravity: from 5.3 to 1.2 pixels off"
    )
    assert "further from gravity: from 1 to 2.5 " in findings.finding(evaluation(1.0, 2.5, (0.9, 2.0)), "gravity")
    assert findings.finding(evaluation(1.3, 1.2, (-0.4, 0.2)), "gravity").startswith("No clear effect: 1.3 pixels off")
    assert findings.finding(evaluation(1.3, 1.2, (None, 0.2)), "gravity").startswith("No clear effect")
    assert "closer" in findings.finding(evaluation(1.3, 0.2, (None, -0.2)), "gravity")


def test_the_finding_with_lost_shapes():
    nothing = (None, None)
    assert "1.2 pixels off gravity; the base model loses" in findings.finding(evaluation(None, 1.2, nothing), "gravity")
    assert "most shapes are lost" in findings.finding(evaluation(1.2, None, nothing), "gravity")
    assert "Both models lose" in findings.finding(evaluation(None, None, nothing), "gravity")


def test_the_table():
    rows = findings.table(evaluation())
    texts = {title: [cell.text for cell in cells] for title, cells in rows.items()}
    assert texts["distance from the law, pixels"] == ["5.3 [4, inf]", "1.2 [1, 1.5]", "-4.1 [-5, -3.2]", "0.05"]
    assert texts["right shape"] == ["25% [10, 40]", "50% [35, 65]", "+25 [-5, +50]", "100%"]
    significant = [title for title, cells in rows.items() if any(cell.significant for cell in cells)]
    assert significant == ["distance from the law, pixels"]
    lost = findings.table(evaluation(None, 1.2, (None, None)))["distance from the law, pixels"]
    assert [cell.text for cell in lost][0:3:2] == ["inf [4, inf]", "inf [inf, inf]"]


def test_the_details_name_the_number_of_prompts():
    text = findings.details(evaluation(), "gravity")
    assert "32 prompts" in text
    assert "LoRA - base: -4.1 [-5, -3.2], with a 95% interval" in text


def test_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2).tolist() == [1, 2, 4, 6]


# --- The pictures ----------------------------------------------------------------------------------------------------


def test_paths_are_those_of_the_objects():
    scene = make_scene(np.random.default_rng(3), laws=["gravity"])
    shown = measure(scene.pixels, scene.caption, 16)
    assert np.abs(shown.paths - scene.positions).max() < 1
    assert shown.residual < 0.5
    empty = measure(np.zeros_like(scene.pixels), scene.caption, 16)
    assert empty.paths.shape == (0, 17, 2)
    assert empty.residual == np.inf


def test_an_overlay_shows_the_object_of_every_chosen_frame():
    scene = make_scene(np.random.default_rng(1), laws=["gravity"])
    picture = overlay(scene.pixels, 5).astype(int)
    ground = scene.pixels[:, 0, 0].astype(int).mean(0)
    contrasts = []
    for moment in (0, 4, 8, 12, 16):
        x, y = scene.positions[0, moment].astype(int)
        contrasts.append(abs(picture[y, x] - ground).max())
    assert min(contrasts) > 40
    assert contrasts[0] < contrasts[-1]
    x, y = scene.positions[0, 16].astype(int)
    assert abs(picture[y, x] - scene.pixels[16, y, x].astype(int)).max() <= 1  # the last frame is opaque


def test_the_report(examples, tmp_path):
    steps = [{"step": step, "loss": 1 / step} for step in range(1, 30)] + [{"step": 30, "skipped": True}]
    draw_report(tmp_path / "report.png", "gravity", examples, evaluation(), steps)
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1000
        assert np.asarray(picture.convert("RGB")).std() > 20


def test_a_report_without_any_shape(tmp_path):
    """A model that generates nothing must not stop the report."""
    black = np.zeros((17, 64, 64, 3), np.uint8)
    caption = write_caption("gravity", [SceneObject("red", "disc", "left", "fast")], "black")
    example = Example(caption, {source: measure(black, caption, 16) for source in LAWS})
    draw_report(tmp_path / "report.png", "gravity", [example], evaluation(None, None, (None, None)), [])
    write_animation(tmp_path / "report", [example], 16)


def test_the_animation(examples, tmp_path):
    write_animation(tmp_path / "report", examples, SPEC.fps)
    frames = draw_frames(examples)
    assert (tmp_path / "report.gif").stat().st_size < 900_000
    with Image.open(tmp_path / "report.gif") as gif:
        assert gif.info["loop"] == 0
        assert gif.n_frames == len(frames) == 17
        assert gif.size == frames[0].size
        durations = []
        for number, frame in enumerate(frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
            difference = np.asarray(gif.convert("RGB")).astype(int) - np.asarray(frame)
            assert abs(difference).mean() < 2.5
    assert set(durations[:-1]) == {120}  # 125 ms; GIF counts in hundredths of a second
    assert durations[-1] >= 500 + durations[0]
    width, height = frames[0].size
    film = read_clip(tmp_path / "report.mp4", 21, height, width, 16 * animation.SPEED)
    assert abs(film[0].astype(int) - np.asarray(frames[0])).mean() < 4
    assert abs(film[20].astype(int) - np.asarray(frames[-1])).mean() < 4
