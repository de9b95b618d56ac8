#!/usr/bin/env python3
"""Reads the logs of finished runs, computes the statistics, and draws the paper's figures.

    python analyze.py --figure 2                      # from logs/ into figures/fig2.pdf, .png and .json
    python analyze.py --figure B2 --log-dir logs      # the same with the E[BN] scores
    python analyze.py --list                          # what can be drawn, from which runs, and how many are there

Runs that differ in anything but the method (data set, width, schedule, precision …) are never put into one figure:
each such setting gets files of its own, figures/fig2-<dataset>-<setting>.*. Every number drawn is in the .json.
"""
import argparse
import json
import pathlib
import sys
import warnings

import matplotlib
import numpy as np
import scipy.stats

import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of backend)

# +--------------------------------------------------------------------------------------------------------------------+
# | Configuration: which runs make which figure, how each method looks, what the paper reports                         |
# +--------------------------------------------------------------------------------------------------------------------+

FIGURES = {  # figure: (what it shows, runs.sh target, {model: the methods drawn})
    "2": ("accuracy while training, and best accuracy against mean stability", "fig2",
          {model: ("none", "S-r4", "S-r40", "L-r40") for model in ("vgg11", "resnet18")}),
    "B2": ("Figure 2 with the scores E[BN] (vgg11) and signed E[BN] (resnet18)", "figB2",
           {"vgg11": ("none", "S-r4-ebn", "S-r40-ebn", "L-r40-ebn"),
            "resnet18": ("none", *(f"{m}-ebn-signed-s3,4,5,6" for m in ("S-r4", "S-r40", "L-r40")))}),
}
STYLES = {  # Okabe and Ito's colour-blind-safe colours; one method looks the same in every figure
    "none": ("#000000", "-", "o"), "S-r4": ("#0072B2", "-", "s"), "S-r40": ("#E69F00", "--", "^"),
    "L-r40": ("#D55E00", "-.", "D"),
}
PAPER = {  # what the appendix reports; accuracies and stabilities in %
    ("2", "resnet18"): {"S-r4": {"best_acc": 87.65, "best_acc_sd": 0.26, "stability": 99.957},
                        "S-r40": {"best_acc": 87.72, "best_acc_sd": 0.18, "stability": 99.470},
                        "L-r40": {"best_acc": 88.03, "best_acc_sd": 0.26, "stability": 98.904}},
    ("B2", "vgg11"): {"S-r4": {"stability": 99.98}, "S-r40": {"stability": 99.81}, "L-r40": {"stability": 97.67},
                      "pearson": [-0.88, 1.2e-10], "kendall": [-0.64, 8.4e-07]},
    ("B2", "resnet18"): {"S-r4": {"stability": 99.96}, "S-r40": {"stability": 98.14}, "L-r40": {"stability": 96.66},
                         "pearson": [-0.65, 5e-05], "kendall": [-0.43, 0.00061]},
}
RESAMPLES = 2000
plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
                     "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42})


# +--------------------------------------------------------------------------------------------------------------------+
# | Runs: reading logs, and saying what is wrong with them                                                             |
# +--------------------------------------------------------------------------------------------------------------------+

def summarize(run_dir):
    """Everything a run's logs say, as a dict.

    dir, model, dataset, method, setting, seed, config and records; best_acc, best_epoch, gap, last_acc,
    val_chosen_acc, mean_stability (all in %) and events (train.summarize_epochs); problem: None, or
    one line saying why the run must not be averaged with others (unfinished or damaged). Raises nothing for a bad log.
    """
    run_dir = pathlib.Path(run_dir)
    run = {"dir": str(run_dir), "problem": None, "records": []}
    try:
        config = json.loads((run_dir / "config.json").read_text())
        options = config["options"]
        run.update(config=config, method=config["method"], setting=config["setting"], model=options["model"],
                   dataset=run_dir.parent.parent.parent.name, seed=options["seed"])
        epochs = config["schedule"]["epochs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {**run, "problem": f"config.json is missing or damaged ({type(error).__name__})"}
    try:
        for number, line in enumerate((run_dir / "epochs.jsonl").read_text().splitlines()):
            record = json.loads(line)
            if record["epoch"] != number:
                return {**run, "problem": f"line {number + 1} of epochs.jsonl is of epoch {record['epoch']}"}
            run["records"].append(record)
        run.update(train.summarize_epochs(run["records"]))
    except OSError:
        return {**run, "problem": "has no epochs.jsonl"}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        return {**run, "problem": f"line {len(run['records']) + 1} of epochs.jsonl is damaged ({type(error).__name__})"}
    if len(run["records"]) != epochs:
        run["problem"] = f"unfinished, {len(run['records'])} of {epochs} epochs"
    return run


def find_runs(log_dir):
    """Summaries of all runs below log_dir, in order of their directories."""
    return [summarize(path.parent) for path in sorted(pathlib.Path(log_dir).glob("*/*/*/seed*/config.json"))]


def runs_of(figure, runs):
    """(the finished runs of a figure by setting, {(dataset, setting): [run …]}; those left out, [run …])."""
    methods = FIGURES[figure][2]
    found, left_out = {}, []
    for run in runs:
        if "method" not in run or run["method"] in methods.get(run["model"], ()):
            if run["problem"]:
                left_out.append(run)
            else:
                found.setdefault((run["dataset"], run["setting"]), []).append(run)
    # A baseline alone makes no figure: it belongs to every figure of its setting.
    return {k: v for k, v in found.items() if any(run["method"] != "none" for run in v)}, left_out


# +--------------------------------------------------------------------------------------------------------------------+
# | Statistics                                                                                                         |
# +--------------------------------------------------------------------------------------------------------------------+

def interval(values):
    """Mean over axis 0 and its bootstrapped 95% percentile interval: (mean, low, high); low, high NaN for one run."""
    values = np.asarray(values, float)
    mean = values.mean(0)
    if len(values) < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    result = scipy.stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, batch=200, method="percentile", axis=0,
                                   vectorized=True, rng=np.random.default_rng(0))
    return mean, result.confidence_interval.low, result.confidence_interval.high


def no_nan(values):
    """An array as a list for JSON, which has no NaN: None stands for it."""
    return [None if np.isnan(v) else float(v) for v in values]


def correlations(x, y):
    """{"n", "pearson": [r, p], "kendall": [tau, p]}; None for either where it is undefined (n < 3, or no spread)."""
    result = {"n": len(x), "pearson": None, "kendall": None}
    if len(x) >= 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
        result["pearson"] = [float(v) for v in scipy.stats.pearsonr(x, y)]
        result["kendall"] = [float(v) for v in scipy.stats.kendalltau(x, y)]
    return result


def measured(values):
    """n, mean, standard deviation and 95% interval of one number per run, for the JSON."""
    mean, low, high = interval(values)
    return {"n": len(values), "mean": float(mean), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
            "ci95": [float(low), float(high)] if len(values) > 1 else None, "values": [float(v) for v in values]}


# +--------------------------------------------------------------------------------------------------------------------+
# | Figure 2 (and B2): dynamics, and accuracy against stability                                                        |
# +--------------------------------------------------------------------------------------------------------------------+

def base_method(method):
    """S-r40 of S-r40-ebn: the name a method's look goes by."""
    return "-".join(method.split("-")[:2]) if method != "none" else method


def method_label(run):
    """Prune_S 1%: the paper's name, with the largest iterative pruning rate of any layer (A.4)."""
    if run["method"] == "none":
        return "no pruning"
    rate = run["config"]["iterative_rate"]
    return f"Prune$_{run['method'][0]}$ {rate:.0f}%" if rate >= 0.95 else f"Prune$_{run['method'][0]}$ {rate:.1g}%"


def draw_dynamics(axis, groups):
    """Mean test accuracy per epoch and its 95% band, a method each; returns the numbers drawn, by method."""
    numbers, tops, floors = {}, [], []
    for method, runs in groups.items():
        colour, line, _ = STYLES[base_method(method)]
        curves = [[r["test_acc"] for r in run["records"]] for run in runs]
        mean, low, high = interval(curves)
        epochs = np.arange(1, len(mean) + 1)
        stability = np.mean([run["mean_stability"] for run in runs])
        axis.plot(epochs, mean, line, color=colour, lw=1, label=f"{stability:.2f}% stable ({method_label(runs[0])})")
        axis.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
        numbers[method] = {"epoch": epochs.tolist(), "mean": mean.tolist(), "low": no_nan(low), "high": no_nan(high)}
        tops.append(np.nanmax([mean, high]))
        floors.append(np.percentile(mean[len(mean) // 4:], 15))
    # The axis shows what separates the methods; a drop below it is marked with its depth, as in the paper.
    top, floor = max(tops), min(floors)
    floor -= 0.15 * (top - floor)
    axis.set_ylim(floor, top + 0.05 * (top - floor))
    for method, curve in numbers.items():
        mean = curve["mean"]
        drops = [i for i in range(1, len(mean)) if mean[i] < floor <= mean[i - 1]]
        if drops:
            worst = min(drops, key=lambda i: mean[i])
            axis.annotate(f"{mean[worst]:.0f}%", (curve["epoch"][worst], floor), (0, 2), ha="center",
                          textcoords="offset points", fontsize=7, color=STYLES[base_method(method)][0],
                          bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.8})
    axis.set(xlabel="Epoch", ylabel="Test accuracy (%)")
    axis.legend(title="Stability (method)", title_fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2,
                frameon=False)
    return numbers


def draw_scatter(axis, groups):
    """Best accuracy against mean stability, a point per run that pruned while it trained; returns the statistics."""
    pruned = {method: runs for method, runs in groups.items() if method != "none"}
    for method, runs in pruned.items():
        colour, _, marker = STYLES[base_method(method)]
        axis.plot([r["mean_stability"] for r in runs], [r["best_acc"] for r in runs], marker, color=colour, ms=4,
                  mec="white", mew=0.4, label=method_label(runs[0]), clip_on=False)
    if "none" in groups:
        axis.axhline(np.mean([r["best_acc"] for r in groups["none"]]), color=STYLES["none"][0], lw=0.8, ls=":",
                     label="no pruning (mean)")
    points = [run for runs in pruned.values() for run in runs]
    result = correlations([r["mean_stability"] for r in points], [r["best_acc"] for r in points])
    text = [f"n = {result['n']}"]
    for name, symbol in (("pearson", "Pearson r"), ("kendall", "Kendall τ")):
        if result[name]:
            text.append(f"{symbol} = {result[name][0]:.2f} (p = {result[name][1]:.2g})")
    axis.set_title(", ".join(text[:2]) + "".join("\n" + line for line in text[2:]), fontsize=7)
    axis.set(xlabel="Mean stability (%)", ylabel="Best test accuracy (%)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2, frameon=False)
    return result


def paired_differences(groups):
    """Best accuracy of each method minus the baseline's and each other's under the same seed, with a paired t-test."""
    result = {}
    for i, (first, first_runs) in enumerate(groups.items()):
        for second, second_runs in list(groups.items())[i + 1:]:
            a, b = ({run["seed"]: run["best_acc"] for run in runs} for runs in (first_runs, second_runs))
            seeds = sorted(a.keys() & b.keys())
            if seeds:
                gaps = [b[s] - a[s] for s in seeds]
                spread = len(gaps) > 1 and np.ptp(gaps) > 0
                result[f"{second} minus {first}"] = {
                    **measured(gaps), "seeds": seeds,
                    "p": float(scipy.stats.ttest_1samp(gaps, 0).pvalue) if spread else None}
    return result


def figure_2(figure, runs, title):
    """Draws Figure 2 or B2 from finished runs of one data set and setting; returns (matplotlib figure, numbers)."""
    by_model = {}
    for model, methods in FIGURES[figure][2].items():
        groups = {m: [r for r in runs if r["model"] == model and r["method"] == m] for m in methods}
        groups = {m: g for m, g in groups.items() if g}
        if any(m != "none" for m in groups):
            by_model[model] = groups
    canvas, axes = plt.subplots(len(by_model), 2, figsize=(6.75, 3.3 * len(by_model)), squeeze=False,
                                layout="constrained")
    numbers = {}
    for row, (model, groups) in zip(axes, by_model.items()):
        dynamics = draw_dynamics(row[0], groups)
        counts = sorted({len(g) for g in groups.values()})
        row[0].set_title(f"{model}, {' to '.join(map(str, counts[::len(counts) - 1 or 1]))} runs a method", fontsize=7)
        statistics = draw_scatter(row[1], groups)
        numbers[model] = {
            "methods": {m: {"label": method_label(g[0]).replace("$", ""), "seeds": [r["seed"] for r in g],
                            "iterative_rate": g[0]["config"]["iterative_rate"], "runs": [r["dir"] for r in g],
                            **{k: measured([r[k] for r in g])
                               for k in ("best_acc", "last_acc", "gap", "mean_stability")},
                            "val_chosen_acc": measured([r["val_chosen_acc"] for r in g])
                            if all(r["val_chosen_acc"] is not None for r in g) else None,
                            "dynamics": dynamics[m]} for m, g in groups.items()},
            "correlation_best_acc_stability": statistics,
            "paired_best_acc": paired_differences(groups),
            "paper": PAPER.get((figure, model)) if title == "cifar10" else None}
    canvas.suptitle(title, fontsize=8)
    return canvas, numbers


def draw(figure, log_dir, fig_dir):
    """Draws a figure for every data set and setting found; raises train.UserError if there is nothing to draw."""
    target = FIGURES[figure][1]
    runs = find_runs(log_dir)
    settings, left_out = runs_of(figure, runs)
    for run in left_out:
        print(f"left out: {run['dir']}: {run['problem']}")
    if not settings:
        raise train.UserError(f"no finished runs of Figure {figure} under {log_dir}/: train them with 'bash runs.sh "
                              f"{target}', or name another --log-dir")
    for (dataset, setting), found in settings.items():
        title = " ".join(filter(None, (dataset, setting)))
        canvas, numbers = figure_2(figure, found, title)
        name = pathlib.Path(fig_dir, "-".join(filter(None, (f"fig{figure}", *title.split())))
                            if title != "cifar10" else f"fig{figure}")
        save(canvas, name, {"figure": figure, "dataset": dataset, "setting": setting, "models": numbers,
                            "left_out": {run["dir"]: run["problem"] for run in left_out}})
        for model, panel in numbers.items():
            print_table(f"Figure {figure}, {model}, {title}", panel)
        print(f"drawn: {name}.pdf, .png and .json from {len(found)} runs")
        if not setting:
            full = sum(len(methods) * 10 for methods in FIGURES[figure][2].values())
            if len(found) < full:
                print(f"{len(found)} of the paper's {full} runs are there; the rest: bash runs.sh {target}")


def print_table(title, panel):
    print(f"{title}\n  {'method':22} {'n':>3} {'best accuracy %':>18} {'last accuracy %':>18} {'mean stability %':>20}")
    for method, m in panel["methods"].items():
        cells = [f"{m[k]['mean']:.{d}f}" + (f" ± {m[k]['sd']:.{d}f}" if m[k]["sd"] is not None else "")
                 for k, d in (("best_acc", 2), ("last_acc", 2), ("mean_stability", 3))]
        print(f"  {method:22} {m['best_acc']['n']:3} {cells[0]:>18} {cells[1]:>18} {cells[2]:>20}")
    c = panel["correlation_best_acc_stability"]
    print("  best accuracy against mean stability: n = " + str(c["n"]) + "".join(
        f", {k} {c[k][0]:.2f} (p = {c[k][1]:.2g})" if c[k] else f", {k} undefined" for k in ("pearson", "kendall")))


def save(canvas, name, numbers):
    """Writes name.pdf, name.png and name.json, each atomically."""
    for kind in ("pdf", "png"):
        partial = name.with_name(f"{name.name}.partial.{kind}")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            canvas.savefig(partial, dpi=200, metadata={"CreationDate": None} if kind == "pdf" else None)
            partial.replace(name.with_name(f"{name.name}.{kind}"))
        except OSError as error:
            raise train.UserError(f"cannot write {name}.{kind} ({error.strerror}): make room or name another --fig-dir",
                                  1) from None
    plt.close(canvas)
    train.write_json(name.with_name(f"{name.name}.json"), numbers)


# +--------------------------------------------------------------------------------------------------------------------+
# | Entry                                                                                                              |
# +--------------------------------------------------------------------------------------------------------------------+

def list_figures(log_dir):
    runs = find_runs(log_dir)
    for figure, (what, target, _) in FIGURES.items():
        settings, left_out = runs_of(figure, runs)
        print(f"--figure {figure}: {what}; from 'bash runs.sh {target}'")
        for (dataset, setting), found in settings.items():
            print(f"    {' '.join(filter(None, (dataset, setting)))}: {len(found)} finished runs")
        if left_out:
            print(f"    {len(left_out)} unfinished or damaged runs")


def main(argv=None):
    parser = train.OneLineParser(prog="analyze.py", description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", choices=FIGURES, help="the figure to draw")
    parser.add_argument("--list", action="store_true", help="list the figures and the runs there are for them")
    parser.add_argument("--log-dir", default="logs", help="(default: logs)")
    parser.add_argument("--fig-dir", default="figures", help="(default: figures)")
    try:
        args = parser.parse_args(argv)
        if not args.figure and not args.list:
            raise train.UserError("nothing to do: give --figure or --list")
        if args.list:
            list_figures(args.log_dir)
        if args.figure:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", category=scipy.stats.ConstantInputWarning)
                draw(args.figure, args.log_dir, args.fig_dir)
        return 0
    except train.UserError as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
