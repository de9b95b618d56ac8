#!/usr/bin/env python3
"""Reads the logs of finished runs, computes the statistics and the flatness, and draws the paper's figures and tables.

    python analyze.py --figure 2                      # from logs/ into figures/fig2.pdf, .png and .json
    python analyze.py --figure E5                     # measures flatness where a run lacks it, then draws
    python analyze.py --table C1
    python analyze.py --figure all                    # every figure and table whose runs are there
    python analyze.py --figure 2 --live               # again and again, while the runs go on
    python analyze.py --flatness logs/cifar10/vgg11/L-r40/seed1 --eigs 30
    python analyze.py --list                          # what can be drawn, from which runs, and how many are there

Runs that differ in anything but the method (data set, width, schedule, precision …) are never put into one figure:
each such setting gets files of its own, figures/fig2-<dataset>-<setting>.*. Every number drawn is in the .json.
"""
import argparse
import contextlib
import ctypes
import itertools
import json
import math
import pathlib
import platform
import re
import shlex
import sys
import textwrap
import time
import zlib

import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import train
from gst_ext import drawing, files, flatness
from gst_ext.drawing import matplotlib
from gst_ext.runs import choose_device
from gst_ext.statistics import (KINDS, bootstrap_correlation, correlations, floats, gap_of, interval, measured,
                                paired_differences, partial_correlation, plus_minus, share, stated, t_test)

# +--------------------------------------------------------------------------------------------------------------------+
# | Configuration: which runs make which figure, how each method looks, what the paper reports                         |
# +--------------------------------------------------------------------------------------------------------------------+

ADAM = ("none", "S-r4", "S-r40", "L-r40")
SGD = ("none", "S-r30", "S-r60")
FLAT = {"vgg11": ("none", "S-r4", "S-r40", "R-r40", "L-r40", "scratch-S")}
RATES = {"vgg11": tuple(f"{target}-r{r}" for r in (4, 20, 40, 60, 100, 200, 300) for target in "SRL")}
NOISE = ("none", "L-r40-bnkeep", *(f"{kind}-{k}" for kind in ("zero", "gauss") for k in (1, 50, 1105)))
HIGH = "-p0.25,0.8,0.25,0.95"  # Table C.1's 59%
F1 = ("scratch-S-ebn-signed-p0,0,0,0.7", *(f"{t}-r750-ebn-signed-s2500x4-e3250x4-p0,0,0,0.7" for t in "SL"))
ANY = None  # in place of methods: whatever prunes, of any experiment, and the baselines
FIGURES = {  # name: (what it shows, runs.sh target, {model: the methods drawn})
    "2": ("accuracy while training, and best accuracy against mean stability", "fig2",
          {"vgg11": ADAM, "resnet18": ADAM}),
    "3": ("accuracy, stability and their correlation against the iterative pruning rate", "fig3", RATES),
    "4": ("accuracy and generalization gap against stability, SGD", "fig4",
          {"resnet18": SGD, "resnet20": SGD, "resnet56": SGD}),
    "5": ("accuracy under zeroing and Gaussian noise in place of pruning", "fig5", {"vgg11": NOISE}),
    "6": ("stability and accuracy against Tr(H) and Tr(C)", "fig6", FLAT),
    "B1": ("normalised activations of VGG19 before and after training", "figB1", {"vgg19": ("none",)}),
    "B2": ("Figure 2 with the scores E[BN] (vgg11) and signed E[BN] (resnet18)", "figB2",
           {"vgg11": ("none", "S-r4-ebn", "S-r40-ebn", "L-r40-ebn"),
            "resnet18": ("none", *(f"{m}-ebn-signed-s3,4,5,6" for m in ADAM[1:]))}),
    "C1": ("best accuracy against mean stability at each iterative rate", "fig3", RATES),
    "C2": ("Kendall's correlation of accuracy and stability at each iterative rate", "fig3", RATES),
    "C3": ("accuracy and generalization gap against high stability, SGD", "figC3",
           {"resnet18": ("none", "S-r1-s24x16-p0.06x16", "S-r1-s24x16")}),
    "D1": ("one weight through pruning, zeroing and Gaussian noise", None, {}),
    "D2": ("accuracy under zeroing with weights that come back as they were", "figD2",
           {"vgg11": ("none", "L-r40", *(f"zero-{k}-all-restore-tb256" for k in (89, 630, 1220, 2480)))}),
    **{name: (what, "fig6", FLAT) for name, what in {
        "E1": "the first ten eigenvalues of the Hessian",
        "E2": "the first hundred eigenvalues of the Hessian",
        "E3": "|ε| at a loss rise of 0.1 against stability, and accuracy against it",
        "E4": "the loss along the leading eigenvectors",
        "E5": "TIC proxy against stability, and accuracy against it",
        "E6": "accuracy against stability for the runs of the flatness figures",
        "flatness": "accuracy against every flatness measure, plain and adaptive, with rank correlations",
        "density": "the spectral density of the Hessian"}.items()},
    "stability": ("all runs' accuracy, best and last, against what pruning events do", "fig2", ANY),
    "compute": ("all runs' accuracy, best and last, against the multiply-adds spent", "fig2", ANY),
}
TABLES = {
    "C1": ("accuracy and stability at 46% and 59% total pruning", "tabC1",
           {"resnet18": tuple(m + p for m in ADAM[1:] for p in ("", HIGH))}),
    "F1": ("CIFAR-100: the methods, and t-tests of L against S and scratch", "tabF1", {"resnet18": ("none", *F1)}),
}
EVERYTHING = {**FIGURES, **{f"table {name}": entry for name, entry in TABLES.items()}}
MEASURES = {  # of flatness
    "trace_eigs": "Tr(H), leading eigenvalues", "trace": "Tr(H), Hutch++", "tr_c": "Tr(C)",
    "tic": "TIC proxy Tr(C)/Tr(H)", "tic_trace": "Tr(C)/Tr(H), Hutch++", "c_over_f": "Tr(C)/Tr(F)",
    "epsilon_min": "|ε| at a loss rise of 0.1", "top": "λ₁, the leading eigenvalue"}
FORMS, MOVED = ("", "adaptive_"), 0.05  # by what share of itself rescaling must move a measure to be named
EVENTS = {
    "mean_stability": "Mean stability (%)", "loss_rise": "Rise in test loss at an event (nats)",
    "churn": "Churn at an event (%)", "min_stability": "Smallest stability (%)",
    "below_99": "Events below 99% stability"}
LABELS = {
    **EVENTS, "best_acc": "Best test accuracy (%)", "last_acc": "Last test accuracy (%)",
    "gap": "Train − test accuracy (points)", "compute": "Multiply-adds spent (% of no pruning's)",
    "events": "Pruning events", "converged": "Share of converged eigenpairs", **MEASURES,
    **{f"adaptive_{k}": f"Adaptive {label}" for k, label in MEASURES.items()}}
SCATTERS = {  # figure: (columns, the (x, y) of its panels)
    **dict.fromkeys(("4", "C3"), (2, [("mean_stability", "best_acc"), ("mean_stability", "gap")])),
    "6": (2, [("mean_stability", "trace_eigs"), ("trace_eigs", "best_acc"),
              ("mean_stability", "tr_c"), ("tr_c", "best_acc")]),
    "E3": (2, [("mean_stability", "epsilon_min"), ("epsilon_min", "best_acc")]),
    "E5": (2, [("mean_stability", "tic"), ("tic", "best_acc")]), "E6": (2, [("mean_stability", "best_acc")]),
    "flatness": (4, [(form + x, "best_acc") for x in MEASURES for form in FORMS]),
    "stability": (5, [(x, y) for y in ("best_acc", "last_acc") for x in EVENTS]),
    "compute": (2, [("compute", "best_acc"), ("compute", "last_acc")]),
}
NEEDS_FLATNESS = {name for name, (_, target, _) in FIGURES.items() if target == "fig6"} - {"E6"}
# Okabe and Ito's colour-blind-safe colours; one method looks the same in every figure.
BLACK, BLUE, SKY, ORANGE, RED, GREEN, PINK = "#000000 #0072B2 #56B4E9 #E69F00 #D55E00 #009E73 #CC79A7".split()
STYLES = {  # by the beginning of the method's name, the first that fits
    "none": (BLACK, "-", "o"), "S-r4": (SKY, "-", "s"), "S-r30": (SKY, "-", "s"),
    "S-r1-s24x16-p0.06x16": (ORANGE, "-", "s"),
    "S": (BLUE, "--", "^"), "L": (RED, "-.", "D"), "R": (GREEN, (0, (4, 1, 1, 1, 1, 1)), "v"),
    "scratch": (PINK, ":", "P"),
    **{f"{kind}-{k}": (colour, line, marker) for kind in ("zero", "gauss") for k, colour, line, marker in (
        (1, ORANGE, ":", "s"), (50, SKY, "--", "^"), (1105, BLUE, "-", "D"), (89, ORANGE, ":", "s"),
        (630, SKY, "--", "^"), (1220, BLUE, "-", "D"), (2480, GREEN, "-", "v"))},
}
MARKERS = "os^DvPX*<>ph8"  # a second method of one colour in a panel takes the next one
PAPER = {  # what the appendix reports; accuracies and stabilities in %
    ("2", "resnet18"): {"S-r4": {"best_acc": 87.65, "best_acc_sd": 0.26, "stability": 99.957},
                        "S-r40": {"best_acc": 87.72, "best_acc_sd": 0.18, "stability": 99.470},
                        "L-r40": {"best_acc": 88.03, "best_acc_sd": 0.26, "stability": 98.904}},
    ("B2", "vgg11"): {"S-r4": {"stability": 99.98}, "S-r40": {"stability": 99.81}, "L-r40": {"stability": 97.67},
                      "pearson": [-0.88, 1.2e-10], "kendall": [-0.64, 8.4e-07]},
    ("B2", "resnet18"): {"S-r4": {"stability": 99.96}, "S-r40": {"stability": 98.14}, "L-r40": {"stability": 96.66},
                         "pearson": [-0.65, 5e-05], "kendall": [-0.43, 0.00061]},
    ("C3", "resnet18"): {"none": {"best_acc": 94.35}, "S-r1-s24x16": {"best_acc": 94.41, "stability": 99.93},
                         "S-r1-s24x16-p0.06x16": {"best_acc": 94.25, "stability": 99.96}},
    ("table C1", "resnet18"): {  # method: (total pruning, accuracy, deviation, stability, deviation)
        "S-r4": (46, 87.65, 0.26, 99.957, 0.006), "S-r4" + HIGH: (59, 87.52, 0.11, 99.935, 0.012),
        "S-r40": (46, 87.72, 0.18, 99.470, 0.203), "S-r40" + HIGH: (59, 87.95, 0.18, 98.912, 0.303),
        "L-r40": (46, 88.03, 0.26, 98.904, 0.229), "L-r40" + HIGH: (59, 87.48, 0.37, 98.143, 0.434)},
    ("table F1", "resnet18"): {
        "none": (0, 73.28, 0.12, 100, None), F1[0]: (15, 73.11, 0.13, 100, None),
        F1[1]: (15, 73.22, 0.09, 91.94, 4.10), F1[2]: (15, 73.41, 0.08, 86.98, 6.87)},
}
SUMMARY = (("best accuracy", "best_acc", 2), ("last accuracy", "last_acc", 2), ("mean stability", "mean_stability", 3))


# +--------------------------------------------------------------------------------------------------------------------+
# | Runs: what their logs say, what is wrong with them, and their statistics                                           |
# +--------------------------------------------------------------------------------------------------------------------+

def exact(record, images):
    """The record with accuracies, and the stability they give, as exact fractions; images: {split: their number}."""
    for key, split in (("train_acc", "train"), ("test_acc_before", "test"), ("test_acc", "test"), ("val_acc", "val")):
        if record[key] is not None:
            record[key] = share(record[key], images.get(split))
    if record["stability"] is not None:
        record["stability"] = 100 * record["test_acc"] / record["test_acc_before"]
    return record


def summarize(run_dir):
    """Everything a run's logs say, as a dict.

    dir, model, dataset, method, setting, seed and config; curve (epochs,), the test accuracy after each epoch; live,
    the filters left of each prunable layer; and what train.summarize_epochs says, accuracies and stabilities as exact
    fractions; problem: None, or one line saying why the run must not be averaged with others (unfinished or damaged).
    Raises nothing for a bad log.
    """
    run_dir = pathlib.Path(run_dir)
    run = {"dir": str(run_dir), "problem": None, "curve": np.empty(0)}
    records, wrong = [], "config.json is missing or damaged"
    try:
        config = json.loads((run_dir / "config.json").read_text())
        options, epochs, images = config["options"], config["schedule"]["epochs"], dict(config.get("data", {}))
        named = dict(method=config["method"], setting=config["setting"], model=options["model"], seed=options["seed"])
        if [type(value) for value in named.values()] != [str, str, str, int] or (
                options.get("optimizer") not in (None, *train.OPTIMIZERS)):
            raise TypeError
        run.update(named, config=config, dataset=run_dir.parent.parent.parent.name)
        wrong = "has no epochs.jsonl"
        for number, line in enumerate((run_dir / "epochs.jsonl").read_text().splitlines(), 1):
            wrong = f"line {number} of epochs.jsonl is damaged"
            record = json.loads(line)
            if record["epoch"] != number - 1:
                return {**run, "problem": f"line {number} of epochs.jsonl is of epoch {record['epoch']}"}
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    return {**run, "problem": f"{key} of epoch {number - 1} is {value}"}
            records.append(exact(record, images))
        wrong = "epochs.jsonl is damaged"
        found = train.summarize_epochs(records, config)
        run.update(found, live=records[-1].get("live"), below_99=found["below"]["99"],
                   compute=100 * found["macs_spent"] / found["macs_unpruned"] if found["macs_spent"] else None,
                   curve=np.array([record["test_acc"] for record in records], float))
    except (OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        return {**run, "problem": f"{wrong} ({type(error).__name__})"}
    if len(records) != epochs:
        run.update(problem=f"unfinished, {len(records)} of {epochs} epochs", unfinished=True)
    return run


def find_runs(log_dir):
    """Summaries of all runs below log_dir, in order of their directories; mixed and doubled ones have a problem."""
    runs = [summarize(path.parent) for path in sorted(pathlib.Path(log_dir).glob("*/*/*/seed*/config.json"))]
    name_mixed(runs, lambda run: (run["dataset"], run["setting"]), lambda run: run["config"].get("data"))
    name_mixed(runs, lambda run: (run["dataset"], run["setting"], run["model"], run["method"]),
               lambda run: {k: v for k, v in run["config"]["options"].items() if k not in ("seed", "dataset")})
    seen = {}
    for run in runs:
        if not run["problem"]:
            first = seen.setdefault(tuple(run[k] for k in ("dataset", "setting", "model", "method", "seed")), run)
            if first is not run:
                run["problem"] = f"is the same run as {first['dir']}"
    return runs


def name_mixed(runs, group, content):
    """Gives a problem to each run whose content (a dict or None) is not that of most of its group."""
    groups = {}
    for run in runs:
        if not run["problem"]:
            groups.setdefault(group(run), {}).setdefault(json.dumps(content(run), sort_keys=True), []).append(run)
    for kinds in groups.values():
        most = max(kinds.values(), key=len)
        for run in itertools.chain(*(kind for kind in kinds.values() if kind is not most)):
            ours, theirs = content(run) or {}, content(most[0]) or {}
            names = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
            run["problem"] = f"differs from {most[0]['dir']} in {', '.join(names)}"


def methods_of(name, runs):
    """{model: the methods that a figure shows, in order}; for ANY, the baselines and what prunes among these runs."""
    if EVERYTHING[name][2] is not ANY:
        return EVERYTHING[name][2]
    found = {(run["model"], run["method"]) for run in runs if re.match("none|scratch|[SLR]-", run.get("method", ""))}
    found = sorted(found, key=lambda pair: (list(STYLES.values()).index(style(pair[1])), len(pair[1]), pair[1]))
    return {model: [method for of, method in found if of == model] for model in train.PRUNABLE_BLOCKS}


def runs_of(name, runs):
    """(what a figure or table is drawn from, {(dataset, setting): [run …]}; what is left out of it, [run …])."""
    methods, sgd, found, left_out = methods_of(name, runs), name in ("4", "C3"), {}, []
    for run in runs:
        if "method" in run and run["method"] not in methods.get(run["model"], ()):
            continue
        if sgd and run.get("model") == "resnet18" and not run["setting"].startswith("sgd"):
            continue  # Adam is ResNet18's own; the other two always train by SGD, and do not say so
        if run["problem"]:
            left_out.append(run)
        else:
            setting = run["setting"].removeprefix("sgd").lstrip("-") if sgd else run["setting"]
            found.setdefault((run["dataset"], setting), []).append(run)
    # A baseline alone makes no figure but B1: it belongs to every figure of its setting.
    return {k: v for k, v in found.items() if name == "B1" or any(r["method"] != "none" for r in v)}, left_out


def is_papers(name, dataset, setting):
    """Whether these are the paper's own data set and setting, so that its numbers may stand beside them."""
    return (dataset, setting) == (("cifar100", "epochs4000-lrs2000-lr0.0001-augment") if name == "table F1"
                                  else ("cifar10", ""))


def rest_command(name, dataset, setting, found, log_dir="logs"):
    """(how many of its runs are there, how many there should be, the command that trains the rest)."""
    _, target, models = EVERYTHING[name]
    if models is ANY:
        return len(found), len(found), ""
    papers, seeds, more = is_papers(name, dataset, setting), sorted({run["seed"] for run in found}), []
    different = {"log_dir": log_dir} if log_dir != "logs" else {}
    if papers:
        seeds = list(range(1, {"tabF1": 4, "figB1": 2}.get(target, 11)))
    else:
        options = found[0]["config"]["options"]
        preset = setting.split("-")[0] if setting.split("-")[0] in train.PRESETS else None
        defaults = train.usual_settings(options["model"], options.get("optimizer"), preset)
        different |= {k: options[k] for k, default in defaults.items() if options.get(k, default) != default
                      and k not in ("optimizer", "s", "e", "p", "r", "score", "save_epoch",
                                    "test_batch_size")}  # those are the method's
        more = ["--preset", preset] * bool(preset)
    more += ["--"] * bool(different)
    for k, value in different.items():
        values = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
        more += [f"--{'no-' * (value is False)}{k.replace('_', '-')}", *map(files.short, values)]
    wanted = {(model, method, seed) for model, methods in models.items() for method in methods for seed in seeds}
    there = wanted & {(run["model"], run["method"], run["seed"]) for run in found}
    span = f"{seeds[0]}-{seeds[-1]}" if seeds[-1] - seeds[0] == len(seeds) - 1 else ",".join(map(str, seeds))
    return len(there), len(wanted), shlex.join(["bash", "runs.sh", target, "--seeds", span, *more])


def total_pruned(run):
    """Percentage of all parameters gone with a run's filters: their slices of the pruned convolutions, and those of
    the next ones that are pruned too, which read them (this gives the paper's 46, 59 and 15%; C.2, F)."""
    options, pruned = run["config"]["options"], {p["layer"] for p in run["config"]["pruned_layers"]}
    with torch.device("meta"):
        model = train.build_model(options["model"], run["config"]["data"]["classes"], options["width"])
    gone = 0
    for i in pruned:
        weight = model.prunable[i].conv.weight
        kept = run["live"][i] / len(weight) * (run["live"][i - 1] / weight.shape[1] if i - 1 in pruned else 1)
        gone += weight.numel() * (1 - kept)
    return 100 * gone / run["config"]["parameters"]


def accuracy_correlations(runs, x, y="best_acc"):
    """correlations of the runs' x and y; where y is the best accuracy, also of the last epoch's ("by last_acc") and the
    validation-chosen one.

    disagrees: the coefficients that have another sign by the last epoch's accuracy. The best is a maximum over all
    epochs since the last event, which are more without pruning than with it.
    """
    result = correlations([run[x] for run in runs], [run[y] for run in runs])
    if y == "best_acc":
        for other in ("last_acc", "val_chosen_acc"):
            if all(run[other] is not None for run in runs):
                result["by " + other] = correlations([run[x] for run in runs], [run[other] for run in runs])
        last = result["by last_acc"]
        result["disagrees"] = [k for k in KINDS if result[k] and last[k] and result[k][0] * last[k][0] < 0]
    return result


def method_numbers(groups):
    """What a figure's JSON says of each method: every measure with n, mean, deviation and interval; and the pairs.

    disagree: the pairs whose difference has one sign by the best accuracies, and the other by the last epoch's.
    """
    keys = ("best_acc", "last_acc", "val_chosen_acc", "gap", "mean_stability")
    keys += tuple(k for k in LABELS if k not in keys and all(k in run for runs in groups.values() for run in runs))
    best, last = (paired_differences({m: {run["seed"]: run[key] for run in runs} for m, runs in groups.items()})
                  for key in ("best_acc", "last_acc"))
    return {"methods": {method: {
        "label": method_label(runs[0]).replace("$", ""), "seeds": [run["seed"] for run in runs],
        "iterative_rate": runs[0]["config"]["iterative_rate"], "runs": [run["dir"] for run in runs],
        **{k: measured([run[k] for run in runs]) for k in keys}} for method, runs in groups.items()},
        "paired_best_acc": best, "paired_last_acc": last,
        "disagree": [pair for pair in best if best[pair]["mean"] * last[pair]["mean"] < 0]}


# +--------------------------------------------------------------------------------------------------------------------+
# | Flatness (E): the measures of gst_ext/flatness.py, of a run's checkpoint, kept beside the run                      |
# +--------------------------------------------------------------------------------------------------------------------+

def load_network(run_dir, data_dir, device, checkpoint=None):
    """(network in eval mode, data on the device, what the checkpoint is) of a run; files.UserError where it cannot be.

    checkpoint: a file's name in run_dir; by default epoch<N>.pt, N the run's save_epoch, or a finished run's last.
    """
    run_dir = pathlib.Path(run_dir)
    try:
        config = json.loads((run_dir / "config.json").read_text())
        options, saved = config["options"], config["schedule"]["save_epoch"]
        crc, dataset = config["data"]["crc32"], options["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise files.UserError(f"{run_dir}/config.json is missing or damaged ({type(error).__name__}): name the "
                              "directory of a run") from None
    if not checkpoint:
        kept, finished = saved and (run_dir / f"epoch{saved}.pt").exists(), (run_dir / "done.json").exists()
        files.require(kept or finished, f"{run_dir} is not finished" + f", and has no epoch{saved}.pt" * bool(saved) +
                      ": continue the run first")
        checkpoint = f"epoch{saved}.pt" if kept else "checkpoint.pt"
    arrays = train.load_data(dataset, data_dir)
    files.require(crc == {k: zlib.crc32(np.ascontiguousarray(arrays[k])) for k in crc},
                  f"{run_dir} was trained on other data than {dataset} is now: put its own back, or see --data-dir")
    try:
        state = files.read_checkpoint(run_dir / checkpoint, mmap=True)
        model = train.build_model(options["model"], len(arrays["classes"]), options["width"])
        model.load_state_dict(state["model"], assign=True)
        source = {"checkpoint": checkpoint, "crc32": zlib.crc32(np.memmap(run_dir / checkpoint)),
                  "epoch": int(state["epoch"])}
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        raise files.UserError(f"{run_dir / checkpoint} is missing or damaged ({files.reason(error)}): train the run "
                              "again") from None
    kept = argparse.Namespace(**vars(train.DATA_OPTIONS) | options | {"augment": False})
    return model.to(device).eval(), train.put_on_device(arrays, device, kept), source


def flatness_file(run_dir, split):
    return pathlib.Path(run_dir, "flatness.json" if split == "test" else f"flatness-{split}.json")


def measure_flatness(run_dir, args, checkpoint=None):
    """All flatness measures of a run's checkpoint (load_network) on the split's first images, in float32.

    args: what main parses; split, images, eigs, eig, memory_gb and data_dir are read. Returns what it writes to
    flatness_file (docs/flatness.md); if that file holds the same measurement already, only reads it. Raises
    files.UserError for missing or damaged files, too few images, or an infinite loss.
    """
    path, seed, images, seconds = flatness_file(run_dir, args.split), 0, args.images, {}
    label = "/".join(path.absolute().parts[-4:-1])
    device = choose_device(argparse.Namespace(device="auto", precision="fp32", deterministic=False))
    model, data, source = load_network(run_dir, args.data_dir, device, checkpoint)
    settings = {"version": 2, **source, "mode": "eval", "split": args.split, "images": images, "dtype": "float32",
                "seed": seed, "eig": args.eig, "eigs": args.eigs, "tol": flatness.EIGEN_TOLERANCE}
    try:
        old = json.loads(path.read_text())
        if {k: old.get(k) for k in settings} == settings:
            print(f"{path}: measured already", flush=True)
            return old
    except (OSError, ValueError, AttributeError):
        pass  # measure it (again)
    x, y = (tensor[:images] for tensor in data[args.split])
    files.require(len(x) == images, f"--images {images}, but there are {len(x)} {args.split} images: give fewer")
    x, products = train.normalise(x, data), itertools.count(1)
    bar = tqdm(total=12, desc=label, disable=not (sys.stderr.isatty() and sys.stdout.isatty()),
               bar_format="{desc} |{bar:20}| {n_fmt}/{total_fmt} {postfix}")

    @contextlib.contextmanager
    def stage(name):
        bar.set_postfix_str(name)
        clock = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - clock, 3)
        bar.update()
        if bar.disable:
            print(f"{label} {name}: {seconds[name]:.1f} s", flush=True)

    def tick():
        bar.set_postfix_str(f"{next(products)} Hessian-vector products")

    with bar:
        with torch.no_grad():
            logits = torch.cat([model(part) for part in x.split(128)])
        loss, accuracy = float(F.cross_entropy(logits, y)), 100 * float((logits.argmax(1) == y).double().mean())
        files.require(math.isfinite(loss), f"{run_dir}: the loss of {source['checkpoint']} is {loss}")
        options = {"eigs": args.eigs, "method": args.eig, "seed": seed, "memory_gb": args.memory_gb, "tick": tick,
                   "stage": stage}
        try:
            found = flatness.measures(model, x, y, full=True, **options)
            found["control"] = flatness.control(model, x, y, **options)
        except ValueError as error:
            raise files.UserError(f"{run_dir}: {error}") from None
    result = settings | found | {
        "loss": loss, "accuracy": accuracy, "rise": flatness.RISE, "seconds": seconds, "memory_gb": args.memory_gb,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"python": platform.python_version(),
                     **{module.__name__: module.__version__ for module in (torch, np, scipy)}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads()}
    files.write_json(path, result)
    print(f"{label}: λ1 {max(result['eigenvalues'], key=abs, default=math.nan):.4g}, {sum(result['converged'])} of "
          f"{args.eigs} pairs converged, Tr(H) {result['trace']:.4g} ± {result['trace_se']:.2g}, Tr(C) "
          f"{result['tr_c']:.4g}, Tr(C)/Tr(H) {result['tic'] or math.nan:.4g}", flush=True)
    return result


def with_flatness(runs, left_out, args):
    """Copies of the runs with what their flatness.json adds, measured now where there is none; the others go to
    left_out of this figure, not of others."""
    for run in (run for run in runs if "flatness" not in run):  # kept for the next figure
        path = flatness_file(run["dir"], args.split)
        try:
            flat = json.loads(path.read_text()) if path.exists() else measure_flatness(run["dir"], args)
            files.require(any(flat["converged"]), f"none of the eigenpairs in {path.name} converged: measure it again")
            run["flatness"] = {"flat": flat, "converged": sum(flat["converged"]) / len(flat["converged"]),
                               **{form + k: flatness.measure_of(flat, form + k) for k in MEASURES for form in FORMS}}
        except files.UserError as error:
            run["flatness"] = {"problem": str(error)}
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            run["flatness"] = {"problem": f"{path.name} is damaged ({type(error).__name__}): delete it"}
    runs = [{**run, **run["flatness"]} for run in runs]
    name_mixed(runs, lambda run: "", lambda run: {k: run["flat"].get(k) for k in flatness.SETTINGS})
    left_out += [run for run in runs if run["problem"]]
    return [run for run in runs if not run["problem"]]


# +--------------------------------------------------------------------------------------------------------------------+
# | Panels; figures and tables, each {model: {method: runs}} to the canvas and, by model, the numbers drawn            |
# +--------------------------------------------------------------------------------------------------------------------+

def style(method):
    """(colour, line, marker) of a method."""
    return next(look for name, look in STYLES.items() if re.match(rf"{re.escape(name)}(?![0-9a-z.])", method)
                or method == name)


def method_label(run):
    """Prune_S 1%: the paper's name, with the largest iterative pruning rate of any layer (A.4)."""
    kind, _, rest = run["method"].partition("-")
    if kind in ("none", "scratch"):
        return "no pruning" if kind == "none" else f"scratch Prune$_{rest[0]}$"
    if kind in ("zero", "gauss"):
        return f"{'Zeroing' if kind == 'zero' else 'Gaussian'} {rest.partition('-')[0]}"
    rate = run["config"]["iterative_rate"]
    return f"Prune$_{kind}$ " + (f"{rate:.0f}%" if rate >= 0.95 else f"{rate:.1g}%")


def draw_dynamics(axis, groups, title, columns=2):
    """Mean test accuracy per epoch and its 95% band, a method each; returns the numbers drawn, by method."""
    numbers = {}
    for method, runs in groups.items():
        length = min(len(run["curve"]) for run in runs)  # they differ while runs go on (--live)
        epochs = np.arange(1, length + 1)
        stability = measured([run["mean_stability"] for run in runs])["mean"]
        numbers[method] = {"n": len(runs), "epoch": epochs.tolist(), **drawing.means(
            axis, epochs, interval([run["curve"][:length] for run in runs]), style(method), len(runs),
            bars=length == 1, label=f"{stability:.2f}% stable ({method_label(runs[0])})")}
    drawing.mark_drops(axis, [(curve["mean"], style(method)[0]) for method, curve in numbers.items()])
    counts = sorted({len(runs) for runs in groups.values()})
    n = " to ".join(map(str, counts[::len(counts) - 1 or 1]))
    axis.set(xlabel="Epoch", ylabel="Test accuracy (%)", title=f"{title}, {n} run{'s' * (counts[-1] > 1)} a method" +
             ", too few for a band" * (counts[-1] < 3))
    drawing.legend_below(axis, columns, "Stability (method)")
    return numbers


def draw_scatter(axis, groups, x="mean_stability", y="best_acc", baseline=False, short=False, given=None):
    """y against x, a point per run; with baseline, the runs without pruning are points too, else a line at their mean.

    Returns {"x", "y"} and accuracy_correlations, and as "given <measure>" a partial_correlation. The panel says so
    where the last epoch's accuracy disagrees, where eigenpairs have not converged (a white dot in the point), and
    where writing the same networks in other scales moves x or y by more than MOVED.
    """
    points, colours, labels = [], [], [method_label(runs[0]) for runs in groups.values()]

    def place(runs):
        return ([float(run[k]) for run in runs] for k in (x, y))

    for (method, runs), label in zip(groups.items(), labels):
        colour, _, marker = style(method)
        here = [run for run in runs if run.get(x) is not None and run.get(y) is not None]
        if method == "none" and not baseline:
            axis.axhline(np.mean([float(run[y]) for run in runs]), color=colour, lw=0.8, ls=":",
                         label="no pruning (mean)")
        elif here:  # an empty line, not clipped, would take the layout apart
            marker = MARKERS[(MARKERS.index(marker) + colours.count(colour)) % len(MARKERS)]
            axis.plot(*place(here), marker, color=colour, ms=4, mec="white", mew=0.4, clip_on=False,
                      label=label if labels.count(label) == 1 else method)
            colours.append(colour)
            points += here
    result = {"x": x, "y": y, **accuracy_correlations(points, x, y)}
    text = [f"n = {len(points)}" if points else "not in these logs", *(stated(result, kind, short) for kind in KINDS)]
    if result.get("disagrees"):
        text += [f"by last: {stated(result['by last_acc'], kind, True)}" for kind in KINDS]
    if given:
        partial = result[f"given {given}"] = partial_correlation(*([run[k] for run in points] for k in (x, y, given)))
        text.append(f"given {given}: {stated(partial, 'pearson', True) if partial else 'undefined'}")
    flat = [run for run in points if "flat" in run]
    doubtful = [run for run in flat if any(flatness.share_converged(run["flat"], k) < 1 for k in (x, y))]
    if doubtful:
        axis.plot(*place(doubtful), "o", color="white", ms=1.5, mew=0)
        text.append("white dot: not all eigenpairs converged")
    moved = [flatness.moved_by_rescaling(run["flat"], x, y) for run in flat]
    if any(moved):
        result["moved_by_rescaling"], largest = moved, max(filter(None, moved))
        text += [f"† moved by {100 * largest:.0f}% by rescaling"] if largest > MOVED else []
    axis.set_title("\n".join(filter(None, text)))
    axis.ticklabel_format(useOffset=False)
    axis.locator_params(axis="x", nbins=3 if short else 5)
    axis.set(xlabel=LABELS[x], ylabel=LABELS[y], **({} if points else {"xticks": [], "yticks": []}))
    return result


def dynamics_and_scatter(name, models, args):
    """Figures 2 and B2. The unfinished runs that --live adds are in the curves only."""
    (canvas, axes), numbers = drawing.panels(2 * len(models)), {}
    for left, right, (model, groups) in zip(axes[::2], axes[1::2], models.items()):
        numbers[model] = {"dynamics": draw_dynamics(left, groups, model),
                          "scatters": [draw_scatter(right, finished(groups))]}
        drawing.legend_below(right)
    return canvas, numbers


def noise_dynamics(name, models, args):
    """Figures 5 and D2: a panel for each kind of noise there is, each beside pruning and the baseline."""
    groups, dynamics, titles = models["vgg11"], {}, {"zero": "Zeroing noise", "gauss": "Gaussian noise"}
    kinds = [kind for kind in titles if any(m.startswith(kind) for m in groups)] or ["none"]
    canvas, axes = drawing.panels(len(kinds), 2, 4.0, 6.75 / len(kinds))
    for axis, kind in zip(axes, kinds):
        shown = {m: runs for m, runs in groups.items() if m.startswith((kind, "none", "L"))}
        dynamics |= draw_dynamics(axis, shown, titles.get(kind, "no noise"), 1)
    return canvas, {"vgg11": {"dynamics": dynamics}}


def by_rate(groups):
    """{iterative rate in %: (r, {method: runs})}, ascending; where scaling gives two r one rate, the first."""
    rates = {}
    for method, runs in groups.items():
        rate, r = runs[0]["config"]["iterative_rate"], int(re.search(r"-r(\d+)", method)[1])
        if rates.setdefault(rate, (r, {}))[0] == r:
            rates[rate][1][method] = runs
    return dict(sorted(rates.items()))


def draw_rate_correlation(axis, rates, kind):
    """Correlation of accuracy and stability over the runs of each rate, with its 95% interval; and that of the last
    epoch's accuracy where it has another sign."""
    numbers, drawn, last = {}, {}, {}
    for rate, (r, groups) in rates.items():
        runs = list(itertools.chain(*groups.values()))
        found = accuracy_correlations(runs, "mean_stability")
        paper = bootstrap_correlation([run["mean_stability"] for run in runs], [run["best_acc"] for run in runs], kind)
        numbers[f"{rate:.3g}"] = {"r": r, **found, f"{kind}_ci95_bootstrap": paper}
        if found[kind]:
            drawn[rate] = (found[kind][0], *(found[f"{kind}_ci95"] or [np.nan] * 2), *paper)
        if kind in found["disagrees"]:
            last[rate] = found["by last_acc"][kind][0]
    drawing.means(axis, list(drawn), np.array(list(drawn.values())).reshape(-1, 5).T, style("none"), bars=True)
    axis.axhline(0, color="0.6", lw=0.6)
    axis.set(ylabel=f"{kind.title()} correlation of\naccuracy and stability", ylim=(-1.05, 1.05))
    rate_axis(axis, rates)
    if last:
        axis.plot(list(last), list(last.values()), "o", color=RED, mfc="white", ms=4, label="by last accuracy")
        drawing.legend_below(axis)
    return numbers


def rate_axis(axis, rates):
    axis.set(xlabel="Iterative rate (%)", xlim=(min(rates) / 1.3, max(rates) * 1.3))
    axis.set_xscale("log", base=2)
    ticks = [2.0**i for i in range(-4, 8) if min(rates) / 1.3 <= 2.0**i <= max(rates) * 1.3]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def rates_figure(name, models, args):
    """Figure 3."""
    rates = by_rate(models["vgg11"])
    canvas, axes = drawing.panels(3, 3, 3.0, 2.25)
    inset = axes[1].inset_axes([0.24, 0.08, 0.42, 0.36])
    for axis, key in ((axes[0], "best_acc"), (axes[1], "mean_stability"), (inset, "mean_stability")):
        for target in "SRL":
            values = {rate: [run[key] for run in runs] for rate, (_, groups) in rates.items()
                      for method, runs in groups.items() if method[0] == target}
            if values:
                bounds = np.stack([interval(v) for v in values.values()], 1)
                drawing.means(axis, list(values), bounds, style(target), [len(v) for v in values.values()],
                              bars=True, label=f"Prune$_{target}$")
        rate_axis(axis, rates)
        axis.set_ylabel(LABELS[key])
    drawing.legend_outside(canvas, axes[:2])
    stable = [np.mean([float(run["mean_stability"]) for run in runs])
              for _, groups in rates.values() for runs in groups.values()]
    top, reach = max(stable), max(stable) - np.median(stable)
    inset.set(ylim=(top - 2.2 * reach - 1e-3, top + 0.3 * reach + 1e-3), xlabel="", ylabel="")
    inset.tick_params(labelsize=7, labelbottom=False)
    inset.set_title("high stability", pad=2)
    return canvas, {"vgg11": {"by_rate": draw_rate_correlation(axes[2], rates, "pearson")}}


def rate_scatters(name, models, args):
    """Figure C1: a panel for each rate."""
    rates, numbers = by_rate(models["vgg11"]), {}
    canvas, axes = drawing.panels(len(rates), 4, 2.2, 6.75 / min(4, len(rates)))
    for axis, (rate, (r, groups)) in zip(axes, rates.items()):
        result = draw_scatter(axis, groups, short=True)
        axis.set_title(f"rate {rate:.3g}% (r = {r})\n{axis.get_title()}")
        axis.set(ylabel=LABELS["best_acc"] if axis in axes[::4] else "")
        numbers[f"{rate:.3g}"] = {"r": r, **method_numbers(groups), "scatters": [result]}
    drawing.legend_outside(canvas, axes, lambda label: label.split()[0])
    return canvas, {"vgg11": {"by_rate": numbers}}


def rate_kendall(name, models, args):
    """Figure C2."""
    canvas, (axis,) = drawing.panels(1, height=3.0)
    return canvas, {"vgg11": {"by_rate": draw_rate_correlation(axis, by_rate(models["vgg11"]), "kendall")}}


def scatters(name, models, args):
    """The panels that SCATTERS lists, for each model.

    The points are the runs that prune while they train (section 9); in the figures of flatness and cost, all runs.
    """
    columns, pairs = SCATTERS[name]
    canvas, axes = drawing.panels(len(models) * len(pairs), columns, 2.9, 3.375 if columns == 2 else 2.5)
    numbers = {model: {"scatters": []} for model in models}
    for axis, (model, pair) in zip(axes, itertools.product(models, pairs)):
        groups = {m: runs for m, runs in models[model].items() if name != "stability" or "scratch" not in m}
        numbers[model]["scatters"].append(draw_scatter(
            axis, groups, *pair, baseline=name not in ("4", "C3", "stability"), short=columns > 2,
            given="events" if name == "stability" else None))
        if len(models) > 1:
            axis.set_title(f"{model}: {axis.get_title()}")
    drawing.legend_outside(canvas, axes)
    return canvas, numbers


def eigenvalues(name, models, args):
    """Figures E1, the first ten eigenvalues of the Hessian of the test loss, and E2, the sizes of all computed."""
    groups, first_ten, numbers = models["vgg11"], name == "E1", {}
    canvas, (axis,) = drawing.panels(1, height=3.6, width=5.0)
    for i, (method, runs) in enumerate(groups.items()):
        count = min(10 if first_ten else math.inf, *(len(run["flat"]["eigenvalues"]) for run in runs))
        values = np.array([run["flat"]["eigenvalues"][:count] for run in runs])
        x = np.arange(1, count + 1) + (0.12 * (i - (len(groups) - 1) / 2) if first_ten else 0)
        numbers[method] = {
            **drawing.means(axis, x, interval(values if first_ten else np.abs(values)), style(method), len(runs),
                            first_ten, label=method_label(runs[0]), **({"ls": ""} if first_ten else {})),
            "negative": (values < 0).sum(0).tolist(), "n": len(runs),  # negative in so many runs
            "converged": np.mean([run["flat"]["converged"][:count] for run in runs], 0).tolist()}  # in such a share
    axis.set(xlabel="Eigenvalue, ordered by magnitude", ylabel="Eigenvalue" if first_ten else "|Eigenvalue|",
             yscale="linear" if first_ten else "log")
    drawing.legend_below(axis, 3)
    return canvas, {"vgg11": {"eigenvalues": numbers}}


def loss_along_eigenvectors(name, models, args):
    """Figure E4: a panel for each method, a line for each eigenvector, means over runs."""
    groups, colours, numbers = models["vgg11"], matplotlib.colormaps["viridis"], {}
    canvas, axes = drawing.panels(len(groups), 3, 2.3, 6.75 / min(3, len(groups)), sharex=True, sharey=True)
    for axis, (method, runs) in zip(axes, groups.items()):
        epsilon = runs[0]["flat"]["line"]["epsilon"]
        mean = np.array([run["flat"]["line"]["loss"] for run in runs], float).mean(0)  # NaN where one is not finite
        for i, loss in enumerate(mean):
            axis.plot(epsilon, loss, color=colours(i / 10), lw=0.9)
        axis.set(title=f"{method_label(runs[0])}, n = {len(runs)}", yscale="log", xlabel="ε",
                 ylabel=f"{args.split.title()} loss")
        axis.label_outer()
        numbers[method] = {"n": len(runs), "epsilon": epsilon, "loss": [floats(loss) for loss in mean]}
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.BoundaryNorm(np.arange(0.5, 11), 256), colours)
    canvas.colorbar(scale, ax=canvas.axes, label="Eigenvector, by magnitude", ticks=range(1, 11), shrink=0.8)
    return canvas, {"vgg11": {"lines": numbers}}


def spectra(name, models, args):
    """The density of the Hessian's eigenvalues by method, means over runs with their 95% band."""
    canvas, (axis,) = drawing.panels(1, height=3.6, width=5.0)
    found = {m: [run["flat"].get("density") for run in runs] for m, runs in models["vgg11"].items()}
    files.require(all(map(all, found.values())), "a flatness.json without density: delete it to measure again")
    all_runs = list(itertools.chain(*found.values()))
    ends, step = [run["grid"][end] for run in all_runs for end in (0, -1)], min(run["width"] for run in all_runs) / 2
    grid, numbers = np.linspace(min(ends), max(ends), max(400, math.ceil((max(ends) - min(ends)) / step))), {}
    for method, runs in found.items():
        each = [np.interp(grid, run["grid"], run["density"], 0, 0) for run in runs]
        numbers[method] = {"n": len(runs), "lambda": floats(grid), "width": floats([run["width"] for run in runs]),
                           **drawing.means(axis, grid, interval(each), style(method), len(runs),
                                           label=method_label(models["vgg11"][method][0]))}
    top = 3 * max(max(run["density"]) for run in all_runs)
    axis.set(xlabel="Eigenvalue of the Hessian", ylabel="Density", yscale="log", ylim=(1e-8, top))
    drawing.legend_below(axis, 3)
    return canvas, {"vgg11": {"density": numbers}}


@torch.no_grad()
def normalised_activations(model, layers, images):
    """The convolutions' outputs, each feature map normalised over the batch as batch norm does in training: a flat
    array for each of `layers` (train.Block or nn.Conv2d), without the maps that are constant."""
    result = []

    def take(layer, inputs, output):
        y = layer.conv(inputs[0]) if isinstance(layer, train.Block) else output
        deviation, mean = torch.std_mean(y, (0, 2, 3), correction=0, keepdim=True)
        result.append(((y - mean) / deviation)[:, deviation.flatten() > 1e-12].flatten().numpy())

    hooks = [layer.register_forward_hook(take) for layer in layers]
    model.train()(images)
    for hook in hooks:
        hook.remove()
    return result


def vgg19_from_torchvision(args):
    """own_vgg19's answer for torchvision's network and ImageNet weights, on 32 CIFAR-10 images enlarged to 224x224."""
    import torchvision
    try:
        trained = torchvision.models.vgg19_bn(weights="IMAGENET1K_V1")
    except Exception as error:
        raise files.UserError(f"no finished VGG19 run under {args.log_dir}/, and torchvision's weights cannot be had "
                              f"({files.reason(error)}): train one with 'bash runs.sh figB1 --quick'") from None
    torch.manual_seed(0)
    x = torch.from_numpy(train.load_data("cifar10", args.data_dir)["test_x"][:32]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (F.interpolate(x, 224, mode="bilinear") - mean) / std
    return lambda after: trained if after else torchvision.models.vgg19_bn(weights=None), images


def own_vgg19(run, args):
    """(a function that gives the network before or after training, images) of a finished run, on 32 test images."""
    trained, data, _ = load_network(run["dir"], args.data_dir, torch.device("cpu"), "checkpoint.pt")
    torch.manual_seed(run["seed"])  # the initial weights, as train.make_generators does
    classes, width = trained.linear.out_features, run["config"]["options"]["width"]
    images = train.normalise(data["test"][0][:32], data)
    return lambda after: trained if after else train.build_model("vgg19", classes, width), images


def activation_histograms(name, models, args):
    """Figure B1: from a finished VGG19 run, its initial weights and its last ones, or from torchvision's weights."""
    run = models["vgg19"]["none"][0] if models else None
    make, images = own_vgg19(run, args) if run else vgg19_from_torchvision(args)
    canvas, axes = drawing.panels(16, 2, 1.0, sharex=True)
    grid = np.linspace(-4, 4, 81)
    source = run["dir"] if run else "torchvision's vgg19_bn, ImageNet weights"
    numbers = {"run": source, "images": len(images), "layers": []}
    for column, when in enumerate(("before training", "after training")):
        network = make(column == 1)
        layers = [m for m in network.modules() if isinstance(m, train.Block if run else nn.Conv2d)][-8:]
        shown = axes[column::2]
        for number, (axis, values) in enumerate(zip(shown, normalised_activations(network, layers, images)), 9):
            if len(values) > 10**5:  # enough for a histogram, and the distance's sampling error is below 0.005
                values = np.random.default_rng(0).choice(values, 10**5, replace=False)
            distance = float(scipy.stats.kstest(values, "norm", method="asymp").statistic)
            axis.stairs(np.histogram(values, grid, density=True)[0], grid, fill=True, color=BLUE, alpha=0.7)
            axis.plot(grid, scipy.stats.norm.pdf(grid), color=ORANGE, lw=1)
            axis.text(0.98, 0.9, f"conv {number}\nKS {distance:.3f}", ha="right", va="top", fontsize=7,
                      transform=axis.transAxes)
            numbers["layers"].append({"when": when, "convolution": number, "ks": distance, "n": len(values)})
        shown[0].set_title(when)
        shown[-1].set_xlabel("Normalised activation")
        del network, layers  # a full-width one is 80 MB: it goes, back to the system too, before the next is made
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
    canvas.supylabel("Density", fontsize=8)
    return canvas, {"vgg19": numbers}


def weight_path(kind):
    """A targeted weight in every training pass of a short VGG11 run on digits: (training batches, values, event).

    kind: "prune", "zero" or "gauss", of a quarter of the last layer's filters, the largest, after the first epoch.
    """
    options = train.parse_options((
        "--dataset digits --width 0.0625 --target L --s 0 --e 0 --r 1 --p 0.25 --epochs 2 --lrs 2 --batch-size 25 "
        "--device cpu" + (f" --noise {kind} --noise-batches 15" if kind != "prune" else "")).split())
    data = train.put_on_device(train.load_data("digits"), torch.device("cpu"))
    run, seen, records = train.new_run(options, 10, torch.device("cpu")), [], []
    block, noise = run.model.prunable[run.plan[0][0]], run.hooks.get("before_batch", lambda training: None)

    def before_batch(training):
        noise(training)
        if training:
            seen.append(block.conv.weight.detach()[:, 0, 1, 1].clone())

    run.hooks["before_batch"] = before_batch
    for _ in train.experiment(run, data, records.append):
        pass
    index = next(filters[0] for record in records for filters in record["filters"].values())
    return list(range(1, len(seen) + 1)), [float(values[index]) for values in seen], len(seen) // 2


def one_weight(name, models, args):
    """Figure D1: a short real run of each kind, the same seed and thus the same path up to the event."""
    canvas, axes = drawing.panels(3, 3, 2.4, 2.25, sharey=True)
    numbers = {"run": "vgg11, width 0.0625, digits, seed 1, 2 epochs of 40 batches, noise for 15 batches"}
    for axis, (kind, title, look) in zip(axes, (("prune", "Pruning", "L"), ("zero", "Zeroing", "zero-50"),
                                                ("gauss", "Gaussian", "gauss-1"))):
        steps, values, event = weight_path(kind)
        axis.plot(steps, values, ".-", ms=2.5, lw=0.8, color=style(look)[0])
        axis.axvline(event + 0.5, color="0.5", lw=0.8, ls=":")
        axis.annotate("event", (event + 0.5, 1), (-3, -8), xycoords=("data", "axes fraction"), fontsize=7, color="0.4",
                      textcoords="offset points", ha="right")
        axis.set(title=title, xlabel="Training batch")
        numbers[kind] = {"step": steps, "weight": values, "event_after_step": event}
    axes[0].set_ylabel("One weight, as the network uses it")
    return canvas, {"vgg11": numbers}


def table(name, models, args):
    """Tables C1 and F1: mean and deviation of accuracy and stability, and two-tailed t-tests of the accuracies."""
    groups, rows, t_tests = models["resnet18"], [], {}
    against = {m + HIGH: [m] for m in ADAM[1:]} if name == "table C1" else {F1[2]: [F1[1], F1[0]]}
    numbers = method_numbers(groups)
    for method, runs in groups.items():
        m, paper, tests = numbers["methods"][method], PAPER[name, "resnet18"].get(method), []
        m["total_pruned"] = measured([total_pruned(run) for run in runs])
        for other in (other for other in against.get(method, []) if other in groups):
            best, last = (t_test([run[k] for run in runs], [run[k] for run in groups[other]])
                          for k in ("best_acc", "last_acc"))
            disagrees = best["difference"] * last["difference"] < 0
            t_tests[f"{method} against {other}"] = {**best, "by last_acc": last}
            if best["student"]:
                tests.append(f"{method_label(groups[other][0])}: {best['student'][1]:.2g}" + disagrees * (
                    f" ({best['difference']:+.2f}; last epoch {last['difference']:+.2f})"))
        label = method_label(groups.get(method.removesuffix(HIGH), runs)[0])  # C.2 names a method by its rate at 46%
        rows.append({
            "method": label, "pruned": f"{m['total_pruned']['mean']:.0f}%", "n": m["best_acc"]["n"],
            **{f"{title} (%)": plus_minus(m[key], digits) for title, key, digits in SUMMARY},
            "p, two-tailed, against": "\n".join(tests) or "–",
            **({"paper's": f"{paper[1]:.2f} ± {paper[2]}; {paper[3]:g}" if paper else "–"} if args.papers else {})})
    return drawing.table(rows), {"resnet18": {**numbers, "t_tests": t_tests}}


# +--------------------------------------------------------------------------------------------------------------------+
# | Entry                                                                                                              |
# +--------------------------------------------------------------------------------------------------------------------+

DRAW = {"2": dynamics_and_scatter, "B2": dynamics_and_scatter, "3": rates_figure, "C1": rate_scatters,
        "C2": rate_kendall, "5": noise_dynamics, "D2": noise_dynamics, "B1": activation_histograms, "D1": one_weight,
        "E1": eigenvalues, "E2": eigenvalues, "E4": loss_along_eigenvectors, "density": spectra, "table C1": table,
        "table F1": table,
        **dict.fromkeys(SCATTERS, scatters)}


def finished(groups):
    """The methods' runs without those that --live adds."""
    done = {method: [run for run in runs if not run["problem"]] for method, runs in groups.items()}
    return {method: runs for method, runs in done.items() if runs}


def draw(name, runs, args):
    """Draws a figure or "table <name>" for every data set and setting found; raises files.UserError without any."""
    settings, left_out = runs_of(name, runs)
    going_on = [run for run in left_out if args.live and run.get("unfinished")]
    for run in going_on:
        if len(run["curve"]):
            settings.setdefault((run["dataset"], run["setting"]), []).append(run)
    if name in NEEDS_FLATNESS:
        settings = {key: fit for key, found in settings.items() if (fit := with_flatness(found, left_out, args))}
    for run in left_out:
        if run not in going_on:
            print(f"left out: {run['dir']}: {run['problem']}")
    if name == "B1" and not settings or name == "D1":
        settings = {("imagenet" if name == "B1" else "digits", ""): []}
    label = f"{'Figure ' * (name in FIGURES)}{name}"
    files.require(settings, f"no finished runs of {label} under {args.log_dir}/: train them with 'bash runs.sh "
                  f"{EVERYTHING[name][1]}', or name another --log-dir")
    for (dataset, setting), found in settings.items():
        models = {model: {m: own for m in wanted
                          if (own := [run for run in found if (run["model"], run["method"]) == (model, m)])}
                  for model, wanted in methods_of(name, found).items()}
        models = {model: g for model, g in models.items() if set(g) - {"none"} or g and name == "B1"}
        args.papers = is_papers(name, dataset, setting)
        with matplotlib.rc_context(drawing.LOOK):
            canvas, numbers = DRAW[name](name, models, args)
            title = " ".join(filter(None, (dataset, setting)))
            notes = [title]
            if name in NEEDS_FLATNESS:
                notes.append(flatness.in_words([run["flat"] for run in found], args.eigs))
            for model, panel in numbers.items():
                numbers[model] = {**(method_numbers(finished(models[model])) if model in models else {}), **panel,
                                  "paper": PAPER.get((name, model)) if args.papers else None}
                print_numbers(f"{label}, {model}, {title}", numbers[model])
                pairs = numbers[model].get("disagree")
                notes += [f"{model}, best and last accuracy differ in sign: {', '.join(pairs[:3])}" +
                          f" and {len(pairs) - 3} more" * (len(pairs) > 3)] if pairs else []
            title = "\n".join(textwrap.fill(note, int(13 * canvas.get_figwidth())) for note in notes)
            canvas.suptitle(title, fontsize=8, parse_math=False)
            file = "-".join([f"fig{name}" if name in FIGURES else name.replace("table ", "tab"),
                             *([] if args.papers or name == "D1" else notes[0].split()),
                             *(["train"] if name in NEEDS_FLATNESS and args.split == "train" else [])])
            drawing.save(canvas, pathlib.Path(args.fig_dir, file), {
                "figure": name, "dataset": dataset, "setting": setting, "notes": notes[1:], "models": numbers,
                "left_out": {run["dir"]: run["problem"] for run in left_out}})
        print(f"drawn: {args.fig_dir}/{file}.pdf, .png and .json" + f" from {len(found)} runs" * bool(found))
        there, wanted, command = rest_command(name, dataset, setting, found, args.log_dir) if found else (0, 0, "")
        if there < wanted:
            print(f"{there} of {wanted} runs are there; the rest: {command}")


def print_numbers(title, panel):
    print(title)
    if panel.get("methods"):
        print(f"  {'method':22} {'n':>3}" + "".join(f" {what + ' %':>20}" for what, *_ in SUMMARY))
    for method, m in panel.get("methods", {}).items():
        cells = "".join(f" {plus_minus(m[key], digits):>20}" for _, key, digits in SUMMARY)
        print(f"  {method:22} {m['best_acc']['n']:3}{cells}")
    best, last, disagree = (panel.get(k, {}) for k in ("paired_best_acc", "paired_last_acc", "disagree"))
    for pair in best if len(best) <= 15 else disagree:
        print(f"  {pair}, under the same seed: best accuracy {gap_of(best[pair])}, last {gap_of(last[pair])}" +
              ": they disagree" * (pair in disagree))
    for c in panel.get("scatters", []):
        print(f"  {c['y']} against {c['x']}: n = {c['n']}" + "".join(
            f", {stated(c, kind) or KINDS[kind][1] + ' undefined'}" for kind in KINDS))
        if c.get("disagrees"):
            print("    by last accuracy: " + ", ".join(stated(c["by last_acc"], kind) for kind in KINDS))
    for pair, test in panel.get("t_tests", {}).items():
        p = f"p = {test['student'][1]:.2g}" if test["student"] else "no test: too few runs"
        print(f"  {pair}: best {test['difference']:+.2f} points, {p}; last {test['by last_acc']['difference']:+.2f}")


def list_figures(log_dir):
    files.require(log_dir == "logs" or pathlib.Path(log_dir).is_dir(), f"--log-dir {log_dir}: there is no such folder")
    runs = find_runs(log_dir)
    for name, (what, target, models) in EVERYTHING.items():
        source = f"'bash runs.sh {target}'" if target else "no runs"
        print(f"--{'figure ' * (name in FIGURES)}{name}: {what}; from {source}")
        settings, left_out = runs_of(name, runs) if models != {} else ({}, [])
        for (dataset, setting), found in settings.items():
            there, wanted, _ = rest_command(name, dataset, setting, found)
            print(f"    {' '.join(filter(None, (dataset, setting)))}: {there} of {wanted} runs finished")
        if left_out:
            print(f"    {len(left_out)} unfinished or damaged runs")


def draw_live(args):
    """--live: redraws Figure 2 every 20 seconds until no run of it is unfinished."""
    while True:
        runs = find_runs(args.log_dir)
        with contextlib.suppress(files.UserError) if runs_of("2", runs)[1] else contextlib.nullcontext():
            draw("2", runs, args)
        if not any(run.get("unfinished") for run in runs_of("2", runs)[1]):
            return
        time.sleep(20)


def draw_all(names, args):
    """Draws each; what cannot be drawn is one line, and an error only where it is all that there is."""
    runs, errors = find_runs(args.log_dir), []
    for name in names:
        try:
            draw(name, runs, args)
        except files.UserError as error:
            errors.append(error)
            if len(names) > 1:
                print(f"{name}: {error}", file=sys.stderr)
    if len(names) == 1 == len(errors):
        raise errors[0]
    files.require(len(errors) < len(names), "nothing could be drawn")


def main(argv=None):
    parser = files.OneLineParser(prog="analyze.py", description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to do").add_argument
    add("--figure", choices=[*FIGURES, "all"], nargs="+", default=[], metavar="NAME",
        help=f"{', '.join(FIGURES)}; or all, tables included")
    add("--table", choices=TABLES, nargs="+", default=[], help="the tables to draw")
    add("--flatness", nargs="+", default=[], metavar="RUN_DIR",
        help="measure the flatness (E) of these runs' networks into flatness.json there")
    add("--list", action="store_true", help="list the figures and the runs there are for them")
    add("--live", action="store_true", help="with --figure 2: redraw every 20 s while runs go on")
    add = parser.add_argument_group("flatness, of the runs named or those of a figure").add_argument
    add("--eigs", type=int, default=100, help="eigenvalues of the Hessian (default: 100)")
    add("--images", type=int, default=512, help="images of the split, the first ones (default: 512)")
    add("--split", choices=("test", "train"), default="test", help="train goes to flatness-train.json (default: test)")
    add("--eig", choices=("lanczos", "power"), default="lanczos",
        help="power is the paper's method, slower and less precise (default: lanczos)")
    add("--memory-gb", type=float, default=4, help="for graphs and activations; the eigenvectors need 4.3 * eigs "
        "copies of the network beside that (default: 4)")
    add = parser.add_argument_group("files").add_argument
    add("--log-dir", default="logs", help="(default: logs)")
    add("--fig-dir", default="figures", help="(default: figures)")
    add("--data-dir", default="data", help="where <dataset>.npz lies or is put (default: data)")
    try:
        args = parser.parse_args(argv)
        files.require(args.figure or args.table or args.list or args.flatness,
                      "nothing to do: give --figure, --table, --flatness or --list")
        files.require(not args.live or args.figure == ["2"], "--live is for --figure 2")
        for name in ("eigs", "images", "memory_gb"):
            value = getattr(args, name)
            files.require(0 < value < 1e6, f"--{name.replace('_', '-')} {files.short(value)}: give a number above 0 and"
                          " below a million")
        if args.list:
            list_figures(args.log_dir)
        for run_dir in args.flatness:
            measure_flatness(run_dir, args)
        if args.live:
            draw_live(args)
        elif args.figure or args.table:
            names = args.figure + [f"table {name}" for name in args.table]
            draw_all(list(EVERYTHING) if "all" in names else names, args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return files.tell(error, "analyze.py", "figures drawn so far are complete")


if __name__ == "__main__":
    sys.exit(main())
