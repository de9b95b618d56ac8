"""gst_ext/statistics.py: intervals by simulation and formula, correlations by SciPy's own."""
import math
import warnings

import numpy as np
import pytest
import scipy.stats

from gst_ext import statistics

SCIPY = {"pearson": scipy.stats.pearsonr, "kendall": scipy.stats.kendalltau}


def coverage(bounds, truth):
    bounds = np.asarray(bounds, float)
    return np.mean((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))


@pytest.mark.parametrize("n, percentiles", [(2, 0.5), (3, 0.76), (10, 0.9)])
def test_students_interval_covers_at_its_level_where_percentiles_fall_short(n, percentiles):
    samples = np.random.default_rng(n).normal(5, 2, (n, 2000))
    mean, *bounds = statistics.mean_ci(samples)
    assert np.allclose(mean, samples.mean(0)) and len(statistics.BOUNDS) == 5
    assert coverage(np.transpose(bounds[:2]), 5) == pytest.approx(0.95, abs=0.015)
    assert coverage(np.transpose(bounds[2:]), 5) == pytest.approx(percentiles, abs=0.03)
    first = scipy.stats.t.interval(0.95, n - 1, samples[:, 0].mean(),
                                   scipy.stats.sem(samples[:, 0]))
    assert [bounds[0][0], bounds[1][0]] == pytest.approx(first)


def test_intervals_repeat_exactly_and_are_undefined_for_one_value():
    values = np.random.default_rng(1).normal(size=(4, 3))
    assert np.array_equal(statistics.mean_ci(values), statistics.mean_ci(values))
    assert np.isnan(statistics.mean_ci([[1.0]])[1:]).all()
    assert statistics.summary_stats([1 / 3])["ci95"] is None
    third = 100 / 3
    assert statistics.summary_stats([third] * 3) == {
        "n": 3, "mean": third, "sd": 0, "ci95": [third] * 2, "ci95_bootstrap": [third] * 2,
        "values": [third] * 3}
    assert statistics.summary_stats([1, None]) is None


@pytest.mark.parametrize("kind, n", [("pearson", 6), ("kendall", 8), ("kendall", 30)])
def test_intervals_of_a_correlation_cover_at_their_level(kind, n):
    random, rho = np.random.default_rng(n), -0.5
    truth = rho if kind == "pearson" else 2 / math.pi * math.asin(rho)
    bounds = []
    for _ in range(600):
        x = random.normal(size=n)
        y = rho * x + math.sqrt(1 - rho**2) * random.normal(size=n)
        bounds.append(statistics.correlations(x, y)[f"{kind}_ci95"])
    assert coverage([b for b in bounds if b], truth) == pytest.approx(0.95, abs=0.03)


def test_correlations_that_are_undefined():
    nothing = {"pearson": None, "pearson_ci95": None, "kendall": None, "kendall_ci95": None}
    for x, y in (([], []), ([1, 2], [3, 4]), ([1, 1, 1], [3, 4, 5]), ([1, 1, 2], [5, 5, 3])):
        assert statistics.correlations(x, y) == nothing | {"n": len(x)}
    perfect = statistics.correlations([1, 2, 3, 4, 5], [9, 8, 7, 6, 5])
    assert perfect["pearson"][0] == pytest.approx(-1) and perfect["kendall"][0] == pytest.approx(-1)
    assert perfect["pearson_ci95"] is perfect["kendall_ci95"] is None
    assert statistics.correlations([1, 2, 3], [1, 3, 2])["pearson_ci95"] is None


def test_correlations_and_their_bootstrap_are_scipys():
    random = np.random.default_rng(0)
    x = random.normal(size=30)
    y = -x + random.normal(size=30)
    fisher = scipy.stats.pearsonr(x, y).confidence_interval()
    found = statistics.correlations(x, y)
    assert found["pearson_ci95"] == pytest.approx([fisher.low, fisher.high])
    z, reach = math.atanh(found["kendall"][0]), 1.959964 * math.sqrt(0.437 / (30 - 4))
    assert found["kendall_ci95"] == pytest.approx(
        [math.tanh(z - reach), math.tanh(z + reach)], abs=1e-6), "Fieller et al. 1957"
    assert statistics.bootstrap_correlation([1, 1, 1], [1, 2, 3], "pearson") is None
    x, y = np.array([1.0, 2, 2, 3, 5, 4]), np.array([2.0, 1, 4, 4, 6, 5])  # with ties
    for kind, test in SCIPY.items():
        assert statistics.correlations(x, y)[kind] == pytest.approx(tuple(test(x, y)))
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slow = scipy.stats.bootstrap(
                (x, y), lambda x, y, test=test: test(x, y)[0], n_resamples=statistics.RESAMPLES,
                batch=200, paired=True, vectorized=False, rng=np.random.default_rng(0))
        expected = np.nanpercentile(slow.bootstrap_distribution, [2.5, 97.5])
        found = statistics.bootstrap_correlation(x, y, kind)
        assert found == pytest.approx(expected, abs=1e-12)


def test_partial_correlation_is_the_formula_and_undefined_if_nothing_is_left():
    random = np.random.default_rng(3)
    z = random.normal(size=20)
    x, y = z + random.normal(size=20), z + random.normal(size=20)
    xy, xz, yz = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (x, z), (y, z)))
    r = (xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2))
    t = r * math.sqrt(17 / (1 - r**2))
    found = statistics.partial_correlation(x, y, z)
    assert found["pearson"] == pytest.approx([r, 2 * scipy.stats.t.sf(abs(t), 17)])
    ci = np.tanh(np.arctanh(r) + np.array([-1, 1]) * 1.959964 / 4)
    assert found["pearson_ci95"] == pytest.approx(list(ci), abs=1e-6)
    assert statistics.partial_correlation(x, y, np.ones(20))["pearson"][0] == pytest.approx(xy)
    for a, b, given in ((3 * z + 1, y, z), (x, np.ones(20), z), ([], [], []),
                        ([1, 2, 3], [1, 3, 2], [3, 1, 2])):
        assert statistics.partial_correlation(a, b, given) is None


def test_t_tests_against_the_formulas():
    a, b = np.array([1.0, 2, 4, 5]), np.array([3.0, 7, 8])
    pooled = (((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / 5
    t = (a.mean() - b.mean()) / np.sqrt(pooled * (1 / 4 + 1 / 3))
    result = statistics.t_test(a, b)
    assert result["difference"] == -3
    assert result["student"] == pytest.approx([t, 2 * scipy.stats.t.sf(abs(t), 5)])
    welch = -3 / np.sqrt(a.var(ddof=1) / 4 + b.var(ddof=1) / 3)
    assert result["welch"][0] == pytest.approx(welch)
    assert statistics.t_test([1.0], [2.0, 3.0])["student"] is None
    assert statistics.t_test([1, 1], [2, 2])["welch"] is None


def test_paired_differences():
    a, b = [3, 5, 4], [1, 2, 4]
    test, t = statistics.paired_test(a, b), scipy.stats.ttest_rel(a, b)
    ci = t.confidence_interval()
    assert test["values"] == [2, 3, 0] and test["p"] == pytest.approx(t.pvalue)
    assert test["ci95"] == pytest.approx([ci.low, ci.high])
    pairs = statistics.paired_differences(
        {"x": {1: 1, 2: 2, 3: 4}, "y": {2: 5, 3: 4, 4: 9}, "z": {7: 1}})
    assert list(pairs) == ["y minus x"] and pairs["y minus x"]["seeds"] == [2, 3]
    assert pairs["y minus x"]["values"] == [3, 0]
