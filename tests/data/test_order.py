"""The order of clips of several sizes, and which clips are held out."""

import collections
import itertools

import pytest

from tfm_jax.data.order import Order, is_held_out

SIZES = [(5, 4, 6), (3, 4, 4), (5, 4, 6), (5, 4, 6), (1, 2, 2), (3, 4, 4), (5, 4, 6)]
CLIPS = {(5, 4, 6): [0, 2, 3, 6], (3, 4, 4): [1, 5], (1, 2, 2): [4]}


def batches(steps, batch_size, seed=0, sizes=SIZES):
    order = Order(sizes, batch_size, seed)
    return [order.clips(step) for step in steps]


def size_of(batch):
    (size,) = {SIZES[clip] for clip in batch}
    return size


@pytest.mark.parametrize("batch_size", [1, 2])
def test_sizes_are_mixed_in_proportion(batch_size):
    """Each batch has one size, and in seven steps each size has as many batches as clips, not always in one order."""
    found = [size_of(batch) for batch in batches(range(28), batch_size)]
    cycles = [tuple(found[start : start + 7]) for start in range(0, 28, 7)]
    assert all(collections.Counter(cycle) == collections.Counter(SIZES) for cycle in cycles)
    assert len(set(cycles)) > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_epoch_of_a_size_has_every_clip_once(batch_size):
    """Also where an epoch ends within a batch."""
    rows = collections.defaultdict(list)
    for batch in batches(range(21), batch_size):
        rows[size_of(batch)] += batch
    for size, clips in CLIPS.items():
        epochs = [tuple(rows[size][start : start + len(clips)]) for start in range(0, len(rows[size]), len(clips))]
        assert len(epochs) == 3 * batch_size
        assert all(sorted(epoch) == clips for epoch in epochs)
        assert len(clips) == 1 or len(set(epochs)) > 1


def test_the_order_is_a_function_of_seed_and_step():
    order = batches(range(20), 2, seed=5)
    assert batches(reversed(range(20)), 2, seed=5) == order[::-1]
    assert batches([10**6], 2, seed=5) == batches([10**6], 2, seed=5)
    assert batches(range(20), 2, seed=6) != order
    # Written down once: with another order, no old run could be resumed.
    assert order[:8] == [[6, 3], [2, 0], [4, 4], [1, 5], [1, 5], [6, 3], [2, 0], [6, 2]]


def test_clips_of_one_size_are_simply_shuffled():
    order = list(itertools.chain(*batches(range(9), 2, sizes=["any"] * 6)))
    assert [sorted(order[start : start + 6]) for start in (0, 6, 12)] == [list(range(6))] * 3
    assert order == [*itertools.chain(*batches(range(6), 3, sizes=["any"] * 6))]


# --- Held-out clips --------------------------------------------------------------------------------------------------


def test_all_clips_of_a_video_are_on_one_side():
    for number in range(50):
        video = f"videos/{number}.mp4"
        sides = {is_held_out(clip, 0.5) for clip in (video, f"{video}#t=5.062", f"{video}#t=10.125")}
        assert len(sides) == 1


def test_the_fraction_of_videos_that_are_held_out():
    names = [f"{number}.mp4" for number in range(4000)]
    held_out = {fraction: {name for name in names if is_held_out(name, fraction)} for fraction in (0.0, 0.1, 0.3)}
    assert not held_out[0.0]
    assert 340 < len(held_out[0.1]) < 460
    assert 1080 < len(held_out[0.3]) < 1320
    assert held_out[0.1] < held_out[0.3]
