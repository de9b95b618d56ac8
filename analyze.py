#!/usr/bin/env python3
"""Reads the logs of runs, computes statistics and flatness, and draws the paper's figures.

    python analyze.py --figure 2              # from logs/ into figures/fig2.pdf, .png and .json
    python analyze.py --figure all --live     # everything there is, again while runs go on
    python analyze.py --figure stability --experiment mystudy    # a block of experiments.txt
    python analyze.py --flatness logs/cifar10/vgg11/L-r40/seed1 --eigs 30
    python analyze.py --export logs/cifar10/vgg11/L-r40/seed1    # network.pt2, network.onnx
    python analyze.py --list                  # what can be drawn, and from which runs

The runs of one figure differ in the method only; each data set and setting (width, schedule) has
its own, figures/fig2-<dataset>-<setting>. Below, a run is a dict from `summarize`, and groups are
runs by method, {method: [run]}.
"""
import argparse
from functools import cache, partial
import itertools
import json
import math
import pathlib
import re
import shlex
import sys
import time

import numpy as np

import appendix_figures
import train
from appendix_figures import (
    FLATNESS_SETTINGS, FORMS, MEASURES, PAPER, load_network, read_flatness)
from gst_ext import export, plots
from gst_ext.errors import (
    OneLineParser, UserError, check, format_value, print_line, report_error, seed_list)
from gst_ext.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, matplotlib
from gst_ext.rundir import load_checkpoint
from gst_ext.statistics import (
    KINDS, bootstrap_correlation, correlations, format_correlation, format_difference, format_mean,
    mean_ci, paired_differences, partial_correlation, summary_stats)

# +-- Configuration: the figures, their labels, how each method looks ----------------------------+

EXPERIMENTS = pathlib.Path(__file__).with_name("experiments.txt")
ALL_RUNS = None  # in place of an experiment
FIGURES = {  # name: (what it shows, the experiment whose runs it shows)
    "2": ("accuracy by epoch, and against mean stability", "fig2"),
    "3": ("accuracy, stability and their correlation by iterative rate", "fig3"),
    "4": ("accuracy and generalization gap against stability, SGD", "fig4"),
    "5": ("accuracy under noise instead of pruning", "fig5"),
    "6": ("stability and accuracy against Tr(H) and Tr(C)", "fig6"),
    "B1": ("activations of VGG19 before and after training", "figB1"),
    "B2": ("Figure 2 with the scores E[BN] and signed E[BN]", "figB2"),
    "C1": ("accuracy against mean stability at each rate", "fig3"),
    "C2": ("their Kendall correlation at each rate", "fig3"),
    "C3": ("Figure 4 at high stability", "figC3"),
    "D1": ("one weight under pruning and noise", "figD1"),
    "D2": ("accuracy under noise that is undone", "figD2"),
    "E1": ("first ten eigenvalues of the Hessian", "fig6"),
    "E2": ("first hundred eigenvalues of the Hessian", "fig6"),
    "E3": ("|ε| against stability, and accuracy against it", "fig6"),
    "E4": ("loss along the leading eigenvectors", "fig6"),
    "E5": ("TIC proxy against stability, and accuracy against it", "fig6"),
    "E6": ("accuracy against stability", "fig6"),
    "flatness": ("accuracy against every measure of flatness", "fig6"),
    "density": ("spectral density of the Hessian", "fig6"),
    "stability": ("accuracy against what pruning events do", ALL_RUNS),
    "compute": ("accuracy against the multiply-adds spent", ALL_RUNS),
    "depth": ("accuracy against the depth of drops, a line for each r", ALL_RUNS),
}
TABLES = {
    "C1": ("accuracy and stability at 46% and 59% total pruning", "tabC1"),
    "F1": ("CIFAR-100", "tabF1"),
    "depth": ("depth of the drops and frequency of the events, tested", ALL_RUNS),
}
OUTPUTS = FIGURES | {f"table {name}": entry for name, entry in TABLES.items()}
NEEDS_FLATNESS = ("6", "E1", "E2", "E3", "E4", "E5", "flatness", "density")
EVENTS = {  # {field of a run: label}
    "mean_stability": "Mean stability (%)", "loss_rise": "Rise in test loss at an event (nats)",
    "churn": "Churn at an event (%)", "min_stability": "Smallest stability (%)",
    "below_99": "Events below 99% stability"}
LABELS = {
    **EVENTS, "best_acc": "Best test accuracy (%)", "last_acc": "Last test accuracy (%)",
    "gap": "Train − test accuracy (points)", "compute": "Multiply-adds spent (% of no pruning's)",
    "events": "Pruning events", "converged": "Share of converged eigenpairs", **MEASURES,
    **{f"adaptive_{name}": f"Adaptive {label}" for name, label in MEASURES.items()}}
SUMMARY = {  # of tables: {field: (head, digits)}
    "best_acc": ("best accuracy (%)", 2), "last_acc": ("last accuracy (%)", 2),
    "mean_stability": ("mean stability (%)", 3)}
MACHINE = ("backend", "device", "threads", "instruction_set", "versions")  # decide last bits

TARGET_STYLES = {  # (colour, line, marker)
    "none": (BLACK, "-", "o"), "S": (BLUE, "--", "^"), "L": (RED, "-.", "D"),
    "R": (GREEN, (0, (4, 1, 1, 1, 1, 1)), "v"), "Q": (ORANGE, ":", "P")}
NOISE_STYLES = {  # by number of batches
    1: (ORANGE, ":", "s"), 89: (ORANGE, ":", "s"), 50: (SKY, "--", "^"), 630: (SKY, "--", "^"),
    1105: (BLUE, "-", "D"), 1220: (BLUE, "-", "D")}
MARKERS = "os^DvPX*<>ph8"  # a second method of one colour in a panel takes the next one
NAMES = {"vgg11": "VGG11", "vgg19": "VGG19", "resnet18": "ResNet18", "resnet20": "ResNet20",
         "resnet56": "ResNet56", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


# +-- Experiments and methods ---------------------------------------------------------------------+

METHOD_OPTIONS = (
    "model", "target", "r", "s", "e", "p", "score", "scratch", "prune_bn", "noise",
    "noise_batches", "noise_filters", "noise_restore", "test_batch_size", "optimizer")


@cache
def parse(line):
    return train.parse_options(shlex.split(line))


def read_experiments(path=EXPERIMENTS):
    """Reads experiments.txt: {experiment: {"lines": [options], "seeds": "1-3", "draw": ...}}."""
    blocks, block = {}, None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if re.fullmatch(r"\[.+\]", line):
            block = blocks[line[1:-1]] = {"lines": []}
        elif line and not line.startswith("#"):
            key, colon, value = line.partition(":")
            check(block is not None and (line.startswith("--") or colon),
                  f"{path}, line {number}: give a [heading], options of train.py or 'name: value'")
            if line.startswith("--"):
                block["lines"].append(line)
            else:
                block[key] = value.strip()
    return blocks


def block_options(block, preset):
    """Returns the options of each line of a block, under a preset or None."""
    more = f" --preset {preset} {block.get(preset, '')}" if preset else ""
    return [parse(line + more) for line in block["lines"]]


def used_options(options):
    """Returns a copy of options, None for those that make no difference to the run."""
    unused = [] if options.noise != "none" else [
        "noise_batches", "noise_filters", "noise_restore", "test_batch_size"]
    unused += ["r", "s", "e"] * (options.target == "none" or options.scratch)
    unused += ["p", "prune_bn"] * (options.target == "none")
    unused += ["score"] * (options.target in ("none", "R"))
    return argparse.Namespace(**vars(options) | dict.fromkeys(unused))


def method_key(options):
    """Returns what tells one method from another, a tuple."""
    used = vars(used_options(options))
    return tuple(format_value(used[name]) for name in METHOD_OPTIONS)


def method_label(options, rate):
    """Names a method: "Prune_S, r = 4 (1%)", and what differs from the model's defaults.

    Args:
        rate: The largest percentage of a layer that one event removes.
    """
    used = used_options(options)
    default = train.default_options(used.model, used.optimizer, used.preset) | {
        "target": "L", "noise_filters": "newest", "noise_restore": False}
    target, r, k, names = used.target, used.r, used.noise_batches, ["score", "s", "e", "p"]
    if target == "none":
        return "no pruning"
    if used.scratch:
        label = f"Prune_{target} at initialization"
    elif used.noise == "none":
        percent = f"{rate:.0f}%" if rate >= 0.95 else f"{rate:.1g}%"
        label = f"Prune_{target}, r = {r} ({percent})"
        label += ", batch norm kept" * (used.prune_bn == "keep")
    else:
        kind = "Zeroing" if used.noise == "zero" else "Gaussian noise"
        label = f"{kind}, {k} batch" + "es" * (k != 1)
        names += ["target", "r", "noise_filters", "noise_restore"]
    changed = {name: getattr(used, name) for name in names
               if getattr(used, name) not in (None, default.get(name))}
    return ", ".join([label, *(f"{name.replace('_', ' ')} {format_value(value)}"
                               for name, value in changed.items())])


def method_style(options):
    """Returns the (colour, line, marker) of a method, the same in every figure."""
    if options.noise != "none":
        return NOISE_STYLES.get(options.noise_batches, (GREEN, "-", "v"))
    if options.scratch:
        return PINK, ":", "P"
    if options.target == "S" and options.r in (4, 30):
        return SKY, "-", "s"
    if options.target == "S" and set(options.p) == {0.06}:  # of Figure C.3
        return ORANGE, "-", "s"
    return TARGET_STYLES[options.target if options.target == "none" else options.target[0]]


# +-- Runs: what their logs say, and which of them belong together --------------------------------+

# What reading a damaged log may raise.
DAMAGE = (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError)
ACCURACIES = {  # an accuracy in percent: (its count of right answers, of which images)
    "train_acc": ("train_correct", "train"), "test_acc_before": ("test_correct_before", "test"),
    "test_acc": ("test_correct", "test"), "val_acc": ("val_correct", "val")}


def identify(config):
    """Returns what config.json says of a run; options that an old log lacks have their defaults."""
    method, setting, logged = config["method"], config["setting"], config["options"]
    model, defaults = logged["model"], f"--model {logged['model']}"
    if config.get("own_model") and model not in train.PRUNABLE_BLOCKS:
        train.OWN_MODELS.setdefault(model, config["own_model"])
        defaults = ""  # its log has every option
    options = argparse.Namespace(**vars(parse(defaults)) | logged)
    options.preset = next((word for word in setting.split("-") if word in train.PRESETS), None)
    if type(method) is not str or type(options.seed) is not int:
        raise TypeError
    path = train.run_path(options).parts[-4:]
    logged_path = (*path[:2], "-".join(filter(None, (method, setting))), path[3])
    return {
        "config": config, "options": options, "model": model, "seed": options.seed,
        "dataset": path[0], "setting": setting, "paths": (logged_path, path),  # old or new names
        "key": method_key(options), "method": train.run_name(used_options(options))[0],
        "style": method_style(options)}


def add_counts(record, sizes):
    """Adds the counts of right answers that an old log lacks, and computes percentages from them.

    So equal ones are equal in every bit, which Kendall's correlation needs to count ties.

    Args:
        sizes: {split: number of images}, if known.
    """
    for accuracy, (count, split) in ACCURACIES.items():
        n, percent = sizes.get(split), record[accuracy]
        if n and percent is not None:
            nearest = round(percent * n / 100)
            if abs(percent * n / 100 - nearest) < 0.01:
                record.setdefault(count, nearest)
            if count in record:
                record[accuracy] = 100 * record[count] / n
    if record["stability"] is not None:
        fields = ("test_correct", "test_correct_before")
        if not all(field in record for field in fields):
            fields = ("test_acc", "test_acc_before")
        record["stability"] = 100 * record[fields[0]] / record[fields[1]]


def summarize(directory):
    """Reads a run's logs; raises nothing for bad ones.

    Returns:
        train.summarize_run's dict, and: problem, None or a line that says why the run is left out;
        dir, config, options (a Namespace), model, dataset, setting, seed; method, key, label and
        style: its method's name in JSON, what it is compared by, printed and drawn as; curve and
        before (epochs,): test accuracies, and those before events, else NaN; live: each block's
        live filters; best_correct, last_correct: right answers of `images`, or None.
    """
    directory = pathlib.Path(directory)
    run, records, what = {"dir": str(directory), "curve": []}, [], "config.json"
    try:
        config = json.loads((directory / what).read_text())
        sizes, num_epochs = dict(config.get("data", {})), config["schedule"]["epochs"]
        run |= identify(config)
        what = "epochs.jsonl"
        for number, line in enumerate((directory / what).read_text().splitlines(), 1):
            what = f"line {number} of epochs.jsonl"
            record = json.loads(line)
            check(record["epoch"] == number - 1, f"{what} is of epoch {record['epoch']}")
            for name, value in record.items():
                check(not isinstance(value, float) or math.isfinite(value),
                      f"{name} of epoch {number - 1} is {value}")
            add_counts(record, sizes)
            records.append(record)
        what, run["unfinished"] = "epochs.jsonl", len(records) != num_epochs
        check(records, f"unfinished, 0 of {num_epochs} epochs")
        run |= train.summarize_run(records, config)
        best, n, m = records[run["best_epoch"]], sizes.get("test"), sizes.get("train")
        right, trained_right = best.get("test_correct"), best.get("train_correct")
        if None not in (right, trained_right):  # one division, so that equal gaps are equal
            run["gap"] = 100 * (trained_right * n - right * m) / (m * n)
        filters = [layer["filters"] for layer in config.get("pruned_layers", ())]
        shares = [k / n for record in records for k, n in zip(record["removed"], filters)]
        # As removed: rounding to whole filters makes it more than the schedule's rate.
        rate = 100 * max(shares) if shares else config["iterative_rate"]
        run |= {
            "label": method_label(run["options"], rate), "below_99": run["below"]["99"],
            "best_correct": right, "last_correct": records[-1].get("test_correct"), "images": n,
            "live": records[-1].get("live"),
            "compute": run["macs_spent"] and 100 * run["macs_spent"] / run["macs_unpruned"],
            "curve": np.array([record["test_acc"] for record in records], float),
            "before": np.array([record["test_acc_before"] if any(record["removed"]) else np.nan
                                for record in records], float)}
        check(not run["unfinished"], f"unfinished, {len(records)} of {num_epochs} epochs")
        pruned = run["events"] or run["options"].target == "none"
        if run["options"].scratch:
            pruned = run["parameters"] != config.get("parameters", 0)
        check(pruned, "removed no filter, so it is a run without pruning")
        return run | {"problem": None}
    except UserError as error:
        return run | {"problem": str(error)}
    except DAMAGE as error:
        return run | {"problem": f"{what} is missing or damaged ({type(error).__name__})"}


def find_runs(log_dir):
    """Summarizes all runs below log_dir; misnamed, doubled or differing ones get a problem."""
    runs = [summarize(path.parent)
            for path in sorted(pathlib.Path(log_dir).glob("*/*/*/seed*/config.json"))]
    for run in runs:
        path = pathlib.Path(run["dir"]).absolute().parts[-4:]
        if path not in run.get("paths", [path]):
            logged = "/".join(run["paths"][0])
            run |= {"problem": f"its config.json is of {logged}", "unfinished": False}

    def setting_options(run):
        names = {*METHOD_OPTIONS, "seed", "dataset"} - {"optimizer"}
        options = train.experiment_options(run["options"])
        options["source of the model"] = (run["config"].get("own_model") or {}).get("crc32")
        return {name: value for name, value in options.items() if name not in names}

    fields = ("dataset", "setting", "model", "key", "seed")
    leave_out_differing(runs, fields[:2], lambda run: run["config"].get("data", {}))
    leave_out_differing(runs, fields[:3], setting_options)
    leave_out_differing(runs, fields[:4], lambda run: {
        "test_batch_size": run["options"].test_batch_size,
        "source of the score": run["config"].get("score_crc32")})
    seen = {}
    for run in runs:
        if not run["problem"]:
            first = seen.setdefault(tuple(run[field] for field in fields), run)
            if first is not run:
                run["problem"] = f"is the same run as {first['dir']}"
    return runs


def leave_out_differing(runs, fields, content):
    """Gives a problem to runs whose content(run), a dict, is not that of most with equal fields."""
    groups = {}
    for run in runs:
        if not run["problem"]:
            kinds = groups.setdefault(tuple(run[field] for field in fields), {})
            kinds.setdefault(json.dumps(content(run), sort_keys=True), []).append(run)
    for kinds in groups.values():
        usual = max(kinds.values(), key=len)[0]
        for run in itertools.chain(*kinds.values()):
            ours, theirs = content(run), content(usual)
            names = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
            if names:
                run["problem"] = f"differs from {usual['dir']} in {', '.join(names)}"


def setting_in(lines, setting):
    """Returns a setting without the optimizer, if that is the same on all lines."""
    same = len({line.optimizer for line in lines}) == 1
    return setting.removeprefix(lines[0].optimizer).lstrip("-") if same else setting


def select_runs(block, runs, live=False):
    """Finds the runs of an output by their options.

    Args:
        block: An experiment; ALL_RUNS stands for all that train without noise.
        live: Take unfinished runs, too.

    Returns:
        {(dataset, setting): {model: groups}}, without models of unpruned runs only, unless the
        experiment has no others; and the runs left out for a problem.
    """
    settings, left_out = {}, []
    for run in runs:
        if "key" in run:
            if block is ALL_RUNS:
                lines = [run["options"]] * (run["options"].noise == "none")
            else:
                lines = block_options(block, run["options"].preset)
            if run["key"] not in map(method_key, lines):
                continue
            place = run["dataset"], setting_in(lines, run["setting"]) if block else run["setting"]
        if run["problem"] and not (live and run.get("unfinished") and len(run["curve"])):
            left_out.append(run)
        else:
            settings.setdefault(place, []).append(run)
    selection = {}
    for place, members in settings.items():
        if block is ALL_RUNS:
            order = [run["options"] for run in members]
            order.sort(key=lambda o: (o.scratch, "nSQLR".index(o.target[0]), o.target, o.r or 0))
        else:
            order = block_options(block, members[0]["options"].preset)
        by_key = {method_key(options): [] for options in order}
        for run in members:
            by_key[run["key"]].append(run)
        models = {}
        for model in train.PRUNABLE_BLOCKS | train.OWN_MODELS:
            groups = {same[0]["method"]: same for same in by_key.values()
                      if same and same[0]["model"] == model}
            if set(groups) - {"none"} or groups and all(o.target == "none" for o in order):
                models[model] = groups
        if models:
            selection[place] = models
    return selection, left_out


def runs_in(models):
    return [run for groups in models.values() for runs in groups.values() for run in runs]


def finished(groups):
    """Returns the groups without the unfinished runs that --live adds."""
    return {method: done for method, runs in groups.items()
            if (done := [run for run in runs if not run["problem"]])}


def is_paper_setting(block, place):
    """Returns whether this (dataset, setting) is the paper's."""
    lines = block_options(block, None) if block else [parse("")]
    return place == (lines[0].dataset, setting_in(lines, train.run_name(lines[0])[1]))


def missing_runs(experiment, block, place, runs, log_dir="logs"):
    """Compares the runs of `place`, a (dataset, setting), with those of the experiment.

    Returns:
        How many there are, how many there should be, and the command that trains the rest.
    """
    options, seeds = runs[0]["options"], sorted({run["seed"] for run in runs})
    if is_paper_setting(block, place):
        seeds = seed_list(block.get("seeds", "1-10"))
    lines = {method_key(line): line for line in block_options(block, options.preset)}
    wanted = set(itertools.product(lines, seeds))
    missing = wanted - {(run["key"], run["seed"]) for run in runs}
    others = {"log_dir": log_dir} if log_dir != "logs" else {}
    for name, value in train.experiment_options(lines[runs[0]["key"]]).items():
        if name not in (*METHOD_OPTIONS, "seed") and getattr(options, name) != value:
            others[name] = getattr(options, name)
    span = f"{seeds[0]}-{seeds[-1]}"
    span = span if seed_list(span) == seeds else ",".join(map(str, seeds))
    command = ["bash", "runs.sh", experiment, "--seeds", span]
    command += ["--preset", options.preset] * bool(options.preset) + ["--"] * bool(others)
    for name, value in others.items():
        command.append(f"--{'no-' * (value is False)}{name.replace('_', '-')}")
        values = value if isinstance(value, list) else [value]
        command += [format_value(v) for v in values if not isinstance(v, bool)]
    return len(wanted) - len(missing), len(wanted), shlex.join(command)


def accuracy_correlations(runs, x, y="best_acc"):
    """Computes the `correlations` of the runs' x and y.

    The best accuracy is over the epochs since the last event, of which unpruned runs have more. So
    the correlations of other accuracies are added; "disagrees" lists the coefficients whose sign
    differs for the last accuracy.
    """
    def correlate(name):
        return correlations([run[x] for run in runs], [run[name] for run in runs])

    result = correlate(y)
    if y == "best_acc":
        result["by last_acc"] = last = correlate("last_acc")
        if all(run["val_chosen_acc"] is not None for run in runs):
            result["by val_chosen_acc"] = correlate("val_chosen_acc")
        result["disagrees"] = [kind for kind in KINDS if result[kind] and last[kind]
                               and result[kind][0] * last[kind][0] < 0]
    return result


def accuracy_differences(groups, which):
    """Returns paired_differences of "best" or "last" accuracies, of counts if known."""
    runs = list(itertools.chain(*groups.values()))
    field, total = f"{which}_correct", runs[0]["images"] if runs else 100
    if any(run[field] is None for run in runs):
        field, total = f"{which}_acc", 100
    return paired_differences({method: {run["seed"]: run[field] for run in same}
                               for method, same in groups.items()}, total)


def method_numbers(groups):
    """Returns what JSON says of the methods, and of the differences of runs with equal seeds.

    "disagree" lists the pairs whose best and last accuracies differ in opposite directions.
    """
    names = dict.fromkeys(("best_acc", "last_acc", "val_chosen_acc", "gap", "mean_stability"))
    names |= {name: None for name in LABELS
              if all(name in run for runs in groups.values() for run in runs)}
    methods = {method: {
        "label": runs[0]["label"], "iterative_rate": runs[0]["config"]["iterative_rate"],
        "seeds": [run["seed"] for run in runs], "runs": [run["dir"] for run in runs],
        **{name: summary_stats([run[name] for run in runs]) for name in names}}
        for method, runs in groups.items()}
    best, last = (accuracy_differences(groups, which) for which in ("best", "last"))
    return {"methods": methods, "paired_best_acc": best, "paired_last_acc": last,
            "disagree": [pair for pair in best if best[pair]["mean"] * last[pair]["mean"] < 0]}


def attach_flatness(runs, read):
    """Returns copies of runs with what read(directory), read_flatness, adds; some get a problem."""
    runs = [run | read(run["dir"]) for run in runs]
    leave_out_differing(runs, (), lambda run: {k: run["flat"].get(k) for k in FLATNESS_SETTINGS})
    return runs


# +-- Figures: functions of {model: groups}, which return a figure and its numbers by model ------+

def count_runs(lists):
    """Returns "n = 6", or "n = 2 to 6" for lists of runs of different lengths."""
    counts = sorted({len(runs) for runs in lists})
    return "n = " + " to ".join(map(str, counts[::len(counts) - 1 or 1]))


def draw_dynamics(axis, groups, title):
    """Draws each method's mean test accuracy by epoch; returns the numbers drawn."""
    numbers, curves = {}, []
    for method, runs in groups.items():
        length = min(len(run["curve"]) for run in runs)  # unfinished runs differ
        epochs = np.arange(1, length + 1)
        stability = np.mean([run["mean_stability"] for run in runs])
        numbers[method] = {"n": len(runs), "epoch": epochs.tolist(), **plots.plot_means(
            axis, epochs, mean_ci([run["curve"][:length] for run in runs]), runs[0]["style"],
            len(runs), bars=length == 1, label=f"{runs[0]['label']}: {stability:.2f}%")}
        before = np.mean([run["before"][:length] for run in runs], 0)
        curves.append((before, numbers[method]["mean"], runs[0]["style"][0]))
    plots.mark_drops(axis, curves)
    too_few = ", too few for a band" * all(len(runs) < 3 for runs in groups.values())
    axis.set(xlabel="Epoch", ylabel="Test accuracy (%)",
             title=f"{title}, {count_runs(groups.values())}{too_few}")
    plots.legend_below(axis, "Method: mean stability")
    return numbers


def draw_scatter(axis, groups, x="mean_stability", y="best_acc", baseline=False, short=False,
                 given=None):
    """Draws y against x, a point per run; states and returns the correlations.

    Args:
        baseline: Draw runs without pruning as points, too, instead of a line at their mean.
        given: A measure whose partial_correlation is stated, too.
    """
    points, colours, title, notes = [], [], [], []
    for method, runs in groups.items():
        colour, _, marker = runs[0]["style"]
        there = [run for run in runs if run.get(x) is not None and run.get(y) is not None]
        if method == "none" and not baseline:
            axis.axhline(np.mean([run[y] for run in runs]), color=colour, lw=0.8, ls=":",
                         label="no pruning (mean)")
        elif there:  # without points, a line that is not clipped would break the layout
            marker = MARKERS[(MARKERS.index(marker) + colours.count(colour)) % len(MARKERS)]
            axis.plot([run[x] for run in there], [run[y] for run in there], marker, color=colour,
                      ms=4, mec="white", mew=0.4, clip_on=False, label=runs[0]["label"])
            colours.append(colour)
            points += there
    result = {"x": x, "y": y, **accuracy_correlations(points, x, y)}
    if result.get("disagrees"):
        notes += ["by last accuracy:", *(
            format_correlation(result["by last_acc"], kind, True) for kind in KINDS)]
    if given:
        rest = partial_correlation(*([run[name] for run in points] for name in (x, y, given)))
        result[f"given {given}"] = rest
        stated = format_correlation(rest, "pearson", True) if rest else "undefined"
        title = [f"given {given}: {stated}"]
    moved, more = appendix_figures.flatness_notes(axis, points, x, y)
    result |= {"moved_by_rescaling": moved} if any(moved) else {}
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(axis="x", nbins=3 if short else 5)
    title = [f"n = {len(points)}" if points else "not in these logs",
             *(format_correlation(result, kind, short) for kind in KINDS), *title]
    axis.set(xlabel="\n".join([LABELS[x], *notes, *more]), ylabel=LABELS[y],
             title="\n".join(filter(None, title)))
    if not points:
        axis.set(xticks=[], yticks=[])
    return result


def dynamics_and_scatter(models):
    """Draws Figures 2 and B2. Unfinished runs are in the curves only."""
    (figure, axes), numbers = plots.subplots(2 * len(models)), {}
    for left, right, (model, groups) in zip(axes[::2], axes[1::2], models.items()):
        numbers[model] = {"dynamics": draw_dynamics(left, groups, NAMES.get(model, model)),
                          "scatters": [draw_scatter(right, finished(groups))]}
        plots.legend_below(right)
    return figure, numbers


def noise_dynamics(models):
    """Draws Figures 5 and D2: a panel for each kind of noise, each with pruning and baseline."""
    groups, dynamics, titles = models["vgg11"], {}, {"zero": "Zeroing", "gauss": "Gaussian noise"}
    noise = {method: runs[0]["options"].noise for method, runs in groups.items()}
    kinds = [kind for kind in titles if kind in noise.values()] or ["none"]
    figure, axes = plots.subplots(len(kinds), 2, 4.0, 6.75 / len(kinds))
    for axis, kind in zip(axes, kinds):
        shown = {m: runs for m, runs in groups.items() if noise[m] in (kind, "none")}
        dynamics |= draw_dynamics(axis, shown, titles.get(kind, "no noise"))
    return figure, {"vgg11": {"dynamics": dynamics}}


def by_rate(groups):
    """Returns {iterative rate in %: (r, groups)}; of r with equal rates, the first."""
    rates = {}
    for method, runs in groups.items():
        rate, r = runs[0]["config"]["iterative_rate"], runs[0]["options"].r
        if rates.setdefault(rate, (r, {}))[0] == r:
            rates[rate][1][method] = runs
    return dict(sorted(rates.items()))


def draw_rate_correlation(axis, rates, kind):
    """Draws the correlation of accuracy and stability at each rate; returns the numbers drawn."""
    numbers, drawn, last = {}, {}, {}
    for rate, (r, groups) in rates.items():
        runs = list(itertools.chain(*groups.values()))
        result = accuracy_correlations(runs, "mean_stability")
        bootstrap = bootstrap_correlation(
            [run["mean_stability"] for run in runs], [run["best_acc"] for run in runs], kind)
        numbers[f"{rate:.3g}"] = {"r": r, **result, f"{kind}_ci95_bootstrap": bootstrap}
        if result[kind]:
            ci = result[f"{kind}_ci95"] or [np.nan, np.nan]
            drawn[rate] = (result[kind][0], *ci, *bootstrap)
        if kind in result["disagrees"]:
            last[rate] = result["by last_acc"][kind][0]
    plots.plot_means(axis, list(drawn), np.array(list(drawn.values())).reshape(-1, 5).T,
                     TARGET_STYLES["none"], bars=True)
    axis.axhline(0, color="0.6", lw=0.6)
    axis.set(ylabel=f"{kind.title()} correlation of\naccuracy and stability", ylim=(-1.05, 1.05))
    scale_rates(axis, rates)
    if last:  # with another sign
        axis.plot(list(last), list(last.values()), "o", color=RED, mfc="white", ms=4,
                  label="by last accuracy")
        plots.legend_below(axis)
    return numbers


def scale_rates(axis, rates):
    low, high = min(rates) / 1.3, max(rates) * 1.3
    axis.set(xlabel="Iterative rate (%)", xlim=(low, high))
    axis.set_xscale("log", base=2)
    ticks = [2.0**i for i in range(-4, 8) if low <= 2.0**i <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def rates_figure(models):
    """Draws Figure 3."""
    rates = by_rate(models["vgg11"])
    figure, axes = plots.subplots(3, 3, 3.0, 2.25)
    inset = axes[1].inset_axes([0.24, 0.08, 0.42, 0.36])
    panels = (axes[0], "best_acc"), (axes[1], "mean_stability"), (inset, "mean_stability")
    for (axis, name), target in itertools.product(panels, "SRL"):
        values = {rate: [run[name] for run in runs] for rate, (_, groups) in rates.items()
                  for runs in groups.values() if runs[0]["options"].target == target}
        if values:
            plots.plot_means(axis, list(values), np.stack([mean_ci(v) for v in values.values()], 1),
                             TARGET_STYLES[target], [len(v) for v in values.values()], bars=True,
                             label=f"Prune$_{target}$")
        scale_rates(axis, rates)
        axis.set_ylabel(LABELS[name])
    plots.legend_outside(figure, axes[:2])
    means = [np.mean([run["mean_stability"] for run in runs])
             for _, groups in rates.values() for runs in groups.values()]
    top, reach = max(means), max(means) - np.median(means)
    inset.set(ylim=(top - 2.2 * reach - 1e-3, top + 0.3 * reach + 1e-3), xlabel="", ylabel="")
    inset.tick_params(labelsize=7, labelbottom=False)
    inset.set_title("high stability", pad=2)
    return figure, {"vgg11": {"by_rate": draw_rate_correlation(axes[2], rates, "pearson")}}


def rate_scatters(models):
    """Draws Figure C1: a panel for each rate."""
    rates, numbers = by_rate(models["vgg11"]), {}
    figure, axes = plots.subplots(len(rates), 4, 2.2, 6.75 / min(4, len(rates)))
    for axis, (rate, (r, groups)) in zip(axes, rates.items()):
        result = draw_scatter(axis, groups, short=True)
        axis.set_title(f"rate {rate:.3g}% (r = {r})\n{axis.get_title()}")
        axis.set_ylabel(LABELS["best_acc"] if axis in axes[::4] else "")
        numbers[f"{rate:.3g}"] = {"r": r, **method_numbers(groups), "scatters": [result]}
    plots.legend_outside(figure, axes, lambda label: label.partition(",")[0])
    return figure, {"vgg11": {"by_rate": numbers}}


def rate_kendall(models):
    """Draws Figure C2."""
    figure, (axis,) = plots.subplots(1, height=3.0)
    rates = by_rate(models["vgg11"])
    return figure, {"vgg11": {"by_rate": draw_rate_correlation(axis, rates, "kendall")}}


def scatters(models, pairs, columns=2, baseline=True, scratch=True, given=None):
    """Draws a panel of each (x, y) of `pairs` for each model.

    Args:
        baseline, given: As for draw_scatter.
        scratch: Draw runs that were pruned at initialization.
    """
    width = 3.375 if columns == 2 else 2.5
    figure, axes = plots.subplots(len(models) * len(pairs), columns, 2.9, width)
    numbers = {model: {"scatters": []} for model in models}
    for axis, (model, pair) in zip(axes, itertools.product(models, pairs)):
        groups = {method: runs for method, runs in models[model].items()
                  if scratch or not runs[0]["options"].scratch}
        result = draw_scatter(axis, groups, *pair, baseline, columns > 2, given)
        numbers[model]["scatters"].append(result)
        if len(models) > 1:
            axis.set_title(f"{NAMES.get(model, model)}: {axis.get_title()}")
    plots.legend_outside(figure, axes)
    return figure, numbers


DRAW = {  # {output: function}
    "2": dynamics_and_scatter, "B2": dynamics_and_scatter, "3": rates_figure, "C1": rate_scatters,
    "C2": rate_kendall, "5": noise_dynamics, "D2": noise_dynamics,
    "B1": appendix_figures.activation_histograms,
    "D1": appendix_figures.one_weight, "E4": appendix_figures.loss_along_eigenvectors,
    "E1": partial(appendix_figures.eigenvalues, first_ten=True),
    "E2": partial(appendix_figures.eigenvalues, first_ten=False),
    "density": appendix_figures.spectra,
    **dict.fromkeys(("4", "C3"), partial(scatters, baseline=False, pairs=[
        ("mean_stability", "best_acc"), ("mean_stability", "gap")])),
    **{name: partial(scatters, pairs=[pair for x in measures for pair in (
        ("mean_stability", x), (x, "best_acc"))]) for name, measures in (
        ("6", ("trace_eigs", "tr_c")), ("E3", ("epsilon_min",)), ("E5", ("tic",)))},
    "E6": partial(scatters, pairs=[("mean_stability", "best_acc")]),
    "flatness": partial(scatters, columns=4, pairs=[
        (form + name, "best_acc") for name in MEASURES for form in FORMS]),
    "stability": partial(scatters, columns=5, baseline=False, scratch=False, given="events", pairs=[
        (x, y) for y in ("best_acc", "last_acc") for x in EVENTS]),
    "compute": partial(scatters, pairs=[("compute", "best_acc"), ("compute", "last_acc")]),
    "depth": appendix_figures.depth_figure, "table depth": appendix_figures.depth_table,
    "table C1": partial(appendix_figures.table, columns=SUMMARY, compared=lambda a, b: (
        (a.target, a.r) == (b.target, b.r) and sum(a.p) > sum(b.p))),
    "table F1": partial(appendix_figures.table, columns=SUMMARY, compared=lambda a, b: (
        (a.target, b.target) == ("L", "S")))}


# +-- Entry ---------------------------------------------------------------------------------------+

def title_of(models, dataset):
    """Returns a title such as "VGG11, CIFAR-10, schedule × 0.598, bf16, n = 6"."""
    options = runs_in(models)[0]["options"]
    default = train.default_options(options.model, options.optimizer, options.preset)
    words = [" and ".join(NAMES.get(model, model) for model in models), NAMES.get(dataset, dataset)]
    words += [options.optimizer.upper()] * (
        options.optimizer != train.default_options(options.model).get("optimizer"))
    words += [f"preset {options.preset}"] * bool(options.preset)
    for name, value in train.experiment_options(options).items():
        if name not in (*METHOD_OPTIONS, "dataset") and value != default.get(name, value):
            name = "schedule ×" if name == "scale_epochs" else name.replace("_", " ")
            words.append(f"{name} {format_value(value)}".removeprefix("precision "))
    done = [runs for groups in models.values() for runs in finished(groups).values()]
    return ", ".join([*words, count_runs(done)] if done else words)


def draw(name, runs, arguments, read):
    """Draws an output for each data set and setting; raises UserError if there are no runs.

    Returns:
        Whether runs of it are unfinished.
    """
    _, experiment = OUTPUTS[name]
    own = arguments.experiment if experiment is ALL_RUNS else None
    experiment, label = experiment or own, f"Figure {name}" if name in FIGURES else name
    block = read_experiments().get(experiment)
    selection, left_out = select_runs(block, runs, arguments.live)
    selected = [run for models in selection.values() for run in runs_in(models)]
    unfinished = any(run.get("unfinished") for run in left_out + selected)
    if name in NEEDS_FLATNESS:
        selection, problems = select_runs(block, attach_flatness(selected, read))
        left_out += problems
    for run in left_out:
        print_line(f"left out: {run['dir']}: {run['problem']}")
    if name == "D1" or name == "B1" and not selection:  # need no runs
        selection = {("digits" if name == "D1" else "imagenet", ""): {}}
    check(selection or unfinished and arguments.live,
          f"no finished runs of {label} under {arguments.log_dir}/: train them with "
          f"'bash runs.sh {experiment or 'fig2'}', or name another --log-dir")
    files = {}
    for place, models in selection.items():
        papers, members = bool(models) and is_paper_setting(block, place), runs_in(models)
        file = "-".join(filter(None, [
            f"fig{name}" if name in FIGURES else name.replace("table ", "tab"), own,
            *([] if papers or name == "D1" else " ".join(place).split()),
            "train" if name in NEEDS_FLATNESS and arguments.split == "train" else ""]))
        first = files.setdefault(file, place)
        check(first == place, f"{label} of {' '.join(first)} and of {' '.join(place)} would both "
              f"be {file}: rename one data set, or move it to another --log-dir")
        more = {}
        if name in ("table C1", "table F1"):
            more = {"papers": PAPER[name, "resnet18"] if papers else None}
        elif name == "B1":
            more = {"log_dir": arguments.log_dir, "data_dir": arguments.data_dir}
        with matplotlib.rc_context(plots.RC_PARAMS):
            figure, numbers = DRAW[name](models, **more)
            title = title_of(models, place[0]) if models else next(iter(numbers.values()))["run"]
            if name in NEEDS_FLATNESS:
                flats = [run["flat"] for run in members]
                title += f"\nflatness: {appendix_figures.describe_flatness(flats, arguments.eigs)}"
            notes = [f"these runs differ in {name}" for name in MACHINE if len({
                json.dumps(run["config"][name]) for run in members if name in run["config"]}) > 1]
            for model, panel in numbers.items():
                if model in models:
                    panel = method_numbers(finished(models[model])) | panel
                panel["paper"] = PAPER.get((name, model)) if papers else None
                numbers[model] = panel
                print_numbers(f"{label}, {title}, {model}", panel)
                pairs = [label_pair(pair, panel["methods"]) for pair in panel.get("disagree", ())]
                if pairs:
                    notes.append(f"{NAMES.get(model, model)}, best and last accuracy differ in "
                                 f"sign: {'; '.join(pairs[:3])}" + " and more" * (len(pairs) > 3))
            plots.add_titles(figure, title, notes)
            plots.save(figure, pathlib.Path(arguments.fig_dir, file), {
                "figure": name, "dataset": place[0], "setting": place[1], "title": title,
                "notes": notes, "models": numbers,
                "left_out": {run["dir"]: run["problem"] for run in left_out}})
        print_line(f"drawn: {arguments.fig_dir}/{file}.pdf, .png and .json"
                   + f" from {len(members)} runs" * bool(members))
        if members and block:
            there, wanted, command = missing_runs(
                experiment, block, place, members, arguments.log_dir)
            if there < wanted:
                print_line(f"{there} of {wanted} runs are there; the rest: {command}")
    return unfinished


def print_numbers(title, panel):
    """Prints a panel's methods, differences and correlations."""
    print_line(title)
    methods, best, last, disagree = (panel.get(key, {}) for key in (
        "methods", "paired_best_acc", "paired_last_acc", "disagree"))
    rows = [[stats["label"], stats["best_acc"]["n"], *(
        format_mean(stats[key], digits) for key, (_, digits) in SUMMARY.items())]
        for stats in methods.values()]
    head = ["method", "n", *(name for name, _ in SUMMARY.values())]
    for label, *cells in [head, *rows] if rows else []:
        print_line(f"  {label:42} {cells[0]:>3}" + "".join(f" {c:>18}" for c in cells[1:]))
    for pair in best if len(best) <= 15 else disagree:
        print_line(f"  {label_pair(pair, methods)}, paired by seed: best accuracy "
                   f"{format_difference(best[pair])}, last {format_difference(last[pair])}"
                   + ": they disagree" * (pair in disagree))
    for line in panel.get("answers", []):
        print_line(f"  {line}")
    for numbers in panel.get("scatters", []):
        stated = [format_correlation(numbers, kind) for kind in KINDS if numbers[kind]]
        print_line(f"  {numbers['y']} against {numbers['x']}: n = {numbers['n']}, "
                   + (", ".join(stated) or "correlations undefined"))


def label_pair(pair, methods):
    """Returns "b minus a" with the methods' labels instead of their names in JSON."""
    return " minus ".join(methods[name]["label"] for name in pair.split(" minus "))


def list_outputs(log_dir):
    """Prints what can be drawn, and of how many runs."""
    check(log_dir == "logs" or pathlib.Path(log_dir).is_dir(),
          f"--log-dir {log_dir}: there is no such folder")
    runs, blocks = find_runs(log_dir), read_experiments()
    for name, (what, experiment) in OUTPUTS.items():
        source = f"'bash runs.sh {experiment}'" if experiment else "all runs"
        print_line(f"--{'figure ' * (name in FIGURES)}{name}: {what}; from {source}")
        selection, left_out = select_runs(blocks.get(experiment), runs)
        for place, models in selection.items():
            members, wanted = runs_in(models), ""
            if experiment:
                wanted = f"of {missing_runs(experiment, blocks[experiment], place, members)[1]} "
            print_line(f"    {' '.join(place).strip()}: {len(members)} {wanted}runs finished")
        if left_out:
            print_line(f"    {len(left_out)} unfinished or damaged runs")


def draw_all(names, arguments, read):
    """Draws outputs, with --live again while runs go on; prints a line for each that fails."""
    while True:
        runs, errors, unfinished = find_runs(arguments.log_dir), [], []
        for name in names:
            try:
                unfinished.append(draw(name, runs, arguments, read))
            except UserError as error:
                errors.append(error)
                if len(names) > 1:
                    print_line(f"{name}: {error}", sys.stderr)
        if len(names) == 1 == len(errors):
            raise errors[0]
        check(len(errors) < len(names), "nothing could be drawn")
        if not (arguments.live and any(unfinished)):
            return
        time.sleep(20)


def export_network(directory, takes, data_dir):
    """Writes a finished run's small network beside it (docs/export.md); prints the files."""
    path = pathlib.Path(directory)
    check((path / "done.json").exists(), f"{path} is not a finished run: train it to its end first")
    model, data, _ = load_network(path, data_dir, checkpoint="checkpoint.pt")
    noise = load_checkpoint(path / "checkpoint.pt", mmap=True)["noise"] or {}
    check(all(state["active"] is None for state in noise.values()), f"{path}: its noise is active "
          "to the end, which changes the network at every forward pass: export a run without it")
    files = export.save(model, path, data["test"][0].shape[1:3], data["classes"], data["mean"],
                        data["std"], takes)
    for file in files:
        print_line(f"{file}: {file.stat().st_size:,} bytes")
    if len(files) == 1:
        print_line("no network.onnx: pip install onnx onnxscript, then export again", sys.stderr)


def make_parser():
    parser = OneLineParser(prog="analyze.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to do").add_argument
    add("--figure", choices=[*FIGURES, "all"], nargs="+", default=[], metavar="NAME",
        help=f"{', '.join(FIGURES)}; or all, tables included")
    add("--table", choices=TABLES, nargs="+", default=[])
    add("--experiment", metavar="NAME", choices=read_experiments(), help="draw stability, "
        "compute and depth of this block of experiments.txt (default: of all runs)")
    add("--flatness", nargs="+", default=[], metavar="RUN_DIR",
        help="measure the flatness (E) of these runs into their flatness.json")
    add("--export", nargs="+", default=[], metavar="RUN_DIR", help="write the small networks of "
        "these runs alone, as network.pt2 and network.onnx (docs/export.md)")
    add("--takes", choices=("uint8", "float"), default="uint8", help="what exported networks take: "
        "uint8 images (n, h, w, 3), or normalised ones (n, 3, h, w) (default: uint8)")
    add("--model", type=train.model_name, metavar="FILE.py:FUNCTION", help="the network of your "
        "own that the runs named have trained")
    add("--list", action="store_true", help="list the figures and how many runs they have")
    add("--live", action="store_true", help="draw again every 20 s while runs go on")
    add = parser.add_argument_group("flatness, of the runs named or of a figure").add_argument
    add("--eigs", type=int, default=100, help="eigenvalues of the Hessian (default: 100)")
    add("--images", type=int, help="first images of the split (default: 512 to measure, and what "
        "was measured to draw)")
    add("--split", choices=("test", "train"), default="test", help="(default: test)")
    add("--eig", choices=("lanczos", "power"), default="lanczos",
        help="power is the paper's slower method (default: lanczos)")
    add("--control", action=argparse.BooleanOptionalAction, default=False,
        help="also measure the network rescaled by 1/2 and 2 (default: no)")
    add("--memory-gb", type=float, default=4, help="for graphs and activations; the eigenvectors "
        "need 4.3 * eigs copies of the network, too (default: 4)")
    add = parser.add_argument_group("folders").add_argument
    for name, default in (("log", "logs"), ("fig", "figures"), ("data", "data")):
        add(f"--{name}-dir", default=default, help=f"(default: {default})")
    return parser


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):  # a directory's name may not be printable
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = make_parser().parse_args(argv)
        names = arguments.figure + [f"table {name}" for name in arguments.table]
        names = list(OUTPUTS) if "all" in names else names
        check(names or arguments.list or arguments.flatness or arguments.export,
              "nothing to do: give --figure, --table, --flatness, --export or --list")
        check(names or not arguments.live, "--live draws again: give --figure, too")
        check(not arguments.experiment or any(OUTPUTS[name][1] is ALL_RUNS for name in names),
              "--experiment is for --figure stability, compute and depth, and --table depth")
        for name in ("eigs", "images", "memory_gb"):
            value = getattr(arguments, name)
            check(value is None or 0 < value < 1e6, f"--{name.replace('_', '-')} "
                  f"{format_value(value)}: give a number above 0 and below a million")
        measure = partial(
            appendix_figures.measure_flatness, split=arguments.split,
            images=arguments.images or 512, num_eigs=arguments.eigs, eigensolver=arguments.eig,
            memory_gb=arguments.memory_gb, control=arguments.control, data_dir=arguments.data_dir)
        if arguments.list:
            list_outputs(arguments.log_dir)
        for directory in arguments.flatness:
            measure(directory)
        for directory in arguments.export:
            export_network(directory, arguments.takes, arguments.data_dir)
        if names:
            draw_all(names, arguments, cache(partial(
                read_flatness, split=arguments.split, measure=measure, images=arguments.images)))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, "analyze.py", "figures drawn so far are complete")


if __name__ == "__main__":
    sys.exit(main())
