"""The world of moving shapes: laws, positions, pixels and captions agree."""

import csv
import functools
import json

import numpy as np
import pytest

from tfm_jax.errors import InputError
from tfm_jax.moving_shapes import laws
from tfm_jax.moving_shapes.captions import read_caption, write_caption
from tfm_jax.moving_shapes.evaluation.tracking import track
from tfm_jax.moving_shapes.scene import (
    BACKGROUNDS,
    CLEARANCE,
    COLOURS,
    DIRECTIONS,
    HELD_OUT_SPEEDS,
    LAWS,
    ROTATIONS,
    SHAPES,
    SPEEDS,
    ClipSpec,
    Scene,
    SceneObject,
)  # fmt: skip
from tfm_jax.moving_shapes.world import make_scene, write_clips
from tfm_jax.video import read_clip

SPEC = ClipSpec(17, (64, 64), 16)
SCENES = 12


@functools.cache
def scenes(law: str, **options) -> list[Scene]:
    return [make_scene(np.random.default_rng((3, number)), laws=[law], **options) for number in range(SCENES)]


def velocities(path: np.ndarray) -> np.ndarray:
    return np.diff(path, axis=0)


# --- State, pixels and captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_the_state_is_what_the_pixels_show(law):
    """Tracking finds the positions again; it ignores pixels that are covered by less than a quarter."""
    for scene in scenes(law):
        tracks = {track.colour: track for track in track(scene.pixels)}
        assert tracks.keys() == {obj.colour for obj in scene.objects}
        for obj, positions in zip(scene.objects, scene.positions, strict=True):
            found = tracks[obj.colour]
            np.testing.assert_allclose(found.centres, positions, atol=0.2)
            assert found.shape == obj.shape
            assert (found.parts == 1).all()


@pytest.mark.parametrize("size", [(32, 48), (96, 64)])
def test_other_sizes(size):
    for law in LAWS:
        scene = make_scene(np.random.default_rng(1), 9, size, 16, [law])
        assert scene.pixels.shape == (9, *size, 3)
        radius = ClipSpec(9, size, 16).radius
        assert (scene.positions >= radius - 1e-9).all()
        assert (scene.positions <= np.array([size[1], size[0]]) - radius + 1e-9).all()


@pytest.mark.parametrize("law", LAWS)
def test_captions_tell_the_truth(law):
    for scene in scenes(law):
        assert read_caption(scene.caption) == (law, scene.objects)
        assert LAWS[law] in scene.caption
        assert scene.caption.endswith(f", on a {scene.background} ground")
        for obj, speed, path in zip(scene.objects, scene.speeds, scene.positions, strict=True):
            x, y = path[0].astype(int)
            assert scene.pixels[0, y, x].tolist() == list(COLOURS[obj.colour])
            if law == "still":
                assert (obj.direction, obj.pace, speed) == ("", "", 0)
                assert (path == path[0]).all()
                continue
            low, high = SPEEDS[obj.pace]
            assert low <= speed <= high
            pixels_a_frame = speed * 64 / 16
            first = velocities(path)[0]
            if law == "orbit":
                arms = path - centre_of_circle(path)
                turn = arms[0, 0] * arms[1, 1] - arms[0, 1] * arms[1, 0]
                assert turn * ROTATIONS[obj.direction] > 0
                chord = 2 * np.linalg.norm(arms[0]) * np.sin(pixels_a_frame / np.linalg.norm(arms[0]) / 2)
                assert np.allclose(np.linalg.norm(first), chord)
            elif law == "gravity":
                assert np.allclose(velocities(path)[:, 0], DIRECTIONS[obj.direction][0] * pixels_a_frame)
            else:
                wanted = np.array(DIRECTIONS[obj.direction])
                lost = SPEC.deceleration / 2 if law == "returning" else 0  # within the first frame
                assert np.allclose(first, wanted / np.linalg.norm(wanted) * (pixels_a_frame - lost))


def test_captions_read_like_this():
    red, blue = SceneObject("red", "disc", "up and left", "fast"), SceneObject("blue", "square", "right", "slowly")
    assert write_caption("uniform", [red], "navy") == "a red disc moves up and left, fast, on a navy ground"
    pair = "a red disc moves up and left, fast, and a blue square moves right, slowly, on a grey ground"
    assert write_caption("uniform", [red, blue], "grey") == pair
    crash = "a red disc moves up and left, fast, and collides with a blue square that moves right, slowly"
    assert write_caption("collision", [red, blue], "black") == crash + ", on a black ground"
    assert read_caption(crash) == ("collision", (red, blue))
    assert read_caption("a red kite dives over the dunes") is None
    assert read_caption("") is None


def test_everything_is_drawn():
    """All laws, shapes, colours, backgrounds, directions and numbers of objects occur, and colours differ in a clip."""
    drawn = [make_scene(np.random.default_rng((0, number)), 5) for number in range(150)]
    assert {scene.law for scene in drawn} == set(LAWS)
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {obj.shape for scene in drawn for obj in scene.objects} == set(SHAPES)
    assert {obj.colour for scene in drawn for obj in scene.objects} == set(COLOURS)
    assert {obj.direction for scene in drawn for obj in scene.objects} == {"", *DIRECTIONS, *ROTATIONS}
    assert {len(scene.objects) for scene in drawn if scene.law == "uniform"} == {1, 2}
    assert all(len({obj.colour for obj in scene.objects}) == len(scene.objects) for scene in drawn)


def test_objects_keep_clear_of_each_other():
    for law in ("still", "uniform", "bouncing", "orbit"):
        for scene in scenes(law, num_objects=(2,)):
            first, second = scene.positions
            assert np.linalg.norm(first - second, axis=-1).min() > CLEARANCE * SPEC.radius


def test_held_out_speeds_are_never_drawn_otherwise():
    for law in ("uniform", "bouncing", "gravity", "orbit", "collision", "returning"):
        for held_out in (False, True):
            for scene in scenes(law, held_out=held_out):
                for obj, speed in zip(scene.objects, scene.speeds, strict=True):
                    assert (0.34 < speed < 0.46) == held_out
                    low, high = (HELD_OUT_SPEEDS if held_out else SPEEDS)[obj.pace]
                    assert low <= speed <= high


def test_a_clip_that_is_too_long():
    with pytest.raises(
        InputError, match=r"81 frames of 64 x 64 pixels at 16 fps: .* expected a shorter clip"
    ) as caught:
        make_scene(np.random.default_rng(0), 81, laws=["uniform"], num_objects=[1])
    assert "\n" not in str(caught.value)


# --- Files -----------------------------------------------------------------------------------------------------------


def test_files_are_a_function_of_seed_and_index(tmp_path):
    for name, count, seed in (("a", 3, 0), ("b", 5, 0), ("c", 3, 1)):
        write_clips(tmp_path / name, count, frames=5, size=(32, 48), seed=seed)
    a, b, c = ([(tmp_path / n / f"000{i}.mp4").read_bytes() for i in range(3)] for n in "abc")
    assert a == b
    assert a != c
    tables = [list(csv.DictReader((tmp_path / n / "metadata.csv").open(encoding="utf-8"))) for n in "ab"]
    assert tables[0] == tables[1][:3]
    states = [json.loads((tmp_path / n / "states.json").read_text(encoding="utf-8")) for n in "ab"]
    assert states[0] == {name: states[1][name] for name in ("0000.mp4", "0001.mp4", "0002.mp4")}


def test_files_hold_the_scene(tmp_path):
    write_clips(tmp_path, 2, seed=7, laws=["orbit"])
    scene = make_scene(np.random.default_rng((7, 1)), laws=["orbit"])
    assert abs(read_clip(tmp_path / "0001.mp4", 17, 64, 64, 16) - scene.pixels.astype(float)).mean() < 2
    row = list(csv.DictReader((tmp_path / "metadata.csv").open(encoding="utf-8")))[1]
    assert row == {"video": "0001.mp4", "prompt": scene.caption}
    state = json.loads((tmp_path / "states.json").read_text(encoding="utf-8"))["0001.mp4"]
    assert (state["law"], state["background"]) == ("orbit", scene.background)
    for written, obj, positions in zip(state["objects"], scene.objects, scene.positions, strict=True):
        assert np.allclose(written["positions"], positions, atol=5e-4)
        assert [written[field] for field in SceneObject._fields] == list(obj)


# --- Laws ------------------------------------------------------------------------------------------------------------


def centre_of_circle(path: np.ndarray) -> np.ndarray:
    """Solve |p|^2 = 2 p . c + const, which is linear in the centre c."""
    return np.linalg.lstsq(np.c_[2 * path, np.ones(len(path))], (path**2).sum(1))[0][:2]


def test_uniform_motion_is_uniform():
    for scene in scenes("uniform"):
        assert np.allclose(np.diff(scene.positions, n=2, axis=1), 0)


def test_bouncing_turns_at_walls_only():
    for scene in scenes("bouncing"):
        for path in scene.positions:
            steps = velocities(path)
            turned = np.flatnonzero((~np.isclose(abs(np.diff(steps, axis=0)), 0)).any(1))
            assert 3 <= turned[0] <= 11
            inside = path - SPEC.radius
            assert (inside >= -1e-9).all()
            assert (inside <= SPEC.extent + 1e-9).all()
            full = abs(steps[0])  # the frame with the contact shows a shorter step
            assert (abs(steps) <= full + 1e-9).all()


def test_folding():
    positions = np.linspace(-7, 9, 401)
    folded = laws.reflect(positions, 3.0)
    assert (folded >= 0).all()
    assert (folded <= 3).all()
    assert np.allclose(np.interp([-1.0, 0.5, 4.0, 7.0], positions, folded), [1, 0.5, 2, 1], atol=1e-9)


def test_falling_keeps_energy_and_meets_the_floor():
    times, gravity = np.linspace(0, 40, 4001), 0.75
    height = laws.bounce_height(20.0, 3.0, times, gravity)
    speed = np.gradient(height, times)
    smooth = height > 0.5  # the speed has a jump at the floor
    assert np.allclose((height + speed**2 / 2 / gravity)[smooth][1:-1], 20, atol=0.01)
    assert 0 <= height.min() < 0.01
    assert np.isclose(np.interp(3.0, times, height), 20)
    for scene in scenes("gravity"):
        y = scene.positions[0, :, 1]
        falls = np.diff(y, n=2)
        assert np.isclose(falls[0], SPEC.gravity)
        bounce = ~np.isclose(falls, SPEC.gravity)
        assert 1 <= bounce.sum() <= 2
        assert falls[bounce].sum() < -5
        assert y.max() <= 64 - SPEC.radius + 1e-9


def test_returning_is_a_constant_deceleration():
    for scene in scenes("returning"):
        for path in scene.positions:
            bends = np.diff(path, n=2, axis=0)
            assert np.allclose(bends, bends[0])
            assert np.isclose(np.linalg.norm(bends[0]), 1.2 * 64 / 16**2)
            inside = path - SPEC.radius
            assert (inside >= -1e-9).all()
            assert (inside <= SPEC.extent + 1e-9).all()
            first, last = velocities(path)[[0, -1]]
            assert first @ last < 0 or scene.speeds[0] > 0.55  # a fast object may not have turned by more


def test_orbits_have_a_radius():
    for scene in scenes("orbit"):
        for path in scene.positions:
            radius = np.linalg.norm(path - centre_of_circle(path), axis=-1)
            assert np.allclose(radius, radius[0])
            assert 0.2 * 64 - 1e-6 < radius[0] < 0.34 * 64 + 1e-6
            steps = np.linalg.norm(velocities(path), axis=-1)
            assert np.allclose(steps, steps[0])


def test_collisions_keep_momentum_and_energy():
    for scene in scenes("collision"):
        steps = np.diff(scene.positions, axis=1)
        before, after = steps[:, 0], steps[:, -1]
        assert np.allclose(before.sum(0), after.sum(0))
        assert np.isclose((before**2).sum(), (after**2).sum())
        assert np.linalg.norm(after - before, axis=-1).min() > 0.3 * 4 - 1e-9
        assert np.allclose(steps.sum(0), before.sum(0))  # including the frame with the contact
        apart = np.linalg.norm(scene.positions[0] - scene.positions[1], axis=-1)
        assert apart.min() >= 2 * SPEC.radius - 1e-9
        assert 3 <= apart.argmin() <= 13


def test_a_collision_by_hand():
    """Equal masses exchange their velocities in a head-on collision; a miss changes nothing."""
    starts, speeds = np.array([[0.0, 0.0], [10.0, 0.0]]), np.array([[1.0, 0.5], [-1.0, 0.5]])
    paths = laws.collide(starts, speeds, np.array([0.0, 4.0, 6.0]), 2.0)
    assert np.allclose(paths[0], [[0, 0], [4, 2], [2, 3]])
    assert np.allclose(paths[1], [[10, 0], [6, 2], [8, 3]])
    missing = laws.collide(np.add(starts, [[0, 0], [0, 3]]), speeds, np.array([0.0, 8.0]), 2.0)
    assert np.allclose(missing[:, 1], [[8, 4], [2, 7]])
