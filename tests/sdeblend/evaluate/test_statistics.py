"""Statistics of an evaluation against scipy and known answers; intervals that cover, and controls that do not."""

import math

import numpy as np
import pytest
from scipy import stats

from sdeblend.evaluate.statistics import (
    Resampled,
    Sample,
    bootstrap_counts,
    cell_weights,
    hypervolume,
    hypervolumes,
    over_cells,
    pareto_front,
    placements,
)


def plain(n, stratum=0):
    return Sample(np.arange(n), np.ones(n), np.full(n, stratum))


def test_the_bootstrap_of_a_mean_agrees_with_scipy():
    rng = np.random.default_rng(0)
    data = rng.exponential(size=200)
    resampled = Resampled(bootstrap_counts(1, 200, 4000))
    got = resampled.interval(*resampled.mean(plain(200), data))
    expected = stats.bootstrap((data,), np.mean, n_resamples=4000, method="percentile", rng=rng).confidence_interval
    assert got.value == pytest.approx(data.mean())
    assert got.low == pytest.approx(expected.low, abs=0.02) and got.high == pytest.approx(expected.high, abs=0.02)


def coverage(cover, trials):
    return sum(cover(trial) for trial in range(trials)) / trials


def test_intervals_cover_a_mean_and_a_paired_difference():
    trials, n = 400, 80
    counts = bootstrap_counts(1, n, 300)

    def covers(confidence, paired=True):
        def one(trial):
            rng = np.random.default_rng(1000 + trial)
            shared = rng.normal(size=n)
            first, second = shared + 0.3 + 0.2 * rng.normal(size=n), shared
            resampled = Resampled(counts, confidence)
            (a, da), (b, db) = (resampled.mean(plain(n), values) for values in (first, second))
            interval = resampled.interval(a - b, da - db if paired else da - db[::-1])
            return interval.low <= 0.3 <= interval.high

        return one

    se = math.sqrt(0.95 * 0.05 / trials)
    assert abs(coverage(covers(0.95), trials) - 0.95) < 4 * se + 0.01  # percentiles lose a little at n = 80
    # The controls: another confidence, and resamples that are not paired (far too wide).
    assert abs(coverage(covers(0.8), trials) - 0.95) > 4 * se + 0.01
    assert coverage(covers(0.95, paired=False), trials) == 1


def test_families_count_once():
    rng = np.random.default_rng(1)
    data, n = rng.normal(size=100), 100
    resampled = Resampled(bootstrap_counts(1, n, 2000))
    single = resampled.interval(*resampled.mean(plain(n), data))
    copies = Sample(np.repeat(np.arange(n), 5), np.ones(5 * n), np.zeros(5 * n))
    repeated = resampled.interval(*resampled.mean(copies, np.repeat(data, 5)))
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high))
    assert copies.effective == pytest.approx(n)
    # The control: taken for independent they look more than twice as certain.
    wide = Resampled(bootstrap_counts(1, 5 * n, 2000))
    wrong = wide.interval(*wide.mean(plain(5 * n), np.repeat(data, 5)))
    assert (wrong.high - wrong.low) < 0.55 * (single.high - single.low)


def test_weights_and_missing_values():
    sample = Sample(np.arange(4), np.array([1.0, 3.0, 0.0, 5.0]), np.zeros(4))
    resampled = Resampled(bootstrap_counts(1, 4, 100))
    value, drawn = resampled.mean(sample, np.array([2.0, 4.0, 100.0, np.nan]))
    assert value == pytest.approx((2 + 12) / 4) and drawn.shape == (100,)
    assert sample.effective == pytest.approx(81 / 35)


def test_prompts_are_resampled_before_their_seeds():
    counts = bootstrap_counts(4, 50, 3000, variants=2).astype(int).reshape(3000, 2, 4, 50)
    assert (counts.sum((2, 3)) == 200).all()
    # The total of a prompt is fifty times how often it was drawn: variance 50^2 * 4 * 1/4 * 3/4.
    assert counts.sum(3).var() == pytest.approx(2500 * 0.75, rel=0.05)
    alone = bootstrap_counts(1, 50, 500).astype(int)
    assert (alone.sum(1) == 50).all() and alone.var() == pytest.approx(1, abs=0.05)
    assert (bootstrap_counts(1, 50, 500) == alone).all()  # the same draws for all that is to be paired


def test_win_rates_are_those_of_mann_and_whitney():
    rng = np.random.default_rng(2)
    first, second = rng.integers(0, 8, 300).astype(float), rng.integers(0, 7, 300).astype(float)
    resampled = Resampled(bootstrap_counts(1, 300, 2000))
    rate = resampled.win_rate(plain(300), first, plain(300), second)
    statistic = stats.mannwhitneyu(first, second).statistic / 300**2
    assert rate.value == pytest.approx(statistic)
    brute = (first[:, None] > second).mean() + (first[:, None] == second).mean() / 2
    assert rate.value == pytest.approx(brute)
    # DeLong's standard error of independent samples; here they are.
    v, u = placements(first, second, np.ones(300)), 1 - placements(second, first, np.ones(300))
    error = math.sqrt(v.var(ddof=1) / 300 + u.var(ddof=1) / 300)
    assert (rate.high - rate.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert resampled.win_rate(plain(300), first, plain(300), first).value == pytest.approx(0.5)


def test_win_rates_compare_within_a_prompt():
    # Prompts differ far more than methods do: across them the win rate would be near one half.
    stratum = np.repeat([0, 1], 50)
    sample = Sample(np.arange(100), np.ones(100), stratum)
    values = np.random.default_rng(3).normal(size=100) * 0.1 + 100 * stratum
    resampled = Resampled(bootstrap_counts(2, 50, 200))
    assert resampled.win_rate(sample, values + 10, sample, values).value == 1


def test_hypervolume_of_known_fronts():
    front = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    assert hypervolume(front, [0, 0]) == pytest.approx(6)
    assert hypervolume(np.concatenate([front, [[1.5, 1.5], [-1, 9]]]), [0, 0]) == pytest.approx(6)
    assert hypervolume(np.array([[1.0, 2.0, 3.0]]), [0, 0, 1]) == pytest.approx(4)
    assert pareto_front(np.concatenate([front, [[1.5, 1.5]]])).tolist() == [True, True, True, False]
    drawn = np.stack([front + shift for shift in (-0.1, 0.0, 0.1)] * 50)
    resampled = Resampled(bootstrap_counts(1, 2, 100))
    out = hypervolumes({"a": front, "b": front * 1.1}, {"a": drawn, "b": drawn * 1.1}, [0, 0], resampled, "a")
    assert out["b"][1].value == pytest.approx(1.21) and not out["b"][1].excludes(1.21) and out["b"][1].excludes(1)
    assert out["a"][0].low < 6 < out["a"][0].high and out["a"][1].low == out["a"][1].high == 1


def test_replicates_have_students_interval():
    data = [0.3, 0.5, 0.2, 0.45]
    got, over = over_cells(data, "aaaa", [""] * 4)
    expected = stats.ttest_1samp(data, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high)) and over == "blocks"
    alone, over = over_cells([0.3], "a", [""])
    assert alone.value == 0.3 and math.isnan(alone.low) and not alone.excludes(5) and over == ""
    assert over_cells(data, "aaaa", "pqrs") == (got, "prompts")
    # Blocks of a prompt are no replicates of each other.
    twice, over = over_cells(np.repeat(data, 2), "a" * 8, "ppqqrrss")
    assert (twice.low, twice.high) == pytest.approx((got.low, got.high)) and over == "prompts"


def test_variants_are_strata_of_a_distance():
    data = np.array([0.1, 0.2, 5.0, 5.1, 9.0, 9.3])
    got, over = over_cells(data, "aabbcc", [""] * 6)
    assert got.value == pytest.approx(data.mean()) and over == "blocks within variants"
    # With two variants the difference of their means has the same error: Welch's test knows it.
    pair, _ = over_cells([*data[:2], *-data[2:4]], "aabb", [""] * 4)
    expected = stats.ttest_ind(data[:2], data[2:4], equal_var=False).confidence_interval(0.95)
    assert (2 * pair.low, 2 * pair.high) == pytest.approx((expected.low, expected.high))
    # What variants differ by is no error, unless they are all there is.
    shifted, _ = over_cells(data + 40 * np.repeat([0, 1, 2], 2), "aabbcc", [""] * 6)
    assert shifted.high - shifted.low == pytest.approx(got.high - got.low)
    means, over = over_cells(data[:5], "aabbc", [""] * 5)
    expected = stats.ttest_1samp([0.15, 5.05, 9.0], 0).confidence_interval(0.95)
    assert (means.low, means.high) == pytest.approx((expected.low, expected.high)) and over == "variants"
    assert cell_weights("aabbc", [""] * 5) @ data[:5] == pytest.approx(means.value)
    assert cell_weights("aaab", "ppqp").tolist() == [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    same, _ = over_cells([2.0, 2.0, 3.0, 3.0], "aabb", [""] * 4)
    assert (same.value, same.low, same.high) == (2.5, 2.5, 2.5)


def test_intervals_over_strata_cover_and_pooled_ones_do_not():
    rng, trials = np.random.default_rng(5), 600
    spread = np.repeat([1.0, 2.0, 4.0], 2)
    draws = rng.normal(size=(trials, 6)) * spread

    def covered(interval):
        return sum(one.low <= 0 <= one.high for one in map(interval, draws)) / trials

    error = math.sqrt(0.95 * 0.05 / trials)
    # Welch's degrees of freedom are few and err on the safe side.
    assert covered(lambda x: over_cells(x, "aabbcc", [""] * 6)[0]) > 0.95 - 3 * error
    wide = covered(lambda x: over_cells(x + 30 * np.repeat([-1, 0, 1], 2), "aaaaaa", [""] * 6)[0])
    narrow = covered(lambda x: over_cells(x, "aabbcc", [""] * 6, 0.8)[0])
    assert wide == 1 and narrow < 0.95 - 3 * error  # the controls: variants pooled, and another confidence
