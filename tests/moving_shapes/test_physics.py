"""Tracking and the physics residual, on clips and on exact paths."""

import numpy as np
import pytest

from tfm_jax.moving_shapes.evaluation.physics import residual
from tfm_jax.moving_shapes.evaluation.tracking import track
from tfm_jax.moving_shapes.scene import LAWS, ClipSpec, Scene
from tfm_jax.moving_shapes.world import make_scene
from tfm_jax.video import read_clip, write_clip

SPEC = ClipSpec(17, (64, 64), 16)


def scene(law: str, number: int = 0, **options) -> Scene:
    return make_scene(np.random.default_rng((11, number)), laws=[law], **options)


@pytest.mark.parametrize("law", LAWS)
def test_tracks_survive_the_video_codec(law, tmp_path):
    for number in range(6):
        clip = scene(law, number)
        write_clip(tmp_path / "clip.mp4", clip.pixels, 16)
        tracks = {t.colour: t for t in track(read_clip(tmp_path / "clip.mp4", 17, 64, 64, 16))}
        assert tracks.keys() == {obj.colour for obj in clip.objects}
        centres = np.stack([tracks[obj.colour].centres for obj in clip.objects])
        np.testing.assert_allclose(centres, clip.positions, atol=0.3)
        assert all((t.parts == 1).all() for t in tracks.values())
        assert [tracks[obj.colour].shape for obj in clip.objects] == [obj.shape for obj in clip.objects]
        assert residual(law, centres, SPEC) < 0.2


@pytest.mark.parametrize("law", LAWS)
def test_the_residual_is_the_distance_from_the_law(law):
    """It is 0 on exact paths, at most the size of independent errors, and large on paths that break the law."""
    rng = np.random.default_rng(0)
    for number in range(5):
        positions = scene(law, number).positions
        assert residual(law, positions, SPEC) < 2e-3
        error = rng.normal(0, 0.5, positions.shape)
        size = np.sqrt((error**2).sum(-1).mean())
        assert 0.6 * size < residual(law, positions + error, SPEC) <= size + 1e-9
        order = rng.permutation(17)
        assert residual(law, positions[:, order], SPEC) > 1 or law == "still"


def test_laws_are_distinguished():
    for law, other in (("uniform", "still"), ("bouncing", "uniform"), ("gravity", "bouncing"), ("orbit", "uniform"),
        ("returning", "uniform"), ("uniform", "returning")):  # fmt: skip
        values = [residual(other, scene(law, number, num_objects=[1]).positions, SPEC) for number in range(8)]
        assert np.median(values) > 0.5, (law, other)
    crash = scene("collision")
    assert residual("uniform", crash.positions, SPEC) > 0.5
    assert residual("collision", crash.positions[:1], SPEC) == np.inf


def test_inelastic_collisions_are_noticed():
    """After the contact both objects move together, which conserves momentum but not energy."""
    for number in range(4):
        positions = scene("collision", number).positions
        contact = int(np.linalg.norm(positions[0] - positions[1], axis=-1).argmin())
        steps = np.diff(positions, axis=1)
        steps[:, contact:] = steps[:, contact:].mean(0)
        stuck = np.concatenate([positions[:, :1], positions[:, :1] + np.cumsum(steps, 1)], 1)
        assert residual("collision", stuck, SPEC) > 0.3
