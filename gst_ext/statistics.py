"""Statistics of few runs: intervals of means, correlations and their intervals, t-tests; None where undefined.

Numbers may be exact fractions: what is equal must be equal here, too, or differences and ranks come of rounding.
"""
import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import scipy.stats

RESAMPLES = 2000  # of a bootstrap
BOUNDS = ("mean", "low", "high", "bootstrap_low", "bootstrap_high")


def share(percent, n):
    """A logged percentage of n (or None) as an exact fraction: 100 c / n where it is that of a count c."""
    count = round(percent * n / 100) if n else 0
    return Fraction(100 * count, n) if n and abs(percent * n / 100 - count) < 0.01 else Fraction(percent)


def interval(values):
    """Mean over axis 0, its 95% interval by Student's t, and the paper's, by bootstrap percentiles: (5, …) as BOUNDS.

    NaN bounds for one value. Percentiles of few values are too narrow: of normal ones, "95%" covers 50% of means for
    two, 75% for three and 90% for ten, Student's 95% for any number.
    """
    values = np.asarray(values, float)
    n, first = len(values), values[0]
    mean = first + (values - first).mean(0)  # of equal values, exactly theirs
    if n < 2:
        return np.stack([mean, *[np.full_like(mean, np.nan)] * 4])
    reach = scipy.stats.t.ppf(0.975, n - 1) * (values - first).std(0, ddof=1) / math.sqrt(n)
    drawn = scipy.stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=200, method="percentile", axis=0,
                                  vectorized=True, rng=np.random.default_rng(0)).confidence_interval
    return np.stack([mean, mean - reach, mean + reach, drawn.low, drawn.high])


def floats(values):
    """Numbers as a list for JSON, which has no NaN: None stands for it."""
    return [None if np.isnan(v) else float(v) for v in values]


def measured(values):
    """n, mean, standard deviation and 95% intervals of one number per run, for the JSON; None where a run lacks it."""
    if any(v is None for v in values):
        return None
    values = np.array(values, float)
    mean, *bounds = floats(interval(values))
    several = len(values) > 1
    return {"n": len(values), "mean": mean, "sd": float((values - values[0]).std(ddof=1)) if several else None,
            "ci95": bounds[:2] if several else None, "ci95_bootstrap": bounds[2:] if several else None,
            "values": floats(values)}


KINDS = {"pearson": (scipy.stats.pearsonr, "Pearson r", 1, 3),  # name, and what Fisher's z of n points has as variance:
         "kendall": (scipy.stats.kendalltau, "Kendall τ", 0.437, 4)}  # a / (n - b) (Fisher 1921; Fieller et al. 1957)


def correlations(x, y):
    """{"n", "pearson": [r, p], "kendall": [tau, p], "pearson_ci95", "kendall_ci95"}; None where undefined.

    That is for n < 3 or no spread; the intervals, by Fisher's z, are also undefined for a perfect correlation and for
    as few points as its variance formula does not reach.
    """
    x, y = (np.asarray(v, float) for v in (x, y))
    result = {"n": len(x)}
    for kind, (function, *_) in KINDS.items():
        defined = len(x) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0
        result[kind] = floats(function(x, y)) if defined else None
        result[f"{kind}_ci95"] = fisher_interval(result[kind][0], len(x), kind) if defined else None
    return result


def fisher_interval(r, n, kind):
    """95% interval [low, high] of a correlation coefficient of n points by Fisher's z, or None."""
    *_, a, b = KINDS[kind]
    if n <= b or abs(r) > 1 - 1e-12:  # rounding in r
        return None
    return floats(np.tanh(np.arctanh(r) + np.array([-1, 1]) * scipy.stats.norm.ppf(0.975) * math.sqrt(a / (n - b))))


def bootstrap_correlation(x, y, kind):
    """The paper's 95% interval [low, high] of "pearson" or "kendall", over resampled runs; None where undefined."""
    if correlations(x, y)[kind] is None:
        return None
    score = np.sign if kind == "kendall" else np.asarray

    def statistic(x, y, axis):  # both are the cosine of all pairs' differences, or of their signs (tau-b)
        dx, dy = (score(v[..., :, None] - v[..., None, :]) for v in (x, y))
        return (dx * dy).sum((-2, -1)) / np.sqrt((dx**2).sum((-2, -1)) * (dy**2).sum((-2, -1)))

    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample of one run many times over has none: left out of the percentiles
        drawn = scipy.stats.bootstrap((np.asarray(x, float), np.asarray(y, float)), statistic, n_resamples=RESAMPLES,
                                      batch=200, paired=True, vectorized=True, method="percentile",
                                      rng=np.random.default_rng(0)).bootstrap_distribution
    return floats(np.nanpercentile(drawn, [2.5, 97.5]))


def partial_correlation(x, y, given):
    """Pearson's correlation of what is left of x and y after a line in `given` is taken off: {"pearson": [r, p],
    "pearson_ci95"} as correlations has them, with a degree of freedom less; None where `given` leaves nothing."""
    x, y, given = (np.asarray(v, float) for v in (x, y, given))
    line = np.stack([np.ones_like(given), given - given.mean()], 1) if len(given) else np.empty((0, 2))
    left = [v - line @ np.linalg.lstsq(line, v, rcond=None)[0] for v in (x - x[:1], y - y[:1])]
    if len(x) < 4 or any(np.abs(rest).max() <= 1e-9 * np.ptp(v) for rest, v in zip(left, (x, y))):
        return None
    r = float(np.clip(left[0] @ left[1] / math.sqrt((left[0] @ left[0]) * (left[1] @ left[1])), -1, 1))
    t = r * math.sqrt((len(x) - 3) / (1 - r * r)) if abs(r) < 1 else math.inf
    return {"pearson": [r, float(2 * scipy.stats.t.sf(abs(t), len(x) - 3))],
            "pearson_ci95": fisher_interval(r, len(x) - 1, "pearson")}


def t_test(a, b):
    """Two-tailed t-tests of two samples' means: {"difference" (a's minus b's), "student": [t, p], "welch": [t, p]}.

    The paper's stars (C.2, F) are Student's, of equal variances; None where a sample has one value, or neither spread.
    """
    a, b = (np.asarray(v, float) for v in (a, b))
    result = {"difference": float(a.mean() - b.mean()), "student": None, "welch": None}
    if min(len(a), len(b)) > 1 and max(np.ptp(a), np.ptp(b)) > 0:
        for name, equal in (("student", True), ("welch", False)):
            result[name] = floats(scipy.stats.ttest_ind(a, b, equal_var=equal))
    return result


def paired_test(a, b):
    """measured of the differences a - b of equally many pairs, and "p" of the two-tailed paired t-test.

    p is None, undefined, for one pair or where all differences are equal.
    """
    gaps = [x - y for x, y in zip(a, b)]
    p = float(scipy.stats.ttest_1samp(np.array(gaps, float), 0).pvalue) if len(set(gaps)) > 1 else None
    return {**measured(gaps), "p": p}


def paired_differences(values):
    """paired_test, and "seeds", of every two samples {name: {seed: number}} with common seeds: {"b minus a": …}."""
    result = {}
    for (first, a), (second, b) in itertools.combinations(values.items(), 2):
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            test = paired_test([b[seed] for seed in seeds], [a[seed] for seed in seeds])
            result[f"{second} minus {first}"] = {**test, "seeds": seeds}
    return result


def ranged(value, bounds, form):
    """A number and its interval [low, high] (or None) in words, each by the format: -0.62 (-0.81 to -0.31)."""
    return f"{value:{form}}" + (f" ({bounds[0]:{form}} to {bounds[1]:{form}})" if bounds else "")


def stated(numbers, kind, short=False):
    """A correlation in words: "Kendall τ = -0.62 (-0.81 to -0.31), p = 0.0003", in short without p; "" for none."""
    if not numbers[kind]:
        return ""
    (r, p), bounds, name = numbers[kind], numbers[f"{kind}_ci95"], KINDS[kind][1]
    text = f"{name.split()[-1] if short else name} = {ranged(r, bounds, '.2f')}"
    return text if short else f"{text}, p = {p:.2g}"


def gap_of(m):
    """A paired difference in words: +0.50 points (0.10 to 0.90), p = 0.02, n = 10."""
    return f"{m['mean']:+.2f} points" + (f" ({m['ci95'][0]:.2f} to {m['ci95'][1]:.2f})" if m["ci95"] else "") + (
        f", p = {m['p']:.2g}" if m["p"] is not None else ", p undefined") + f", n = {m['n']}"


def plus_minus(m, digits):
    return f"{m['mean']:.{digits}f}" + (f" ± {m['sd']:.{digits}f}" if m["sd"] is not None else "")
