"""Statistics of a few runs; None if undefined. Equal values stay equal."""
import itertools
import math
import warnings

import numpy as np
import scipy.stats

RESAMPLES = 2000  # of a bootstrap
BOUNDS = ("mean", "low", "high", "bootstrap_low", "bootstrap_high")
KINDS = {  # kind: (name, a, b); a / (n - b) is the variance of Fisher's z
    "pearson": ("Pearson r", 1, 3),  # Fisher 1921
    "kendall": ("Kendall τ", 0.437, 4),  # Fieller et al. 1957
}


def mean_ci(values):
    """Computes means of values (n, ...) over the first axis, and their 95% intervals.

    Returns:
        (5, ...), as BOUNDS: the mean, its interval by Student's t, and the paper's by bootstrap,
        which covers 50% of means of two values, 75% of three, 90% of ten; NaN for a single value.
    """
    values = np.asarray(values, float)
    n, first = len(values), values[0]
    mean = first + (values - first).mean(0)  # of equal values exactly their mean
    if n < 2:
        return np.stack([mean, *[np.full_like(mean, np.nan)] * 4])
    reach = scipy.stats.t.ppf(0.975, n - 1) * (values - first).std(0, ddof=1) / math.sqrt(n)
    drawn = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, batch=200, method="percentile",
        rng=np.random.default_rng(0)).confidence_interval
    return np.stack([mean, mean - reach, mean + reach, drawn.low, drawn.high])


def nan_to_none(values):
    """Lists numbers for JSON."""
    return [None if np.isnan(v) else float(v) for v in values]


def summary_stats(values):
    """Returns n, mean, sd and intervals of a number per run; None if one lacks it."""
    if any(v is None for v in values):
        return None
    values = np.array(values, float)
    mean, low, high, *bootstrap = nan_to_none(mean_ci(values))
    stats = {"n": len(values), "mean": mean, "sd": None, "ci95": None, "ci95_bootstrap": None}
    if len(values) > 1:
        sd = float((values - values[0]).std(ddof=1))
        stats |= {"sd": sd, "ci95": [low, high], "ci95_bootstrap": bootstrap}
    return stats | {"values": nan_to_none(values)}


def correlations(x, y):
    """Returns {"n", "pearson": [r, p], "pearson_ci95", "kendall": [tau, p], "kendall_ci95"}.

    Coefficients of fewer than three different points, or without spread in x or y, are None.
    """
    x, y = (np.asarray(v, float) for v in (x, y))
    result = {"n": len(x)}
    defined = len(set(zip(x, y))) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0
    for kind, test in (("pearson", scipy.stats.pearsonr), ("kendall", scipy.stats.kendalltau)):
        result[kind] = nan_to_none(test(x, y)) if defined else None
        result[f"{kind}_ci95"] = fisher_interval(result[kind][0], len(x), kind) if defined else None
    return result


def fisher_interval(r, n, kind):
    """Returns the 95% interval of a coefficient of n points by Fisher's z; None if it is 1."""
    _, a, b = KINDS[kind]
    if n <= b or abs(r) > 1 - 1e-12:  # r is rounded
        return None
    reach = scipy.stats.norm.ppf(0.975) * math.sqrt(a / (n - b))
    return nan_to_none(np.tanh(np.arctanh(r) + np.array([-reach, reach])))


def bootstrap_correlation(x, y, kind):
    """Returns the paper's 95% interval of a correlation, over resampled runs."""
    if correlations(x, y)[kind] is None:
        return None
    score = np.sign if kind == "kendall" else np.asarray

    def coefficient(x, y, axis):  # the cosine of all pairs' differences, or of their signs
        dx, dy = (score(v[..., :, None] - v[..., None, :]) for v in (x, y))
        xy, xx, yy = ((a * b).sum((-2, -1)) for a, b in ((dx, dy), (dx, dx), (dy, dy)))
        return xy / np.sqrt(xx * yy)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a resample of equal runs has no coefficient: NaN
        drawn = scipy.stats.bootstrap(
            (np.asarray(x, float), np.asarray(y, float)), coefficient, n_resamples=RESAMPLES,
            batch=200, paired=True, method="percentile", rng=np.random.default_rng(0))
    return nan_to_none(np.nanpercentile(drawn.bootstrap_distribution, [2.5, 97.5]))


def partial_correlation(x, y, given):
    """Returns {"pearson": [r, p], "pearson_ci95"} of the residuals of x and y on `given`."""
    x, y, given = (np.asarray(v, float) for v in (x, y, given))
    if len(x) < 4:
        return None
    line = np.stack([np.ones_like(given), given - given.mean()], 1)
    rest = [v - line @ np.linalg.lstsq(line, v, rcond=None)[0] for v in (x - x[0], y - y[0])]
    if any(np.abs(r).max() <= 1e-9 * np.ptp(v) for r, v in zip(rest, (x, y))):
        return None
    r = scipy.stats.pearsonr(*rest)[0]
    t = abs(r) * math.sqrt((len(x) - 3) / max(1 - r * r, 1e-300))  # one degree of freedom less
    return {"pearson": nan_to_none([r, 2 * scipy.stats.t.sf(t, len(x) - 3)]),
            "pearson_ci95": fisher_interval(r, len(x) - 1, "pearson")}


def t_test(a, b):
    """Tests two means: {"difference": a's minus b's, "student": [t, p], "welch": [t, p]}.

    The paper's stars (C.2, F) are Student's. None for a single value or without spread.
    """
    a, b = (np.asarray(v, float) for v in (a, b))
    defined = min(len(a), len(b)) > 1 and max(np.ptp(a), np.ptp(b)) > 0
    student, welch = (nan_to_none(scipy.stats.ttest_ind(a, b, equal_var=equal)) if defined else None
                      for equal in (True, False))
    return {"difference": float(a.mean() - b.mean()), "student": student, "welch": welch}


def paired_test(a, b, total=100):
    """Returns summary_stats of the differences a - b, and "p" of the paired t-test.

    Args:
        a, b: (n,) percentages, or counts out of `total`. p is None if all differences are equal.
    """
    percent = [100 * (x - y) / total for x, y in zip(a, b)]
    varies = len(set(percent)) > 1
    p = float(scipy.stats.ttest_1samp(percent, 0).pvalue) if varies else None
    return {**summary_stats(percent), "p": p}


def paired_differences(samples, total=100):
    """Tests every two samples {name: {seed: value}}: {"b minus a": paired_test and "seeds"}."""
    result = {}
    for (first, a), (second, b) in itertools.combinations(samples.items(), 2):
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            test = paired_test([b[k] for k in seeds], [a[k] for k in seeds], total)
            result[f"{second} minus {first}"] = {**test, "seeds": seeds}
    return result


def holm(p_values):
    """Returns p values after Holm's correction for as many tests; None stays None."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected, largest = list(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        corrected[i] = largest = max(largest, min(1.0, (len(known) - rank) * p))
    return corrected


def format_ci(value, bounds, form):
    """Formats a number and its interval or None: -0.62 (-0.81 to -0.31)."""
    plain = form.removeprefix("+")
    return f"{value:{form}}" + (f" ({bounds[0]:{plain}} to {bounds[1]:{plain}})" if bounds else "")


def format_test(value, bounds, p, digits=2):
    """Formats a difference or coefficient with its interval and p: +0.34 (0.09 to 0.59), p = 0.018.
    """
    return format_ci(value, bounds, f"+.{digits}f") + ("" if p is None else f", p = {p:.2g}")


def format_correlation(numbers, kind, short=False):
    """Formats a coefficient: Kendall τ = -0.62 (-0.81 to -0.31), p = 0.0003."""
    if not numbers[kind]:
        return ""
    (r, p), name = numbers[kind], KINDS[kind][0]
    text = f"{name} = {format_ci(r, numbers[f'{kind}_ci95'], '.2f')}"
    return text.partition(" ")[2] if short else f"{text}, p = {p:.2g}"


def format_difference(test):
    """Formats a paired_test: +0.50 points (0.10 to 0.90), p = 0.02, n = 10."""
    ci = "" if test["ci95"] is None else " ({:.2f} to {:.2f})".format(*test["ci95"])
    p = "p undefined" if test["p"] is None else f"p = {test['p']:.2g}"
    return f"{test['mean']:+.2f} points{ci}, {p}, n = {test['n']}"


def format_mean(stats, digits):
    """Formats a mean and its standard deviation: 93.21 ± 0.12."""
    sd = "" if stats["sd"] is None else f" ± {stats['sd']:.{digits}f}"
    return f"{stats['mean']:.{digits}f}{sd}"
