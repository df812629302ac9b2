"""The statistics of the study, compared with scipy and with simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from tfm_jax.moving_shapes.study import protocol
from tfm_jax.moving_shapes.study.plan import Size
from tfm_jax.moving_shapes.study.statistics import (
    corrected_level,
    paired_difference,
    pooled_spread,
    smallest_detectable,
    t_interval,
)


@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 12])
@pytest.mark.parametrize("count", [2, 5, 8])
def test_intervals_are_those_of_scipy(count, level):
    values = np.random.default_rng(count).normal(0.3, 2, count)
    found = t_interval(values.tolist(), level)
    expected = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert (found.value, found.values) == (pytest.approx(values.mean()), tuple(values))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_an_interval_excludes_zero_exactly_if_the_corrected_test_rejects():
    rng = np.random.default_rng(0)
    level, decided = corrected_level(12), set()
    for shift in np.linspace(0, 3, 50):
        values = rng.normal(shift, 1, 8)
        rejects = bool(12 * stats.ttest_1samp(values, 0).pvalue < protocol.ERROR_RATE)
        assert t_interval(values.tolist(), level).excludes_zero == rejects
        decided.add(rejects)
    assert decided == {True, False}


def test_equal_values_have_an_interval_without_width():
    assert not t_interval([0.0, 0.0, 0.0], 0.95).excludes_zero
    assert t_interval([0.5, 0.5, 0.5], 0.95).excludes_zero


def test_the_family_is_wrong_as_rarely_as_promised():
    """In studies without any difference, at least one interval of 12 excludes 0 in about 5 % of studies."""
    studies = np.random.default_rng(1).normal(size=(4000, 12, 8))
    critical = stats.t.ppf((1 + corrected_level(12)) / 2, 7)
    statistics = studies.mean(-1) / (studies.std(-1, ddof=1) / math.sqrt(8))
    assert 0.035 < (abs(statistics) > critical).any(-1).mean() < 0.06
    assert corrected_level(1) == pytest.approx(1 - protocol.ERROR_RATE)


def test_pairing_removes_what_seeds_share():
    seeds = {seed: 10.0 * seed for seed in range(5)}
    better = {seed: value - 0.5 + 0.01 * seed for seed, value in seeds.items()}
    found = paired_difference(better, seeds, 0.95)
    assert found is not None
    assert found.value == pytest.approx(-0.48)
    assert -0.51 < found.low < found.high < -0.45
    shifted = {(seed + 1) % 5: value for seed, value in better.items()}
    assert not paired_difference(shifted, seeds, 0.95).excludes_zero  # the same numbers with other partners


def test_pairs_are_the_common_seeds_and_no_failure_is_left_out():
    assert paired_difference({0: 1.0, 1: 2.0, 7: 9.0}, {1: 1.0, 0: 1.0, 3: 5.0}, 0.95).values == (0.0, 1.0)
    assert paired_difference({0: 1.0, 1: None}, {0: 1.0, 1: 1.0}, 0.95) is None
    assert paired_difference({0: 1.0}, {1: 1.0}, 0.95) is None
    assert paired_difference({0: 1.0}, {0: 2.0}, 0.95) is None  # no spread can be computed


def test_the_pooled_spread_ignores_differences_between_groups():
    rng = np.random.default_rng(0)
    groups = [(rng.normal(size=3) + 100 * n).tolist() for n in range(2000)]
    assert pooled_spread(groups) == pytest.approx(1, rel=0.05)
    assert pooled_spread([[1.0, 3.0]]) == pytest.approx(np.std([1.0, 3.0], ddof=1))


@pytest.mark.parametrize(("seeds", "comparisons"), [(5, 1), (8, 1), (8, 12), (20, 12)])
def test_the_smallest_detectable_difference_is_that_of_the_noncentral_t_distribution(seeds, comparisons):
    level = corrected_level(comparisons)
    found = smallest_detectable(2.0, seeds, level)
    critical, shift = stats.t.ppf((1 + level) / 2, seeds - 1), found / 2 * math.sqrt(seeds)
    power = stats.nct.sf(critical, seeds - 1, shift) + stats.nct.cdf(-critical, seeds - 1, shift)
    assert power == pytest.approx(protocol.POWER, abs=0.001)


def test_simulated_studies_detect_the_smallest_detectable_difference_as_often_as_promised():
    level = corrected_level(12)
    difference = smallest_detectable(1.0, 8, level)
    studies = np.random.default_rng(2).normal(difference, 1, (4000, 8))
    detected = np.mean([t_interval(study.tolist(), level).excludes_zero for study in studies])
    assert detected == pytest.approx(protocol.POWER, abs=0.02)


def test_two_seeds_detect_only_huge_differences():
    assert smallest_detectable(1.0, 2, corrected_level(12)) > 100


def test_the_family_of_the_full_study_has_12_comparisons():
    size = Size()
    assert len(protocol.PRIMARY) * len(size.lengths) * len(size.laws) == 12
    assert set(protocol.PRIMARY) <= protocol.LOWER_IS_BETTER
    assert not set(protocol.PILOT_SEEDS) & set(range(size.seeds))
    assert set(size.lengths) <= set(protocol.PILOT_LENGTHS)
    assert size.learning_rate in protocol.PILOT_LEARNING_RATES
