#!/usr/bin/env python3
"""Reads the logs of runs, computes statistics and flatness, and draws the paper's figures.

    python analyze.py --figure 2              # from logs/ into figures/fig2.pdf, .png and .json
    python analyze.py --figure all --live     # everything there is, again while runs go on
    python analyze.py --figure stability --experiment mystudy    # a block of experiments.txt
    python analyze.py --flatness logs/cifar10/vgg11/L-r40/seed1 --eigs 30
    python analyze.py --export logs/cifar10/vgg11/L-r40/seed1    # network.pt2, network.onnx
    python analyze.py --list                  # what can be drawn, and from which runs

The runs of one figure differ in the method only; each place, a (dataset, setting) such as a width
or schedule, has a figure of its own, figures/fig2-<dataset>-<setting>.
"""
# A run is a dict from `summarize`, groups are {method: [run]}, models {model: groups}.
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

import train
from appendix_figures import (
    FLATNESS_SETTINGS, FORMS, MEASURES, PAPER, SUMMARY, activation_histograms, depth_figure,
    depth_table, describe_flatness, eigenvalues, flatness_notes, load_network,
    loss_along_eigenvectors, means_table, measure_flatness, one_weight, read_flatness, spectra)
from gst_ext import export, plots
from gst_ext.errors import (
    OneLineParser, UserError, check, format_value, print_line, report_error, seed_list)
from gst_ext.plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, matplotlib
from gst_ext.rundir import load_checkpoint
from gst_ext.statistics import (
    KINDS, bootstrap_correlation, correlations, format_correlation, format_difference, format_mean,
    mean_ci, paired_differences, partial_correlation, summary_stats)

# +-- Names, labels, and how each method looks ----------------------------------------------------+

EXPERIMENTS = pathlib.Path(__file__).with_name("experiments.txt")
METHOD_OPTIONS = (
    "model", "target", "r", "s", "e", "p", "score", "scratch", "prune_bn", "noise",
    "noise_batches", "noise_filters", "noise_restore", "test_batch_size", "optimizer")
EVENTS = {  # {field of a run: label}
    "mean_stability": "Mean stability (%)", "loss_rise": "Rise in test loss at an event (nats)",
    "churn": "Churn at an event (%)", "min_stability": "Smallest stability (%)",
    "below_99": "Events below 99% stability"}
LABELS = {
    **EVENTS, "best_acc": "Best test accuracy (%)", "last_acc": "Last test accuracy (%)",
    "gap": "Train − test accuracy (points)", "compute": "Multiply-adds spent (% of no pruning's)",
    "events": "Pruning events", "converged": "Share of converged eigenpairs", **MEASURES,
    **{f"adaptive_{name}": f"Adaptive {label}" for name, label in MEASURES.items()}}
NAMES = {"vgg11": "VGG11", "vgg19": "VGG19", "resnet18": "ResNet18", "resnet20": "ResNet20",
         "resnet56": "ResNet56", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
         "zero": "Zeroing", "gauss": "Gaussian noise"}
TARGET_STYLES = {  # (colour, line, marker)
    "none": (BLACK, "-", "o"), "S": (BLUE, "--", "^"), "L": (RED, "-.", "D"),
    "R": (GREEN, (0, (4, 1, 1, 1, 1, 1)), "v"), "Q": (ORANGE, ":", "P")}
NOISE_STYLES = {  # by number of batches
    1: (ORANGE, ":", "s"), 89: (ORANGE, ":", "s"), 50: (SKY, "--", "^"), 630: (SKY, "--", "^"),
    1105: (BLUE, "-", "D"), 1220: (BLUE, "-", "D")}
MARKERS = "os^DvPX*<>ph8"  # a second method of one colour in a panel takes the next one
MACHINE = ("backend", "device", "threads", "instruction_set", "versions")  # decide last bits


# +-- Experiments and methods ---------------------------------------------------------------------+

@cache
def parse_line(line):
    return train.parse_options(shlex.split(line))


def read_experiments(path=EXPERIMENTS):
    """Reads experiments.txt: {experiment: {"lines": [str], "seeds": "1-3", "draw": ...}}."""
    blocks = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        line = line.strip()
        if re.fullmatch(r"\[.+\]", line):
            block = blocks[line[1:-1]] = {"lines": []}
        elif line.startswith("--") and blocks:
            block["lines"].append(line)
        elif line and not line.startswith("#"):
            key, colon, value = line.partition(":")
            check(blocks and colon, f"{path}, line {number}: give a [heading], options of train.py "
                  "or 'name: value'")
            block[key] = value.strip()
    return blocks


def block_options(block, preset):
    """Returns the options of each line of a block, under a preset or None."""
    more = f" --preset {preset} {block.get(preset, '')}" if preset else ""
    return [parse_line(line + more) for line in block["lines"]]


def used_options(options):
    """Returns a copy of options, None for those that the method does not use."""
    unused = train.unused_options(options)  # of an old log they may have values
    unused += ["test_batch_size"] * (options.noise == "none")
    unused += ["prune_bn"] * (options.target == "none")
    return argparse.Namespace(**vars(options) | dict.fromkeys(unused))


def method_key(options):
    """Returns what tells one method from another, a tuple."""
    used = vars(used_options(options))
    return tuple(format_value(used[name]) for name in METHOD_OPTIONS)


def setting_options(options):
    """Returns what else decides what a run computes, a dict."""
    return {name: value for name, value in train.experiment_options(options).items()
            if name not in (*METHOD_OPTIONS, "seed")}


def method_label(options, rate):
    """Names a method: "Prune_S, r = 4 (1%)", and what differs from the model's defaults.

    Args:
        rate: The largest percentage of a layer that one event removes.
    """
    used, names = used_options(options), ["score", "s", "e", "p"]
    if used.target == "none":
        return "no pruning"
    if used.scratch:
        label = f"Prune_{used.target} at initialization"
    elif used.noise == "none":
        percent = f"{rate:.0f}%" if rate >= 0.95 else f"{rate:.1g}%"
        label = f"Prune_{used.target}, r = {used.r} ({percent})"
        label += ", batch norm kept" * (used.prune_bn == "keep")
    else:
        label = f"{NAMES[used.noise]}, {used.noise_batches} batch"
        label += "es" * (used.noise_batches != 1)
        names += ["target", "r", "noise_filters", "noise_restore"]
    default = train.default_options(used.model, used.optimizer, used.preset) | {
        "target": "L", "noise_filters": "newest", "noise_restore": False}
    changed = [f"{name.replace('_', ' ')} {format_value(getattr(used, name))}" for name in names
               if getattr(used, name) not in (None, default.get(name))]
    return ", ".join([label, *changed])


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

def identify(config):
    """Returns what config.json says of a run; options that an old log lacks have their defaults."""
    logged, defaults = config["options"], f"--model {config['options']['model']}"
    if config.get("own_model") and logged["model"] not in train.PRUNABLE_BLOCKS:
        train.OWN_MODELS.setdefault(logged["model"], config["own_model"])
        defaults = ""  # its log has every option
    options = argparse.Namespace(**vars(parse_line(defaults)) | logged)
    words = config["setting"].split("-")
    options.preset = next((word for word in words if word in train.PRESETS), None)
    path = train.run_path(options).parts[-4:]  # as it would be named today, and as it was then
    logged_name = "-".join(filter(None, (config["method"], config["setting"])))
    return {
        "config": config, "options": options, "model": options.model, "seed": options.seed,
        "dataset": path[0], "setting": config["setting"], "key": method_key(options),
        "method": train.run_name(used_options(options))[0], "style": method_style(options),
        "paths": ((*path[:2], logged_name, path[3]), path)}


def add_counts(record, sizes):
    """Adds the counts of right answers that an old log lacks, and computes percentages from them.

    So equal ones are equal in every bit, which Kendall's correlation needs to count ties.

    Args:
        sizes: {split: number of images}, if known.
    """
    for accuracy in ("train_acc", "test_acc_before", "test_acc", "val_acc"):
        count, n = accuracy.replace("acc", "correct"), sizes.get(accuracy.partition("_")[0])
        if n and record[accuracy] is not None:
            exact = record[accuracy] * n / 100
            if abs(exact - round(exact)) < 0.01:
                record.setdefault(count, round(exact))
            if count in record:
                record[accuracy] = 100 * record[count] / n
    if record["stability"] is not None:
        counted = {"test_correct", "test_correct_before"} <= record.keys()
        name = "test_correct" if counted else "test_acc"
        record["stability"] = 100 * record[name] / record[f"{name}_before"]


def summarize(directory):
    """Reads a run's logs; raises nothing for bad ones.

    Returns:
        train.summarize_run's dict, and: problem, None or why the run is left out; dir, config,
        options (a Namespace), model, dataset, setting, seed; method, key, label and style: its
        method's name in JSON, what it is compared by, printed and drawn as; curve and before
        (epochs,): test accuracies, and those before events, else NaN; live: each block's live
        filters; best_correct, last_correct: right answers of `images`, or None.
    """
    directory = pathlib.Path(directory)
    run = {"dir": str(directory), "curve": [], "unfinished": False}
    records, file = [], "config.json"
    try:
        config = json.loads((directory / file).read_text())
        sizes, num_epochs = dict(config.get("data", {})), config["schedule"]["epochs"]
        run |= identify(config)
        check(directory.absolute().parts[-4:] in run["paths"],
              f"its config.json is of {'/'.join(run['paths'][0])}")
        file = "epochs.jsonl"
        for number, line in enumerate((directory / file).read_text().splitlines(), 1):
            file = f"line {number} of epochs.jsonl"
            record = json.loads(line)
            check(record["epoch"] == number - 1, f"{file} is of epoch {record['epoch']}")
            for name, value in record.items():
                check(not isinstance(value, float) or math.isfinite(value),
                      f"{name} of epoch {number - 1} is {value}")
            add_counts(record, sizes)
            records.append(record)
        file, run["unfinished"] = "epochs.jsonl", len(records) != num_epochs
        unfinished = f"unfinished, {len(records)} of {num_epochs} epochs"
        check(records, unfinished)
        run |= train.summarize_run(records, config)
        best, last = records[run["best_epoch"]], records[-1]
        if "test_correct" in best and "train_correct" in best:  # one division: equal ones are equal
            n, m = sizes["train"], sizes["test"]
            run["gap"] = 100 * (best["train_correct"] * m - best["test_correct"] * n) / (n * m)
        filters = [layer["filters"] for layer in config.get("pruned_layers", ())]
        shares = [k / n for record in records for k, n in zip(record["removed"], filters)]
        # As removed: rounding to whole filters makes it more than the schedule's rate.
        rate = 100 * max(shares) if shares else config["iterative_rate"]
        run |= {
            "label": method_label(run["options"], rate), "below_99": run["below"]["99"],
            "best_correct": best.get("test_correct"), "last_correct": last.get("test_correct"),
            "images": sizes.get("test"), "live": last.get("live"),
            "compute": run["macs_spent"] and 100 * run["macs_spent"] / run["macs_unpruned"],
            "curve": np.array([record["test_acc"] for record in records], float),
            "before": np.array([record["test_acc_before"] if any(record["removed"]) else np.nan
                                for record in records], float)}
        check(not run["unfinished"], unfinished)
        pruned = run["events"] or run["options"].target == "none"
        if run["options"].scratch:
            pruned = run["parameters"] != config.get("parameters", 0)
        check(pruned, "removed no filter, so it is a run without pruning")
        return run | {"problem": None}
    except UserError as error:
        return run | {"problem": str(error)}
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        return run | {"problem": f"{file} is missing or damaged ({type(error).__name__})"}


def find_runs(log_dir):
    """Summarizes all runs below log_dir; doubled or differing ones get a problem."""
    runs = [summarize(path.parent)
            for path in sorted(pathlib.Path(log_dir).glob("*/*/*/seed*/config.json"))]

    fields = ("dataset", "setting", "model", "key", "seed")
    leave_out_differing(runs, fields[:2], lambda run: run["config"].get("data", {}))
    leave_out_differing(runs, fields[:3], lambda run: {
        **setting_options(run["options"]),
        "dataset": run["dataset"],  # by whatever path
        "source of the model": (run["config"].get("own_model") or {}).get("crc32")})
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
    alike = {}
    for run in runs:
        if not run["problem"]:
            contents = alike.setdefault(tuple(run[field] for field in fields), {})
            contents.setdefault(json.dumps(content(run), sort_keys=True), []).append(run)
    for contents in alike.values():
        usual = max(contents.values(), key=len)[0]
        for run in itertools.chain(*contents.values()):
            ours, theirs = content(run), content(usual)
            names = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
            if names:
                run["problem"] = f"differs from {usual['dir']} in {', '.join(names)}"


def setting_in(wanted, setting):
    """Returns a setting without the optimizer that all wanted share: models whose default it is do
    not name it."""
    same = len({options.optimizer for options in wanted}) == 1
    return setting.removeprefix(wanted[0].optimizer).lstrip("-") if same else setting


def select_runs(block, runs, live=False):
    """Finds the runs of an output by their options.

    Args:
        block: Of experiments.txt; None stands for all runs without noise.
        live: Take unfinished runs, too.

    Returns:
        {place: models}, without models that have unpruned runs only, unless nothing else is wanted;
        and the runs left out for a problem.
    """
    known = [*train.PRUNABLE_BLOCKS, *train.OWN_MODELS]
    places, selected, left_out = {}, [], []
    for run in runs:
        if "options" not in run:  # config.json is damaged
            left_out.append(run)
            continue
        options, setting = run["options"], run["setting"]
        if block:
            wanted = block_options(block, options.preset)
            keys = [method_key(line) for line in wanted]
            if run["key"] not in keys:
                continue
            order, setting = keys.index(run["key"]), setting_in(wanted, setting)
        else:
            if options.noise != "none":
                continue
            target = options.target
            order = options.scratch, "nSQLR".index(target[0]), target, options.r or 0
        if run["problem"] and not (live and run["unfinished"] and len(run["curve"])):
            left_out.append(run)
        else:
            place = run["dataset"], setting
            places[place] = {}
            selected.append((known.index(run["model"]), order, place, run))
    for *_, place, run in sorted(selected, key=lambda entry: entry[:2]):
        groups = places[place].setdefault(run["model"], {})
        groups.setdefault(run["method"], []).append(run)
    no_others = not block or all(line.target == "none" for line in block_options(block, None))
    for place, models in places.items():
        pruned = {model: groups for model, groups in models.items() if groups.keys() - {"none"}}
        places[place] = pruned or models if no_others else pruned
    return {place: models for place, models in places.items() if models}, left_out


def runs_in(nested):
    """Lists the runs of groups or of models."""
    if isinstance(nested, list):
        return nested
    return [run for part in nested.values() for run in runs_in(part)]


def finished(groups):
    """Returns the groups without the unfinished runs that --live adds."""
    return {method: done for method, runs in groups.items()
            if (done := [run for run in runs if not run["problem"]])}


def is_paper_setting(block, place):
    """Returns whether this place is the paper's."""
    wanted = block_options(block, None) if block else [parse_line("")]
    return place == (wanted[0].dataset, setting_in(wanted, train.run_name(wanted[0])[1]))


def missing_runs(experiment, block, place, runs, log_dir="logs"):
    """Compares the runs of a place with those of the experiment.

    Returns:
        How many there are, how many there should be, and the command that trains the rest.
    """
    options, seeds = runs[0]["options"], sorted({run["seed"] for run in runs})
    if is_paper_setting(block, place):
        seeds = seed_list(block.get("seeds", "1-10"))
    wanted = {method_key(line): line for line in block_options(block, options.preset)}
    missing = {*itertools.product(wanted, seeds)} - {(run["key"], run["seed"]) for run in runs}
    others = {"log_dir": log_dir} if log_dir != "logs" else {}
    for name, value in setting_options(wanted[runs[0]["key"]]).items():
        if getattr(options, name) != value:
            others[name] = getattr(options, name)
    span = f"{seeds[0]}-{seeds[-1]}"
    span = span if seed_list(span) == seeds else ",".join(map(str, seeds))
    command = ["bash", "runs.sh", experiment, "--seeds", span]
    command += ["--preset", options.preset] * bool(options.preset) + ["--"] * bool(others)
    for name, value in others.items():
        command.append(f"--{'no-' * (value is False)}{name.replace('_', '-')}")
        values = value if isinstance(value, list) else [value]
        command += [format_value(v) for v in values if not isinstance(v, bool)]
    total = len(wanted) * len(seeds)
    return total - len(missing), total, shlex.join(command)


def accuracy_correlations(runs, x, y="best_acc"):
    """Computes the `correlations` of the runs' x and y.

    Which epoch is best depends on the test accuracy. So the correlations of other accuracies are
    added to those of the best one; "disagrees" lists the coefficients whose sign differs by the
    last accuracy.
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
    runs = runs_in(groups)
    field, total = f"{which}_acc", 100
    if runs and all(run[f"{which}_correct"] is not None for run in runs):
        field, total = f"{which}_correct", runs[0]["images"]
    return paired_differences({method: {run["seed"]: run[field] for run in runs}
                               for method, runs in groups.items()}, total)


def method_numbers(groups):
    """Returns what JSON says of the methods, and of the differences of runs with equal seeds.

    "disagree" lists the pairs whose best and last accuracies differ in opposite directions.
    """
    names = [name for name in ("val_chosen_acc", *LABELS)
             if all(name in run for run in runs_in(groups))]
    methods = {method: {
        "label": runs[0]["label"], "iterative_rate": runs[0]["config"]["iterative_rate"],
        "seeds": [run["seed"] for run in runs], "runs": [run["dir"] for run in runs],
        **{name: summary_stats([run[name] for run in runs]) for name in names}}
        for method, runs in groups.items()}
    best, last = (accuracy_differences(groups, which) for which in ("best", "last"))
    return {"methods": methods, "paired_best_acc": best, "paired_last_acc": last,
            "disagree": [pair for pair in best if best[pair]["mean"] * last[pair]["mean"] < 0]}


def attach_flatness(runs, flatness_of):
    """Returns copies of runs with what flatness_of(directory) says of them (read_flatness); those
    that were measured otherwise get a problem."""
    runs = [run | flatness_of(run["dir"]) for run in runs]
    leave_out_differing(runs, (), lambda run: {k: run["flat"].get(k) for k in FLATNESS_SETTINGS})
    return runs


# +-- Figures: functions of models, which return a figure and its numbers by model ----------------+

def count_runs(lists):
    """Returns "n = 6", or "n = 2 to 6" for lists of runs of different lengths."""
    counts = [len(runs) for runs in lists]
    return f"n = {min(counts)}" + f" to {max(counts)}" * (max(counts) > min(counts))


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
        baseline: Draw runs without events as points, too, instead of a line at the mean of those
            without pruning.
        short: State coefficients without names and p.
        given: A measure whose partial_correlation is stated, too.
    """
    points, colours = [], []
    for method, runs in groups.items():
        colour, _, marker = runs[0]["style"]
        shown = [run for run in runs if run[x] is not None and run[y] is not None]
        if method == "none" and not baseline:
            axis.axhline(np.mean([run[y] for run in runs]), color=colour, lw=0.8, ls=":",
                         label="no pruning (mean)")
        elif shown and (baseline or not runs[0]["options"].scratch):
            # (An empty line that is not clipped would break the layout.)
            marker = MARKERS[(MARKERS.index(marker) + colours.count(colour)) % len(MARKERS)]
            axis.plot([run[x] for run in shown], [run[y] for run in shown], marker, color=colour,
                      ms=4, mec="white", mew=0.4, clip_on=False, label=runs[0]["label"])
            colours.append(colour)
            points += shown
    result = {"x": x, "y": y, **accuracy_correlations(points, x, y)}
    title = [f"n = {len(points)}" if points else "not in these logs",
             *(format_correlation(result, kind, short) for kind in KINDS)]
    below = [LABELS[x]]
    if result.get("disagrees"):
        below += ["by last accuracy:", *(
            format_correlation(result["by last_acc"], kind, True) for kind in KINDS)]
    if given:
        rest = partial_correlation(*([run[name] for run in points] for name in (x, y, given)))
        result[f"given {given}"] = rest
        title.append(f"given {given}: "
                     + (format_correlation(rest, "pearson", True) if rest else "undefined"))
    moved, notes = flatness_notes(axis, points, x, y)
    if any(moved):
        result["moved_by_rescaling"] = moved
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(axis="x", nbins=3 if short else 5)
    axis.set(xlabel="\n".join(below + notes), ylabel=LABELS[y],
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
    groups, numbers = models["vgg11"], {}
    noise = {method: runs[0]["options"].noise for method, runs in groups.items()}
    kinds = [kind for kind in ("zero", "gauss") if kind in noise.values()] or ["none"]
    figure, axes = plots.subplots(len(kinds), 2, 4.0, 6.75 / len(kinds))
    for axis, kind in zip(axes, kinds):
        shown = {m: runs for m, runs in groups.items() if noise[m] in (kind, "none")}
        numbers |= draw_dynamics(axis, shown, NAMES.get(kind, "no noise"))
    return figure, {"vgg11": {"dynamics": numbers}}


def by_rate(groups):
    """Returns {iterative rate in %: (r, groups)}; of r with equal rates, the first."""
    rates = {}
    for method, runs in groups.items():
        rate, r = runs[0]["config"]["iterative_rate"], runs[0]["options"].r
        if rates.setdefault(rate, (r, {}))[0] == r:
            rates[rate][1][method] = runs
    return dict(sorted(rates.items()))


def scale_rates(axis, rates):
    low, high = min(rates) / 1.3, max(rates) * 1.3
    axis.set(xlabel="Iterative rate (%)", xlim=(low, high))
    axis.set_xscale("log", base=2)
    ticks = [2.0**i for i in range(-4, 8) if low <= 2.0**i <= high]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def draw_rate_correlation(axis, rates, kind):
    """Draws the correlation of accuracy and stability at each rate; returns the numbers drawn."""
    numbers, drawn, by_last = {}, {}, {}
    for rate, (r, groups) in rates.items():
        runs = runs_in(groups)
        result = accuracy_correlations(runs, "mean_stability")
        bootstrap = bootstrap_correlation(
            [run["mean_stability"] for run in runs], [run["best_acc"] for run in runs], kind)
        numbers[f"{rate:.3g}"] = {"r": r, **result, f"{kind}_ci95_bootstrap": bootstrap}
        if result[kind]:
            ci = result[f"{kind}_ci95"] or [np.nan, np.nan]
            drawn[rate] = (result[kind][0], *ci, *bootstrap)
        if kind in result["disagrees"]:
            by_last[rate] = result["by last_acc"][kind][0]
    plots.plot_means(axis, list(drawn), np.array(list(drawn.values())).reshape(-1, 5).T,
                     TARGET_STYLES["none"], bars=True)
    axis.axhline(0, color="0.6", lw=0.6)
    axis.set(ylabel=f"{kind.title()} correlation of\naccuracy and stability", ylim=(-1.05, 1.05))
    scale_rates(axis, rates)
    if by_last:
        axis.plot(list(by_last), list(by_last.values()), "o", color=RED, mfc="white", ms=4,
                  label="by last accuracy")
        plots.legend_below(axis)
    return numbers


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


def scatters(models, pairs, columns=2, baseline=True, given=None):
    """Draws a panel of each (x, y) of `pairs` for each model; baseline, given: see draw_scatter."""
    width = 3.375 if columns == 2 else 2.5
    figure, axes = plots.subplots(len(models) * len(pairs), columns, 2.9, width)
    numbers = {model: {"scatters": []} for model in models}
    for axis, (model, pair) in zip(axes, itertools.product(models, pairs)):
        numbers[model]["scatters"].append(
            draw_scatter(axis, models[model], *pair, baseline, columns > 2, given))
        if len(models) > 1:
            axis.set_title(f"{NAMES.get(model, model)}: {axis.get_title()}")
    plots.legend_outside(figure, axes)
    return figure, numbers


def measure_scatters(*measures):
    """Returns the function that draws measures of flatness against stability, and accuracy against
    them."""
    return partial(scatters, pairs=[
        pair for x in measures for pair in (("mean_stability", x), (x, "best_acc"))])


# +-- Outputs: name: (what it shows, the experiment whose runs it takes or None, function) --------+

stability_and_gap = partial(scatters, baseline=False, pairs=[
    ("mean_stability", "best_acc"), ("mean_stability", "gap")])
FIGURES = {
    "2": ("accuracy by epoch, and against mean stability", "fig2", dynamics_and_scatter),
    "3": ("accuracy, stability and their correlation by iterative rate", "fig3", rates_figure),
    "4": ("accuracy and generalization gap against stability, SGD", "fig4", stability_and_gap),
    "5": ("accuracy under noise instead of pruning", "fig5", noise_dynamics),
    "6": ("stability and accuracy against Tr(H) and Tr(C)", "fig6",
          measure_scatters("trace_eigs", "tr_c")),
    "B1": ("activations of VGG19 before and after training", "figB1", activation_histograms),
    "B2": ("Figure 2 with the scores E[BN] and signed E[BN]", "figB2", dynamics_and_scatter),
    "C1": ("accuracy against mean stability at each rate", "fig3", rate_scatters),
    "C2": ("their Kendall correlation at each rate", "fig3", rate_kendall),
    "C3": ("Figure 4 at high stability", "figC3", stability_and_gap),
    "D1": ("one weight under pruning and noise", "figD1", one_weight),
    "D2": ("accuracy under noise that is undone", "figD2", noise_dynamics),
    "E1": ("first ten eigenvalues of the Hessian", "fig6", partial(eigenvalues, first_ten=True)),
    "E2": ("first hundred eigenvalues of the Hessian", "fig6",
           partial(eigenvalues, first_ten=False)),
    "E3": ("|ε| against stability, and accuracy against it", "fig6",
           measure_scatters("epsilon_min")),
    "E4": ("loss along the leading eigenvectors", "fig6", loss_along_eigenvectors),
    "E5": ("TIC proxy against stability, and accuracy against it", "fig6",
           measure_scatters("tic")),
    "E6": ("accuracy against stability", "fig6",
           partial(scatters, pairs=[("mean_stability", "best_acc")])),
    "flatness": ("accuracy against every measure of flatness", "fig6", partial(
        scatters, columns=4, pairs=[
            (form + name, "best_acc") for name in MEASURES for form in FORMS])),
    "density": ("spectral density of the Hessian", "fig6", spectra),
    "stability": ("accuracy against what pruning events do", None, partial(
        scatters, columns=5, baseline=False, given="events", pairs=[
            (x, y) for y in ("best_acc", "last_acc") for x in EVENTS])),
    "compute": ("accuracy against the multiply-adds spent", None, partial(
        scatters, pairs=[("compute", "best_acc"), ("compute", "last_acc")])),
    "depth": ("accuracy against the depth of drops, a line for each r", None, depth_figure),
}
TABLES = {
    "C1": ("accuracy and stability at 46% and 59% total pruning", "tabC1", partial(
        means_table, compared=lambda a, b: (
            (a.target, a.r) == (b.target, b.r) and sum(a.p) > sum(b.p)))),
    "F1": ("CIFAR-100", "tabF1", partial(
        means_table, compared=lambda a, b: (a.target, b.target) == ("L", "S"))),
    "depth": ("depth of the drops and frequency of the events, tested", None, depth_table),
}
OUTPUTS = FIGURES | {f"table {name}": entry for name, entry in TABLES.items()}
NEEDS_FLATNESS = ("6", "E1", "E2", "E3", "E4", "E5", "flatness", "density")
NEEDS_NO_RUNS = {"B1": "imagenet", "D1": "digits"}  # name: its data set


# +-- Entry ---------------------------------------------------------------------------------------+

def title_of(models, dataset):
    """Returns a title such as "VGG11, CIFAR-10, schedule × 0.598, bf16, n = 6"."""
    options = runs_in(models)[0]["options"]
    default = train.default_options(options.model, options.optimizer, options.preset)
    words = [" and ".join(NAMES.get(model, model) for model in models), NAMES.get(dataset, dataset)]
    if options.optimizer != train.default_options(options.model).get("optimizer"):
        words.append(options.optimizer.upper())
    if options.preset:
        words.append(f"preset {options.preset}")
    for name, value in setting_options(options).items():
        if name != "dataset" and value != default.get(name, value):
            name = "schedule ×" if name == "scale_epochs" else name.replace("_", " ")
            words.append(f"{name} {format_value(value)}".removeprefix("precision "))
    done = [runs for groups in models.values() for runs in finished(groups).values()]
    return ", ".join([*words, count_runs(done)] if done else words)


def draw(name, runs, arguments, flatness_of):
    """Draws an output for each place; returns whether runs of it are unfinished.

    Raises:
        UserError: There are no runs to draw.
    """
    _, experiment, draw_models = OUTPUTS[name]
    own = None if experiment else arguments.experiment
    experiment = experiment or own
    label, file_name = (f"Figure {name}", f"fig{name}") if name in FIGURES else (
        name, name.replace("table ", "tab"))
    block = read_experiments().get(experiment)
    selection, left_out = select_runs(block, runs, arguments.live)
    selected = runs_in(selection)
    unfinished = any(run["unfinished"] for run in left_out + selected)
    if name in NEEDS_FLATNESS:
        selection, problems = select_runs(block, attach_flatness(selected, flatness_of))
        left_out += problems
    for run in left_out:
        print_line(f"left out: {run['dir']}: {run['problem']}")
    if name in NEEDS_NO_RUNS and not selection:
        selection = {(NEEDS_NO_RUNS[name], ""): {}}
    check(selection or unfinished and arguments.live,
          f"no finished runs of {label} under {arguments.log_dir}/: train them with "
          f"'bash runs.sh {experiment or 'fig2'}', or name another --log-dir")
    files = {}
    for place, models in selection.items():
        as_paper, members = bool(models) and is_paper_setting(block, place), runs_in(models)
        file = "-".join(filter(None, [
            file_name, own, *([] if as_paper or name == "D1" else place),
            "train" * (name in NEEDS_FLATNESS and arguments.split == "train")])).replace(" ", "-")
        first = files.setdefault(file, place)
        check(first == place, f"{label} of {' '.join(first)} and of {' '.join(place)} would both "
              f"be {file}: rename one data set, or move it to another --log-dir")
        more = {}
        if name in ("table C1", "table F1"):
            more = {"paper": PAPER[name, "resnet18"] if as_paper else {}}
        elif name == "B1":
            more = {"data_dir": arguments.data_dir}
        with matplotlib.rc_context(plots.RC_PARAMS):
            figure, numbers = draw_models(models, **more)
            title = title_of(models, place[0]) if models else next(iter(numbers.values()))["run"]
            if name in NEEDS_FLATNESS:
                flats = [run["flat"] for run in members]
                title += f"\nflatness: {describe_flatness(flats, arguments.eigs)}"
            notes = [f"these runs differ in {field}" for field in MACHINE if len({
                json.dumps(run["config"][field]) for run in members if field in run["config"]}) > 1]
            for model in models:
                panel = numbers[model] = method_numbers(finished(models[model])) | numbers[model]
                panel["paper"] = PAPER.get((name, model)) if as_paper else None
                print_numbers(f"{label}, {title}, {model}", panel)
                pairs = [label_pair(pair, panel["methods"]) for pair in panel["disagree"]]
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
            found, total, command = missing_runs(
                experiment, block, place, members, arguments.log_dir)
            if found < total:
                print_line(f"{found} of {total} runs are there; the rest: {command}")
    return unfinished


def print_numbers(title, panel):
    """Prints a panel's methods, differences and correlations."""
    methods, best, last, disagree = (panel[key] for key in (
        "methods", "paired_best_acc", "paired_last_acc", "disagree"))
    heads = "".join(f" {head + ' (%)':>18}" for head, _ in SUMMARY.values())
    print_line(f"{title}\n  {'method':42} {'n':>3}{heads}")
    for stats in methods.values():
        means = "".join(f" {format_mean(stats[key], digits):>18}"
                        for key, (_, digits) in SUMMARY.items())
        print_line(f"  {stats['label']:42} {stats['best_acc']['n']:>3}{means}")
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
    for name, (what, experiment, _) in OUTPUTS.items():
        source = f"'bash runs.sh {experiment}'" if experiment else "all runs"
        print_line(f"--{'figure ' * (name in FIGURES)}{name}: {what}; from {source}")
        selection, left_out = select_runs(blocks.get(experiment), runs)
        for place, models in selection.items():
            members = runs_in(models)
            count = str(len(members))
            if experiment:
                _, total, _ = missing_runs(experiment, blocks[experiment], place, members)
                count += f" of {total}"
            print_line(f"    {' '.join(place).strip()}: {count} runs finished")
        if left_out:
            print_line(f"    {len(left_out)} unfinished or damaged runs")


def draw_all(names, arguments, flatness_of):
    """Draws outputs, with --live again while runs go on; prints a line for each that fails."""
    while True:
        runs, flatness_once, unfinished = find_runs(arguments.log_dir), cache(flatness_of), []
        for name in names:
            try:
                unfinished.append(draw(name, runs, arguments, flatness_once))
            except UserError as error:
                if len(names) == 1:
                    raise
                print_line(f"{name}: {error}", sys.stderr)
        check(unfinished, "nothing could be drawn")
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
    add = parser.add_argument
    add("--figure", choices=[*FIGURES, "all"], nargs="+", default=[], metavar="NAME",
        help=f"{', '.join(FIGURES)}; or all, tables included")
    add("--table", choices=TABLES, nargs="+", default=[], help="--list explains them")
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
    for name, default in (("log", "logs"), ("fig", "figures"), ("data", "data")):
        parser.add_argument(f"--{name}-dir", default=default, help=f"(default: {default})")
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
        check(not arguments.experiment or any(OUTPUTS[name][1] is None for name in names),
              "--experiment is for --figure stability, compute and depth, and --table depth")
        for name in ("eigs", "images", "memory_gb"):
            value = getattr(arguments, name)
            check(value is None or 0 < value < 1e6, f"--{name.replace('_', '-')} "
                  f"{format_value(value)}: give a number above 0 and below a million")
        measure = partial(
            measure_flatness, split=arguments.split,
            images=arguments.images or 512, num_eigs=arguments.eigs, eigensolver=arguments.eig,
            memory_gb=arguments.memory_gb, control=arguments.control, data_dir=arguments.data_dir)
        if arguments.list:
            list_outputs(arguments.log_dir)
        for directory in arguments.flatness:
            measure(directory)
        for directory in arguments.export:
            export_network(directory, arguments.takes, arguments.data_dir)
        if names:
            draw_all(names, arguments, partial(
                read_flatness, split=arguments.split, measure=measure, images=arguments.images))
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, "analyze.py", "figures drawn so far are complete")


if __name__ == "__main__":
    sys.exit(main())
