#!/usr/bin/env python3
"""Train a network, prune it while it trains, and measure how stable its accuracy is under pruning.

The paper is "The Generalization-Stability Tradeoff in Neural Network Pruning" (NeurIPS 2020,
arXiv 1906.03728). Section numbers are those of its appendix. Every default is the paper's setting
for the model (Figure 2; Figure 4 for SGD).

    python train.py --model vgg11 --target L --r 40                  # Prune_L, r = 40, CIFAR-10
    python train.py --model vgg11 --target none --scale-epochs 0.08  # the baseline, in 26 epochs
    python train.py --model vgg11 --target L --noise zero --noise-batches 50
    python train.py --model resnet20 --target S --r 60               # SGD, l1 scores, every layer
    python train.py --model vgg11 --target S --seeds 1-10            # one run after the other

A run leaves logs/<dataset>/<model>/<method>/seed<k>/ with config.json, epochs.jsonl,
checkpoint.pt and, at its end, done.json (docs/files.md). The same command again continues a
stopped run and leaves a finished one alone. The training loop is `train`, at the end.
"""
import argparse
import contextlib
import functools
import inspect
import math
import os
import pathlib
import runpy
import shlex
import signal
import sys
import threading
import time
import warnings
import zlib
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F

from gst_ext import ops, rundir
from gst_ext.datasets import (CIFAR, CROP_PADDING, crop_and_flip, dataset_info, dataset_label,
                              dataset_path, draw_crops, load_dataset, normalise, prepare_data)
from gst_ext.errors import (OneLineParser, UserError, check, first_line, format_value, print_line,
                            repeated, report_error, seed_list, warn_once)
from gst_ext.graphs import Graphs, side_stream, to_list
from gst_ext.networks import (ACT_EMA_DECAY, BN_EPS, BN_MOMENTUM, PRUNABLE_BLOCKS, add_own_network,
                              build_model, count_params_and_macs, graph_key, set_backend)

# cuBLAS reads this when CUDA starts; --deterministic needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# +-- Options: the paper's settings, the command line, the run's name -----------------------------+

SCORES = {  # name: the function block → the score of each of its filters, (c_out,) (A.4, B.2)
    "l1": lambda block: block.conv.weight.detach().flatten(1).abs().sum(1),
    "l2": lambda block: block.conv.weight.detach().flatten(1).square().sum(1).sqrt(),
    "act": lambda block: block.act.clone(),
    "ebn": lambda block: ops.ebn_score(block.bn.weight.double(), block.bn.bias.double()),
    "ebn-signed": lambda block: ops.ebn_score(block.bn.weight.double(), block.bn.bias.double(),
                                              signed=True),
}
PAPER_SCORES = tuple(SCORES)
OWN_MODELS = {}  # name: what --model FILE.py:FUNCTION gave: its file, crc32, blocks and options
MOMENTUM = 0.9  # of SGD (A.3)
ACT_EVERY = 10  # training batches between updates of the act score (A.4, footnote 4)
THREADS = torch.get_num_threads()  # a run that continues may change it
ROUND_TO = {"cpu": 1, "cuda": 32}  # GPUs are faster on numbers of filters that are multiples of 32
CHECKPOINT_SECONDS = {"cpu": 0, "cuda": 30}  # least time between two: writing is slow

OPTIMIZERS = {
    "adam": dict(lr=0.001, weight_decay=0.0, epochs=325, lrs=[150, 300], augment=False),  # A.3, B.1
    "sgd": dict(lr=0.1, weight_decay=1e-4, epochs=165, lrs=[83, 125], augment=True),  # Fig. 4, C.3
}
ADAM_PRUNING = {  # of the last four prunable layers (B.1)
    "vgg": dict(s=[3, 4, 5, 6], e=[150, 150, 150, 275], p=[0.3, 0.3, 0.3, 0.9], r=40, score="l2",
                save_epoch=315),
    "resnet": dict(s=[7, 8, 9, 10], e=[150, 150, 170, 275], p=[0.25, 0.4, 0.25, 0.95], r=40,
                   score="act", save_epoch=0),
}
DEFAULTS = dict(  # of the other options that decide a result
    dataset="cifar10", width=1.0, scale_epochs=1.0, batch_size=128, test_batch_size=128,
    val_split=0, train_images=0, test_images=0, label_noise=0.0, precision="fp32",
    deterministic=False)
SMALL = dict(train_images=2560, test_images=3000, width=0.25, batch_size=64, scale_epochs=0.1)
DIGITS = dict(dataset="digits", width=0.25)
# Pruned networks have time to recover: 7 of 18 epochs follow the last event.
QUICK = dict(DIGITS, train_images=400, test_images=500, batch_size=32, lr=0.005, epochs=450,
             lrs=[400], scale_epochs=0.04)
PRESETS = {  # what --preset changes, by optimizer
    "quick": {"adam": QUICK,
              "sgd": dict(DIGITS, val_split=300, batch_size=12, scale_epochs=0.08, p=0.5)},
    "small": {"adam": SMALL, "sgd": dict(SMALL, p=0.5)},
}  # p: of a narrow layer, the paper's 0.1 is one filter or none
RUNTIME_OPTIONS = (  # they do not decide what a run computes
    "log_dir", "data_dir", "device", "backend", "cuda_graphs", "save_epoch", "tensorboard", "seeds",
    "runs", "plan", "retry_failed", "status", "preset")
LIST_OPTIONS = ("runs", "plan", "status", "retry-failed")
DATA_OPTIONS = ("val_split", "train_images", "test_images", "label_noise", "augment")


def paper_options(model, optimizer=None):
    """Returns the paper's options for a model, a dict; optimizer None is the paper's own.

    Of an own model they are those that its file gives.
    """
    if model in OWN_MODELS:
        chosen = {"optimizer": optimizer} if optimizer else {}
        return {"save_epoch": 0} | OWN_MODELS[model]["options"] | chosen
    optimizer = optimizer or ("sgd" if model in ("resnet20", "resnet56") else "adam")
    n = PRUNABLE_BLOCKS[model]
    pruning = dict(s=[40] * n, e=[100] * n, p=[0.1] * n, r=30, score="l1", save_epoch=0)
    if optimizer == "adam":
        pruning = ADAM_PRUNING[model.rstrip("0123456789")]
    return dict(optimizer=optimizer, **OPTIMIZERS[optimizer], **pruning)


def default_options(model, optimizer=None, preset=None):
    """Returns the options a run uses where none is given: the paper's, or a preset's."""
    options = DEFAULTS | paper_options(model, optimizer)
    if preset:
        options |= PRESETS[preset].get(options.get("optimizer"), {})
    if isinstance(options.get("p"), float):
        options["p"] = [options["p"]] * num_blocks(model)
    return options


def num_blocks(model):
    return OWN_MODELS[model]["blocks"] if model in OWN_MODELS else PRUNABLE_BLOCKS[model]


def read_function(text, kind, known, papers):
    """Reads FILE.py:FUNCTION, or a name in `known`; returns the name and all that the file defines.

    The latter is {} for a name alone. `papers` are names that no function may have.
    """
    file, _, name = text.rpartition(":")
    if not file:
        if name not in known:
            raise argparse.ArgumentTypeError(f"no {kind} {name}: choose from {', '.join(known)}, "
                                             "or give FILE.py:FUNCTION")
        return name, {}
    try:
        defined = runpy.run_path(file)
        if not callable(defined[name]):
            raise TypeError(f"it is {defined[name]}")
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{file} does not give a function {name} "
                                         f"({first_line(error)})") from None
    if name in papers:
        raise argparse.ArgumentTypeError(f"{name} is one of the paper's {kind}s: rename it")
    return name, defined


def score_name(text):
    """An argparse type: a name in SCORES, or FILE.py:FUNCTION, which is added to SCORES."""
    name, defined = read_function(text, "score", SCORES, PAPER_SCORES)
    if defined:
        SCORES[name] = defined[name]
    return name


def target_name(text):
    """An argparse type: "none", "S", "L", "R", or "Q" and a quantile above 0 and below 1."""
    if text in ("none", "S", "L", "R"):
        return text
    try:
        quantile = float(text.removeprefix("Q"))
        if text[0] == "Q" and 0 <= quantile <= 1:
            return {0: "S", 1: "L"}.get(quantile, f"Q{format_value(quantile)}")
    except (ValueError, IndexError):
        pass
    raise argparse.ArgumentTypeError(
        f"no target {text}: give none, S, L, R, or Q and a quantile from 0 to 1, as in Q0.75")


def model_name(text):
    """An argparse type: a model's name, or FILE.py:FUNCTION, which is added to OWN_MODELS."""
    name, defined = read_function(text, "model", PRUNABLE_BLOCKS | OWN_MODELS, PRUNABLE_BLOCKS)
    if defined:
        file = pathlib.Path(text.rpartition(":")[0]).resolve()
        try:
            OWN_MODELS[name] = {
                "file": str(file), "crc32": zlib.crc32(file.read_bytes()),
                "blocks": add_own_network(name, defined[name]),
                "options": own_options(defined.get("OPTIONS", ""))}
        except Exception as error:
            raise argparse.ArgumentTypeError(f"{name} of {file.name} is no network to prune: "
                                             f"{first_line(error)}") from None
    return name


def own_options(text):
    """Returns the options that OPTIONS, a str in the file of an own model, gives; a dict."""
    words = shlex.split(text)
    check(not any(word.startswith("--model") for word in words), "OPTIONS names a --model: remove "
          "that")
    none = vars(parse_arguments([]))
    given = {k: v for k, v in vars(parse_arguments(words)).items() if v != none[k]}
    others = [k for k in given if k not in default_options("vgg11")]
    check(not others, f"OPTIONS gives {', '.join(others)}, which a network has no default of: "
          "remove that")
    return given


def make_parser():
    lines = ["the paper's settings, used for every option that is not given:"]
    for model, optimizer in [("vgg11", "adam"), ("resnet18", "adam"), ("resnet20", "sgd")]:
        values = paper_options(model, optimizer).items()
        lines.append(f"  {model}: " + " ".join(f"{k}={format_value(v)}" for k, v in values))
    lines.append("  vgg19 is like vgg11, resnet56 like resnet20.")
    parser = OneLineParser(prog="train.py", description=__doc__, epilog="\n".join(lines),
                           allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag, number = argparse.BooleanOptionalAction, dict(type=int, metavar="N")
    add = parser.add_argument_group("network and data").add_argument
    add("--model", type=model_name, metavar="NAME", default="vgg11", help=f"one of "
        f"{', '.join(PRUNABLE_BLOCKS)}, or FILE.py:FUNCTION, a network of your own "
        "(docs/networks.md; default: vgg11)")
    add("--preset", choices=PRESETS, help="a set of options, which given ones override: quick is a "
        "few epochs of digits, small is CIFAR-10 with few images")
    add("--width", type=float, help="multiplies every channel count (default: 1)")
    add("--dataset", help="cifar10, cifar100, digits, a .npz file or a folder (docs/data.md; "
        "default: cifar10)")
    add("--data-dir", default="data", help="where <dataset>.npz is or will be (default: data)")
    add("--val-split", **number, help="validation images taken from the training set (default: 0)")
    add("--train-images", **number, help="use N of the training images, 0 for all (default: 0)")
    add("--test-images", **number, help="use N of the test images, 0 for all (default: 0)")
    add("--label-noise", type=float, metavar="F", help="give a fraction F of the training images a "
        "random class, the same for every seed and method (default: 0)")
    add("--augment", action=flag, help="random crop and flip (default: the paper's)")

    add = parser.add_argument_group("pruning (defaults: the paper's, listed below)").add_argument
    add("--target", type=target_name, metavar="T", help="none, or the filters to prune: S, those "
        "with the smallest scores, L, the largest, R, random ones, or Q0.75, those around the 0.75 "
        "quantile of the scores, where Q0 is S and Q1 is L (default: none)")
    add("--r", type=int, help="retrain period: epochs between pruning events")
    for name, kind, what in (("s", int, "first epochs"), ("e", int, "last epochs"),
                             ("p", float, "fractions of filters")):
        add(f"--{name}", type=repeated(kind), nargs="+", metavar=name, help=f"{what} of pruning, "
            "one value (VxN: N times V) for each of the last n prunable layers")
    add("--score", type=score_name, metavar="NAME", help="what makes a filter small or large: "
        f"{', '.join(SCORES)}, or FILE.py:FUNCTION, a function as in SCORES")
    add("--scratch", action=flag, default=False, help="prune everything at initialization")
    add("--prune-bn", choices=("drop", "keep"), default="drop", help="prune a filter's batch norm "
        "and shortcut, too, or keep them (default: drop)")

    add = parser.add_argument_group("noise instead of pruning (appendix D)").add_argument
    add("--noise", choices=("none", "zero", "gauss"), default="none", help="add noise to the "
        "targeted filters instead of removing them (default: none)")
    add("--noise-batches", type=int, metavar="K", help="an event's noise ends after K training "
        "batches; 1 is a single application, at the first test batch (default: 1)")
    add("--noise-filters", choices=("newest", "all"), help="the filters of the event only, or of "
        "all events so far (default: newest)")
    add("--noise-restore", action=flag, help="zero batch norm, too, and restore all values "
        "afterwards, D.2 (default: no)")

    add = parser.add_argument_group("optimization and schedule").add_argument
    add("--optimizer", choices=OPTIMIZERS, help="(default: the paper's for the model)")
    add("--lr", type=float, help="initial learning rate")
    add("--weight-decay", type=float)
    add("--batch-size", type=int, help="(default: 128)")
    add("--test-batch-size", type=int, help="each test batch has its own noise (default: 128)")
    add("--epochs", type=int)
    add("--lrs", type=repeated(int), nargs="*", metavar="epoch", help="epochs at which the rate is "
        "divided by ten")
    add("--scale-epochs", type=float, metavar="F", help="multiply epochs, lrs, s, e, r and noise "
        "batches by F, rounded, r at least 1 (default: 1)")
    add("--seed", type=int, default=1, help="(default: 1)")

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--backend", choices=("auto", "ext", "eager"), default="auto", help="ext: the extension, "
        "which computes live filters only; eager: plain PyTorch, masked (default: ext if built)")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="(default: fp32)")
    add("--deterministic", action=flag, help="use deterministic CUDA kernels only; docs/files.md "
        "says when CPU runs repeat exactly (default: no)")
    add("--cuda-graphs", action=flag, default=True, help="capture steps as CUDA graphs")
    add("--log-dir", default="logs", help="(default: logs)")
    add("--save-epoch", **number, help="keep the weights after epoch N as epoch<N>.pt; 0: no")
    add("--tensorboard", action=flag, default=False, help="write <run>/tensorboard, too")

    add = parser.add_argument_group("several runs, one after the other").add_argument
    add("--seeds", type=seed_list, metavar="1-10", help="a run for each seed, 1-10 or 1,4,7")
    add("--runs", metavar="FILE", help="train the runs listed in FILE, a line of options each")
    add("--plan", metavar="FILE", help="train nothing: report how many of the runs in FILE are "
        "left, download their data, and print their lines")
    add("--retry-failed", action=flag, default=False, help="count failed runs as left in --plan")
    add("--status", metavar="FILE", nargs="+", help="train nothing: report on the runs in FILE")
    return parser


def parse_arguments(argv):
    """Parses options; those that are not given are None, or have the parser's defaults."""
    options = make_parser().parse_args(argv)
    for name in ("s", "e", "p", "lrs"):
        if getattr(options, name) is not None:
            setattr(options, name, [value for part in getattr(options, name) for value in part])
    return options


def parse_options(argv):
    """Parses and checks options (a list of str) and fills in the defaults.

    Returns:
        An argparse.Namespace, in which options that the run does not use are None.

    Raises:
        UserError: An option is wrong, or would have no effect.
    """
    options = parse_arguments(argv)
    given = {name for name, value in vars(options).items() if value is not None}
    defaults = default_options(options.model, options.optimizer, options.preset)
    for name, value in defaults.items():
        if name not in given:
            setattr(options, name, value)
    missing = [f"--{name.replace('_', '-')}" for name in paper_options("vgg11")
               if getattr(options, name) is None]
    check(not missing, f"{options.model} has no default of {', '.join(missing)}: give them here, "
          "or in OPTIONS of its file")
    check_ranges(options)
    check_combinations(options, given, argv)
    options.target = options.target or "none"
    if options.noise != "none":
        options.noise_batches = options.noise_batches or 1
        options.noise_filters = options.noise_filters or "newest"
        options.noise_restore = bool(options.noise_restore)
    check_schedule(options, given)

    if options.target == "none" or options.scratch:
        options.r = options.s = options.e = None
    if options.target == "none":
        options.p = None
    if options.target in ("none", "R"):
        options.score = None
    if options.save_epoch > options.epochs:
        options.save_epoch = 0
    return options


def check_ranges(options):
    """Checks each value by itself."""
    from_0 = ("seed", "val_split", "train_images", "test_images", "save_epoch")
    from_1 = ("epochs", "batch_size", "test_batch_size", "r", "noise_batches")
    for name in from_0 + from_1:
        value, least = getattr(options, name), int(name in from_1)
        check(value is None or least <= value < 2**32,
              f"--{name.replace('_', '-')} {value}: give {least} or more, below 2^32")
    for name in ("width", "scale_epochs", "lr", "weight_decay"):
        value = getattr(options, name)
        check(0 < value < 1e6 or value == 0 and name == "weight_decay",
              f"--{name.replace('_', '-')} {format_value(value)}: give a number above 0 and below "
              "a million")
    check(0 <= options.label_noise <= 1, f"--label-noise {format_value(options.label_noise)}: give "
          "a fraction from 0 to 1")
    check(min(options.lrs, default=0) >= 0,
          f"--lrs {format_value(options.lrs)}: epochs count from 0")
    check(all(0 <= p < 1 for p in options.p), f"--p {format_value(options.p)}: give fractions from "
          "0 to below 1, since a layer without filters cuts the network in two")


def check_combinations(options, given, argv):
    """Refuses options that exclude each other, or would have no effect beside the others."""
    lists = [f"--{name}" for name in ("runs", "plan", "status") if name in given]
    check(len(lists) < 2, f"{' and '.join(lists)} exclude each other: choose one")
    check(not options.retry_failed or lists == ["--plan"],
          f"--retry-failed is for --plan{', not ' * bool(lists)}{''.join(lists)}")
    if lists:
        others = [arg for arg in argv if arg.startswith("--")
                  and arg.split("=")[0][2:] not in LIST_OPTIONS]
        check(not others, f"{' '.join(others)} cannot be combined with a list of runs: put it on "
              "the lines of the list")
    check(options.seeds is None or not any(arg.split("=")[0] == "--seed" for arg in argv),
          "--seed and --seeds exclude each other: choose one")
    pruning, noise = options.target not in (None, "none"), options.noise != "none"
    check(pruning or not (options.scratch or noise),
          "--scratch and --noise need filters: give --target S, L, R or Q0.5 too")
    check(not (noise and options.scratch), "--noise and --scratch exclude each other: choose one")
    check(options.prune_bn == "drop" or pruning and not noise,
          "--prune-bn keep needs a --target, and no --noise")
    for name in {"noise_batches", "noise_filters", "noise_restore"} & given:
        check(noise, f"--{name.replace('_', '-')} does nothing without --noise: add --noise zero "
              "or gauss")
    check(not options.noise_restore or options.noise == "zero",
          "--noise-restore is for --noise zero")
    for name in {"s", "e", "p", "r", "score"} & given:  # a given --target none ignores them
        check("target" in given, f"--{name} does nothing without --target: add --target S, L, R or "
              "Q0.5")


def check_schedule(options, given):
    """Checks the pruning schedule against the network and the epochs."""
    lengths = ", ".join(f"{len(getattr(options, k))} (--{k}{'' if k in given else ', the default'})"
                        for k in "sep")
    check(len(options.s) == len(options.e) == len(options.p) or options.scratch,
          f"--s, --e and --p need one value for each pruned layer: there are {lengths}")
    n = num_blocks(options.model)
    check(len(options.p) <= n, f"--p has {len(options.p)} values, but {options.model} has {n} "
          "layers to prune: give fewer")
    for s, e in zip(options.s, options.e):
        check(0 <= s <= e, f"pruning starts at epoch {s} and ends at {e}: each s must be 0 or more "
              "and at most its e")
    if options.target != "none" and not options.scratch:
        check(max(options.e) < options.epochs, f"pruning ends at epoch {max(options.e)}, but "
              f"epochs count from 0 to {options.epochs - 1}: lower --e or raise --epochs")
    check("save_epoch" not in given or options.save_epoch <= options.epochs,
          f"--save-epoch {options.save_epoch} is past the last of {options.epochs} epochs")


def scaled_schedule(options):
    """Returns epochs, lrs, s, e, r, save_epoch, noise_batches after --scale-epochs, a dict."""
    def scale(x):
        return math.floor(Fraction(str(options.scale_epochs)) * x + Fraction(1, 2))

    scaled = {name: getattr(options, name) and [scale(x) for x in getattr(options, name)]
             for name in ("lrs", "s", "e")}
    scaled["epochs"] = max(1, scale(options.epochs))
    scaled["save_epoch"] = options.save_epoch and max(1, scale(options.save_epoch))
    scaled["r"] = options.r and max(1, scale(options.r))
    k = options.noise_batches  # a single application (1) stays one
    scaled["noise_batches"] = k if k in (None, 1) else max(2, scale(k))
    if scaled["e"]:  # rounding up must not move the last pruning event past the end
        scaled["e"] = [min(e, scaled["epochs"] - 1) for e in scaled["e"]]
        scaled["s"] = [min(s, e) for s, e in zip(scaled["s"], scaled["e"])]
    return scaled


def lr_schedule_warnings(options, scaled):
    """Returns warnings, a list of str, about milestones in --lrs that have no effect.

    A milestone that is given and equals the number of epochs means "never".
    """
    lrs, n, lines = options.lrs, options.epochs, []
    default = lrs == paper_options(options.model, options.optimizer).get("lrs")
    if max(lrs, default=0) > n - default:
        lines.append(f"of --lrs {format_value(lrs)} some are past the last epoch, {n - 1}: give "
                     "--lrs that fit --epochs, or --lrs alone for none")
    used = {x for x in lrs if x < n}
    left = {x for x in scaled["lrs"] if x < scaled["epochs"]}
    if len(left) < len(used) or 0 in left and 0 not in used:
        lines.append(f"--scale-epochs {format_value(options.scale_epochs)} makes --lrs "
                     f"{format_value(lrs)} of {n} epochs {format_value(scaled['lrs'])} of "
                     f"{scaled['epochs']}, which loses a fall of the learning rate: give --epochs "
                     "and --lrs")
    return lines


def run_name(options):
    """Returns (method, setting), str: what is done to the filters, and everything else.

    Both name what differs from the paper's settings or, with a preset, from the preset's.
    """
    default = default_options(options.model, options.optimizer, options.preset)
    default["optimizer"] = paper_options(options.model).get("optimizer")

    def differing(**labels):
        return [label + format_value(getattr(options, name)) for name, label in labels.items()
                if getattr(options, name) not in (None, default.get(name))]

    if options.noise != "none":
        method = [options.noise, str(options.noise_batches)]
        method += [options.target] * (options.target != "L") + differing(r="r")
        method += [options.noise_filters] * (options.noise_filters != "newest")
        method += ["restore"] * options.noise_restore + differing(test_batch_size="tb")
    elif options.scratch:
        method = ["scratch", options.target]
    else:
        method = [options.target] + [f"r{options.r}"] * (options.target != "none")
    method += differing(score="") + ["bnkeep"] * (options.prune_bn == "keep")
    method += differing(s="s", e="e", p="p")
    setting = differing(optimizer="") + [options.preset] * bool(options.preset)
    setting += differing(width="w", scale_epochs="x", epochs="epochs", lrs="lrs", lr="lr",
                         weight_decay="wd", batch_size="batch", val_split="val", train_images="n",
                         test_images="t", label_noise="noise", precision="")
    setting += (["augment" if options.augment else "noaugment"]
                * (options.augment != default.get("augment")))
    return "-".join(method), "-".join(setting + ["deterministic"] * options.deterministic)


def run_path(options):
    """Returns the run's directory: <log_dir>/<dataset>/<model>/<method>[-<setting>]/seed<k>."""
    name = "-".join(filter(None, run_name(options)))
    if len(name.encode()) > 200:  # file systems allow 255 bytes; config.json holds every option
        name = f"{name[:180]}-{zlib.crc32(name.encode()):08x}"
    return pathlib.Path(options.log_dir, dataset_label(options.dataset), options.model, name,
                        f"seed{options.seed}")


def experiment_options(options):
    """Returns the options that decide what a run computes, a dict."""
    return {k: v for k, v in vars(options).items() if k not in RUNTIME_OPTIONS}


# +-- Data: the whole data set is on the device as uint8 ------------------------------------------+

@functools.lru_cache(maxsize=1)  # consecutive runs share a data set
def load_arrays(dataset, data_dir):
    """Returns a data set's arrays and their dataset_info."""
    arrays = load_dataset(dataset, data_dir)
    return arrays, dataset_info(arrays)


@functools.lru_cache(maxsize=1)
def load_prepared(dataset, data_dir, device, **split_options):
    """Returns prepare_data of a data set."""
    return prepare_data(load_arrays(dataset, data_dir)[0], device, **split_options)


# +-- Pruning: when (A.4), which filters (B), and how they are removed ----------------------------+

def pruning_epochs(s, e, r):
    """Returns the epochs after whose training a layer is pruned: s, s+r, ... up to e (A.4).

    The number that the paper prints counts one past e whenever r divides e - s + 1.
    """
    return range(s, e + 1, r)


def num_filters_to_keep(n, p, n_iter):
    """Returns how many of n filters remain after each of n_iter events, a list (A.4).

    The pruned fraction p is read as a decimal number: (1 - 0.3) * 10 is 7, not the ceiling of
    7.000000000000001.
    """
    m = math.ceil((1 - Fraction(str(p))) * n)
    return [math.ceil(m + Fraction((n - m) * (n_iter - j), n_iter)) for j in range(1, n_iter + 1)]


def pruning_schedule(model, options, scaled):
    """Returns {layer: {epoch: number of filters to keep}}, layer an index into model.prunable.

    With --scratch the only epoch is -1, before the first.
    """
    schedule, fractions = {}, options.p or ()
    for i, p in enumerate(fractions):
        layer = len(model.prunable) - len(fractions) + i
        epochs = [-1]
        if not options.scratch:
            epochs = pruning_epochs(scaled["s"][i], scaled["e"][i], scaled["r"])
        n = len(model.prunable[layer].mask)
        schedule[layer] = dict(zip(epochs, num_filters_to_keep(n, p, len(epochs))))
    return schedule


def filter_scores(block, score):
    """Returns the score of each filter of `block`, (c_out,), by its name in SCORES."""
    check(score in SCORES, f"no score {score}: choose from {', '.join(SCORES)}")
    values, n = SCORES[score](block), len(block.mask)
    shape = tuple(values.shape) if torch.is_tensor(values) else type(values).__name__
    check(shape == (n,), f"the score {score} gives {shape} for a block of {n} filters: let it "
          f"return a tensor of shape ({n},)")
    return values


def select_filters(scores, mask, k, target, generator=None):
    """Selects k of the live filters: ascending indices (k,) on the CPU.

    Args:
        scores: (c,); not used for target R. Of equal scores the lower index is selected.
        mask: (c,) bool, True for a live filter.
        target: "R" uniformly random (by `generator`). Otherwise k filters that are next to each
            other in the order of their scores: "S" the smallest, "L" the largest, "Q0.75" those
            with three quarters of the remaining filters below them.
    """
    live = mask.cpu().nonzero().flatten()
    check(k <= len(live), f"cannot prune {k} of {len(live)} live filters")
    if target == "R":
        return live[torch.randperm(len(live), generator=generator)[:k]].sort().values
    scores = scores.detach().cpu()[live]
    check(not scores.isnan().any(), "a filter's score is NaN: lower --lr", code=1)
    quantile = {"S": 0, "L": 1}[target] if target in "SL" else float(target[1:])
    scores, order = torch.sort(scores, stable=True)
    first = math.floor(quantile * (len(live) - k) + 0.5)
    selected = order[first:first + k]
    if k:  # the sort puts the higher of equal indices last, where L would take them
        tied = (scores == scores[first]).nonzero().flatten()
        num = min(k, int((tied >= first).sum()))
        selected = torch.cat([order[tied[:num]], selected[num:]])
    return live[selected].sort().values


def count_ties(scores, mask, indices):
    """Counts the live filters (mask) whose score both a selected and a remaining filter have.

    Between these the order of the filters decided, and not their scores.
    """
    selected = torch.zeros_like(mask, device="cpu")
    selected[indices] = True
    remaining = mask.cpu() & ~selected
    shared = set(scores[selected].tolist()) & set(scores[remaining].tolist())
    return sum(s in shared for s in scores[selected | remaining].tolist())


@torch.no_grad()
def prune_filters(block, indices, keep_bn=False, optimizer=None):
    """Removes filters for good: their weights, bias, batch norm and shortcut become 0.

    With keep_bn only the weights do (D.1's Prune_L). The optimizer's state of the filters is
    cleared, since momentum would move the zeros.
    """
    indices = indices.to(block.mask.device)
    block.mask[indices] = False
    params = [block.conv.weight]
    if not keep_bn:
        block.bn_mask[indices] = False
        params = [*block.conv.parameters(), *block.bn.parameters()]
    for param in params:
        param[indices] = 0
        for value in optimizer.state[param].values() if optimizer else ():
            if torch.is_tensor(value) and value.shape == param.shape:
                value[indices] = 0


def num_filters_to_prune(model, schedule, epoch, noise=None):
    """Returns {layer: number of filters to prune after this epoch}, without zeros.

    With a FilterNoise, filters ever noised count as pruned.
    """
    numbers = {}
    for layer, keep in schedule.items():
        if epoch in keep:  # counting live filters synchronizes a GPU
            live = noise.never_noised(layer) if noise else model.prunable[layer].mask
            num = int(live.sum()) - keep[epoch]
            if num > 0:
                numbers[layer] = num
    return numbers


def pruning_event(model, optimizer, score, target, generator, noise, keep_bn, numbers,
                  allow_ties=False):
    """Removes filters or, with a FilterNoise, starts their noise.

    Args:
        generator: The random generator of target R.
        numbers: {layer: number of filters}, from num_filters_to_prune.
        allow_ties: Whether all filters of a layer may have the same score.

    Returns:
        ({layer: list of the filters' indices}, {layer: count_ties, where it is not 0}).
    """
    pruned, ties = {}, {}
    for layer, k in numbers.items():
        block = model.prunable[layer]
        if noise:
            noise.stop(layer)  # scores are those without noise
        live = noise.never_noised(layer) if noise else block.mask
        scores = None if target == "R" else filter_scores(block, score).cpu()
        indices = select_filters(scores, live, k, target, generator)
        if target != "R" and (num_tied := count_ties(scores, live, indices)):
            check(num_tied < int(live.sum()) or allow_ties, f"all {num_tied} filters of layer "
                  f"{layer} have the same {score} score, which selects none: prune later (--s; "
                  f"act is updated on every {ACT_EVERY}th batch), or choose another --score",
                  code=1)
            ties[layer] = num_tied
            print_line(f"layer {layer}: {num_tied} filters have the {score} score at which the "
                       "pruning stops, so their order decided")
        if noise:
            noise.start(layer, indices)
        else:
            prune_filters(block, indices, keep_bn, optimizer)
        pruned[layer] = indices.tolist()
    set_backend(model, model.backend)  # updates the channel indices
    return pruned, ties


# +-- Noise instead of pruning (D): the schedule selects filters, but they stay and get noise -----+

class FilterNoise:
    """The noise of one run on blocks {layer: Block}; the other arguments are the --noise options.

    Attributes:
        state: {layer: dict}: "noised", a mask of the filters ever noised; "active", the indices
            noised now, or None; "reference", a filter never noised; "test" and "train", the
            batches with noise since the event; "saved", the values to restore.
    """

    def __init__(self, blocks, kind, batches, filters, restore, generator):
        self.blocks, self.kind, self.batches = blocks, kind, batches
        self.filters, self.restore, self.generator = filters, restore, generator
        self.state = {layer: {"noised": torch.zeros_like(block.mask, device="cpu"), "active": None,
                              "reference": 0, "test": 0, "train": 0, "saved": None}
                      for layer, block in blocks.items()}

    def never_noised(self, layer):
        return ~self.state[layer]["noised"]

    def tensors(self, block):
        """Returns the tensors that noise changes, indexed by filter."""
        bn = block.bn
        extra = [bn.weight, bn.bias, bn.running_mean, bn.running_var] if self.restore else []
        return [block.conv.weight, *extra]

    @torch.no_grad()
    def start(self, layer, indices):
        """Starts an event's noise on filters `indices` of a layer."""
        self.stop(layer)  # restores an earlier event's values before they are saved again
        block, state = self.blocks[layer], self.state[layer]
        state["noised"][indices] = True
        active = indices if self.filters == "newest" else state["noised"].nonzero().flatten()
        state.update(active=active.to(block.mask.device), test=0, train=0,
                     reference=int((~state["noised"]).nonzero()[0]))
        if self.restore:
            state["saved"] = [t[state["active"]].clone() for t in self.tensors(block)]

    @torch.no_grad()
    def apply(self, training):
        """Changes the active filters' weights in place; called before every forward pass."""
        for layer, state in self.state.items():
            block, active = self.blocks[layer], state["active"]
            if active is None:
                continue
            state["train" if training else "test"] += 1
            weight = block.conv.weight
            if self.kind == "gauss":
                noise = torch.randn((len(active), *weight.shape[1:]), generator=self.generator,
                                    device=weight.device)
                weight[active] += weight[state["reference"]].std() * noise
            else:
                for tensor in self.tensors(block)[:3]:  # not the running statistics
                    tensor.index_fill_(0, active, 0)

    def after_batch(self):
        """Ends the noise that has lasted long enough; called after each training or test batch."""
        for layer, state in self.state.items():
            if self.batches == 1 or state["train"] == self.batches:
                self.stop(layer)

    @torch.no_grad()
    def stop(self, layer):
        """Ends a layer's noise and restores what was saved."""
        state = self.state[layer]
        if state["active"] is not None and self.restore:
            for tensor, saved in zip(self.tensors(self.blocks[layer]), state["saved"]):
                tensor[state["active"]] = saved
        state.update(active=None, saved=None)

    def load(self, state, device):
        """Restores the state of a checkpoint."""
        for layer, saved in state.items():
            self.state[layer].update(saved)
            if saved["active"] is not None:
                values = saved["saved"] and [tensor.to(device) for tensor in saved["saved"]]
                self.state[layer].update(active=saved["active"].to(device), saved=values)


# +-- What a run records: its config, a line an epoch, a summary ----------------------------------+

def score_fingerprint(score):
    """Returns a checksum of a --score function's source; None without one, or for the paper's.

    It does not cover what the function calls or reads.
    """
    if score in (None, *PAPER_SCORES):
        return None
    with contextlib.suppress(OSError, TypeError):
        return zlib.crc32(inspect.getsource(SCORES[score]).encode())


def run_config(options, scaled, schedule, model, device, info):
    """Returns the content of config.json (docs/files.md)."""
    method, setting = run_name(options)
    num_params, macs = count_params_and_macs(model, info["image"])
    return {
        "method": method, "setting": setting, "options": experiment_options(options),
        "schedule": scaled, "score_crc32": score_fingerprint(options.score),
        "own_model": OWN_MODELS.get(options.model),
        "pruned_layers": [{"layer": layer, "filters": len(model.prunable[layer].mask),
                           "epochs": list(keep), "kept": list(keep.values())}
                          for layer, keep in schedule.items()],
        # in %, of the layer that loses most (A.4)
        "iterative_rate": max((100 * p / len(keep) for p, keep in
                               zip(options.p or (), schedule.values())), default=0.0),
        "parameters": num_params, "macs": macs,
        "constants": {"momentum": MOMENTUM, "adam_betas": [0.9, 0.999], "adam_eps": 1e-8,
                      "bn_momentum": BN_MOMENTUM, "bn_eps": BN_EPS, "act_keep": ACT_EMA_DECAY,
                      "act_every": ACT_EVERY, "crop_padding": CROP_PADDING},
        "data": info | {"train": options.train_images or info["train"] - options.val_split,
                        "val": options.val_split or info.get("val", 0),
                        "test": options.test_images or info["test"]},
        "data_path": os.path.abspath(dataset_path(options.dataset, options.data_dir)),
        **rundir.environment(device, model.backend, __file__)}


def epoch_metrics(where, data, trained, before, after=None, val=None, event=False):
    """Returns an epoch's losses (nats), percentages and counts of correct answers, a dict.

    Args:
        where: What an error message begins with.
        trained: The totals of train_epoch.
        before, after, val: From evaluate: the test images before and after the pruning event,
            and the validation images.
        event: Whether filters were pruned, or noise was started.

    Raises:
        UserError: The training loss or a logit is NaN or infinite.
    """
    after = after or before
    sizes = {split: len(data[split][1]) for split in ("train", "test", "val") if split in data}
    changed = (before[1] != after[1]).sum()[None]
    totals = [trained, before[0], after[0]] + ([val[0]] if val else [])
    num_changed, *numbers = to_list(torch.cat([changed, *totals]))  # in one transfer
    (train_loss, train_correct), evaluated = numbers[:2], numbers[2:]
    before_correct, before_loss, before_finite, correct, loss, finite = evaluated[:6]
    val_correct, _, val_finite = evaluated[6:] if val else (None, None, None)
    n, n_train = sizes["test"], sizes["train"]
    all_finite = before_finite == finite == n and (not val or val_finite == sizes["val"])
    check(math.isfinite(train_loss) and all_finite,
          f"{where}: the training loss is {train_loss / n_train:g}"
          f"{'' if all_finite else ', and logits of the evaluation are NaN or infinite'}: lower "
          "--lr; the checkpoint of the epoch before is kept", code=1)
    return {
        "train_loss": train_loss / n_train, "train_acc": 100 * (train_correct / n_train),
        "test_acc_before": 100 * before_correct / n, "test_acc": 100 * correct / n,
        "test_loss_before": before_loss / n, "test_loss": loss / n,
        "val_acc": 100 * val_correct / sizes["val"] if val else None,
        "stability": 100 * correct / before_correct if event and before_correct else None,
        "churn": 100 * num_changed / n if event else None,
        "train_correct": int(train_correct), "test_correct_before": int(before_correct),
        "test_correct": int(correct), "val_correct": int(val_correct) if val else None}


def summarize_run(records, config):
    """Summarizes the records of epochs.jsonl in a dict (docs/files.md lists its fields).

    The best accuracy is over the epochs from the last event on. Without events the mean stability
    is 100. A field that an older log lacks is None.
    """
    events = [r for r in records if any(r["removed"])]
    stabilities = [r["stability"] for r in events if r["stability"] is not None]
    final = [r for r in records if r["epoch"] >= (events[-1]["epoch"] if events else 0)]
    best = max(final, key=lambda r: r["test_acc"])  # the first of equal ones
    chosen = max(final, key=lambda r: r["val_acc"]) if best["val_acc"] is not None else None
    summary = {
        "epochs": len(records), "events": len(events), "best_acc": best["test_acc"],
        "best_epoch": best["epoch"], "gap": best["train_acc"] - best["test_acc"],
        "last_acc": records[-1]["test_acc"],
        "val_chosen_acc": chosen["test_acc"] if chosen else None,
        "mean_stability": math.fsum(stabilities) / len(stabilities) if stabilities else 100.0,
        "min_stability": min(stabilities, default=100.0),
        "below": {str(limit): sum(s < limit for s in stabilities) for limit in (99, 98, 95, 90)},
        **dict.fromkeys(("loss_rise", "churn", "parameters", "macs", "macs_spent",
                         "macs_unpruned")),
        "seconds": sum(r["seconds"] for r in records)}
    if "macs" in config:
        # Of the network that each epoch trains; --scratch prunes before the first.
        first = config["macs"] if any(records[0]["removed"]) else records[0]["macs"]
        macs = [first] + [r["macs"] for r in records[:-1]]
        passes = 3 * config["data"]["train"]  # a backward pass costs two forward passes
        n = max(1, len(events))
        rises = [r["test_loss"] - r["test_loss_before"] for r in events]
        summary |= {"loss_rise": math.fsum(rises) / n,
                    "churn": math.fsum(r["churn"] for r in events) / n,
                    "parameters": records[-1]["parameters"], "macs": records[-1]["macs"],
                    "macs_spent": passes * sum(macs),
                    "macs_unpruned": passes * len(records) * config["macs"]}
    return summary


def network_record(model, schedule, pruned, ties, noise, image):
    """Returns what an epoch's record says of the network, a dict."""
    num_params, macs = count_params_and_macs(model, image)
    states = noise.state.values() if noise else ()
    return {"removed": [len(pruned.get(layer, ())) for layer in schedule],
            "live": [int(block.mask.sum()) for block in model.prunable],
            "filters": pruned, "tied": ties,
            "computed": [block.num_computed_filters() for block in model.prunable],
            "parameters": num_params, "macs": macs,
            "noised": [{k: state[k] for k in ("test", "train")} for state in states]}


# +-- Training ------------------------------------------------------------------------------------+

def setup_device(device="auto", precision="fp32", deterministic=False):
    """Returns the torch.device of --device; sets precision and determinism globally."""
    cuda = torch.cuda.is_available()
    check(cuda or device != "cuda", "--device cuda, but torch sees no CUDA device here: use "
          "--device cpu, or check the driver")
    device = torch.device("cuda" if cuda and device != "cpu" else "cpu")
    check(device.type == "cuda" or precision != "tf32",
          "--precision tf32 needs a CUDA device: use fp32 here")
    if precision == "bf16" and device.type == "cpu" and not ops.cpu_multiplies_bf16():
        warn_once("train.py: this CPU has no instructions for bf16, so --precision bf16 will be "
                  "slower than fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    return device


def make_generators(seed, noise_device=None):
    """Seeds torch's global generator, for the initial weights, and returns one for each other use.

    So runs with the same seed share initial weights, data order and augmentation.
    """
    torch.manual_seed(seed)
    generators = {}
    for i, name in enumerate(("order", "augment", "target") + ("noise",) * bool(noise_device)):
        own_seed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        device = noise_device if name == "noise" else "cpu"
        generators[name] = torch.Generator(device).manual_seed(own_seed)
    return generators


def make_optimizer(model, name, lr, weight_decay):
    params, settings = list(model.parameters()), dict(lr=lr, weight_decay=weight_decay, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params, momentum=MOMENTUM, **settings)
    # capturable=True warns of steps outside CUDA graphs, which come before the first capture.
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    return torch.optim.Adam(params, capturable=params[0].is_cuda, **settings)


def predict(model, images, data, precision):
    """Returns float32 logits for uint8 images (n, h, w, 3); only the network runs in bf16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model(normalise(images, data)).float()


@torch.no_grad()
def evaluate(model, data, split, batch_size, precision, graphs, noise=None):
    """Evaluates the network on a split, in eval mode.

    Returns:
        Tensors on the device: totals (3,) float64, of correct answers, losses in nats and images
        with finite logits, and the predicted classes (images,) int64.
    """
    model.eval()
    x, y = data[split]
    totals, position, predicted = graphs.static(  # one address for all batches
        split, torch.zeros(3, dtype=torch.float64, device=x.device),
        torch.zeros((), dtype=torch.int64, device=x.device), torch.zeros_like(y))

    def test_batch(size):
        index = position + torch.arange(size, device=x.device)
        logits, labels = predict(model, x[index], data, precision), y[index]
        classes = logits.argmax(1)
        predicted.index_copy_(0, index, classes)
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        finite = logits.isfinite().all(1).sum()
        totals.add_(torch.stack([(classes == labels).sum(), loss, finite]))
        position.add_(size)

    for start in range(0, len(x), batch_size):
        if noise:
            noise.apply(training=False)
        graphs.run(split, test_batch, min(batch_size, len(x) - start))
        if noise:
            noise.after_batch()
    return totals.clone(), predicted.clone()  # the next evaluation reuses the static tensors


def train_epoch(model, data, optimizer, options, generators, step, graphs, noise=None):
    """Trains for one pass over the training data, from batch number `step` of the run on.

    Returns:
        (totals (2,) float64 on the device, of losses in nats and correct answers; next step).
    """
    model.train()
    x, y = data["train"]
    device, n = x.device, len(x)
    order = torch.randperm(n, generator=generators["order"]).to(device)
    crops = []
    if options.augment:
        crops = [tensor.to(device) for tensor in draw_crops(n, generators["augment"])]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    position = torch.zeros((), dtype=torch.int64, device=device)
    totals, position, order, *crops = graphs.static("train", totals, position, order, *crops)

    def train_batch(size):
        batch = position + torch.arange(size, device=device)
        index = order[batch]
        images, labels = x[index], y[index]
        if crops:
            offsets, flips = (tensor[..., batch] for tensor in crops)
            images = crop_and_flip(data["padded"], index, offsets, flips)
        logits = predict(model, images, data, options.precision)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        correct = (logits.detach().argmax(1) == labels).sum()
        totals.add_(torch.stack([loss.detach() * size, correct]))
        position.add_(size)

    # A function from --score FILE.py may read act, too.
    reads_act = options.score == "act" or options.score not in (None, *PAPER_SCORES)
    for start in range(0, n, options.batch_size):
        step += 1
        update_act = reads_act and step % ACT_EVERY == 0
        for block in model.prunable:
            block.update_act = update_act
        if noise:
            noise.apply(training=True)
        graphs.run(f"train {update_act}", train_batch, min(options.batch_size, n - start))
        if noise:
            noise.after_batch()
    for block in model.prunable:
        block.update_act = False
    return totals.clone(), step


def check_same_run(path, options, info=None):
    """Refuses another run's directory or, given dataset_info, other data; returns its config."""
    config = rundir.read_config(path)
    different = [k for k, v in experiment_options(options).items()
                 if k != "dataset" and v is not None and config["options"].get(k, v) != v]
    if config.get("score_crc32") != score_fingerprint(options.score):
        different.append(f"source of the score {options.score}")
    trained, own = config.get("own_model") or {}, OWN_MODELS.get(options.model, {})
    if trained.get("crc32") != own.get("crc32"):
        different.append(f"source of the model {options.model}")
    data = config.get("data", {})
    if info and any(data.get(k) != info[k] for k in ("classes", "image", "crc32")):
        different.append("data set")
    check(not different, f"{path} holds a run with another {', '.join(different)}: move it away, "
          "or choose another --log-dir")
    return config


def warn_missing_outputs(path, scaled, tensorboard):
    """Prints which outputs are asked for now that the finished epochs did not write."""
    done = len(rundir.read_log_lines(path))
    names = [f"epoch{scaled['save_epoch']}.pt"] * (0 < scaled["save_epoch"] <= done)
    names += ["tensorboard"] * (tensorboard and done == scaled["epochs"])
    missing = " and ".join(name for name in names if not (path / name).exists())
    if missing:
        print_line(f"{path}: trained without {missing}: move it away to train it with that")


def check_finished(path, options):
    """Checks a finished run's options, and its data unless they would have to be downloaded."""
    info = None
    if options.dataset not in CIFAR or dataset_path(options.dataset, options.data_dir).exists():
        _, info = load_arrays(options.dataset, options.data_dir)
    check_same_run(path, options, info)


def prepare(options, scaled):
    """Sets up a run's device and data; returns (device, dataset_info, prepare_data's dict)."""
    for line in lr_schedule_warnings(options, scaled):
        warn_once(f"train.py: {line}")
    torch.set_num_threads(THREADS)
    device = setup_device(options.device, options.precision, options.deterministic)
    _, info = load_arrays(options.dataset, options.data_dir)
    data = load_prepared(options.dataset, options.data_dir, device,
                         **{name: getattr(options, name) for name in DATA_OPTIONS})
    return device, info, data


def build(options, scaled, num_classes, device):
    """Returns (model, optimizer, generators, pruning schedule, FilterNoise or None)."""
    generators = make_generators(options.seed, device if options.noise == "gauss" else None)
    model = build_model(options.model, num_classes, options.width).to(device)
    model.round_to = ROUND_TO[device.type]
    set_backend(model, ops.choose_backend(options.backend, device))
    optimizer = make_optimizer(model, options.optimizer, options.lr, options.weight_decay)
    schedule, noise = pruning_schedule(model, options, scaled), None
    idle = sum(p > 0 and list(keep.values())[-1] == len(model.prunable[layer].mask)
               for p, (layer, keep) in zip(options.p or (), schedule.items()))
    if idle:
        warn_once(f"train.py: --p {format_value(options.p)} is less than one filter in {idle} of "
                  f"{len(schedule)} layers, which are not pruned: raise --p or --width")
    if options.noise != "none":
        noise = FilterNoise({layer: model.prunable[layer] for layer in schedule}, options.noise,
                            scaled["noise_batches"], options.noise_filters, options.noise_restore,
                            generators.get("noise"))
    return model, optimizer, generators, schedule, noise


def run_state(epoch, step, model, optimizer, noise, generators):
    """Returns what a run needs to continue after `epoch` epochs and `step` batches, a dict."""
    return {"epoch": epoch, "step": step, "model": model.state_dict(),
            "optimizer": optimizer.state_dict(), "noise": noise and noise.state,
            "generators": {name: g.get_state() for name, g in generators.items()}}


def restore_state(model, optimizer, noise, generators, device, state):
    """Restores what run_state returned; returns the step."""
    model.load_state_dict(state["model"])
    set_backend(model, model.backend)
    optimizer.load_state_dict(state["optimizer"])
    for group in optimizer.param_groups:
        if "capturable" in group:  # the checkpoint may come from another device
            group["capturable"] = device.type == "cuda"
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    if noise:
        noise.load(state["noise"], device)
    return state["step"]


def train(options):
    """Trains one run, or what is left of it, and prunes the network while it trains.

    Returns:
        The run's summary (summarize_run); None for a run that was finished before.
    """
    path, scaled = run_path(options), scaled_schedule(options)
    warn_missing_outputs(path, scaled, options.tensorboard)
    if rundir.run_status(path) == "done":
        check_finished(path, options)
        return rundir.report_finished(path, scaled["epochs"])
    device, info, data = prepare(options, scaled)
    with side_stream(device), rundir.RunDirectory(path, scaled["epochs"], options.tensorboard,
                                                  CHECKPOINT_SECONDS[device.type]) as directory:
        model, optimizer, generators, schedule, noise = build(options, scaled, info["classes"],
                                                              device)
        config, step = run_config(options, scaled, schedule, model, device, info), 0
        graphs = Graphs(options.cuda_graphs and device.type == "cuda")
        test = functools.partial(evaluate, model, data, batch_size=options.test_batch_size,
                                 precision=options.precision, graphs=graphs)
        prune = functools.partial(pruning_event, model, optimizer, options.score, options.target,
                                  generators.get("target"), noise, options.prune_bn == "keep")
        if directory.has_checkpoint():
            config = rundir.continued_config(check_same_run(path, options, info), config)
            step = directory.resume(functools.partial(restore_state, model, optimizer, noise,
                                                      generators, device))
        else:  # --scratch prunes before the first epoch, which the schedule calls -1
            to_prune = num_filters_to_prune(model, schedule, -1, noise)
            _, config["tied"] = prune(to_prune, allow_ties=True)
        directory.begin(config)

        for epoch in range(len(directory.records), scaled["epochs"]):
            start_time = time.monotonic()
            lr = options.lr * 0.1 ** sum(epoch >= x for x in scaled["lrs"])
            optimizer.param_groups[0]["lr"] = lr
            where = f"{path}: epoch {epoch}, lr {lr:g}"

            # 1. Train for one epoch, then test. CUDA graphs contain lr and numbers of filters.
            graphs.clear_unless(lr, graph_key(model))
            trained, step = train_epoch(model, data, optimizer, options, generators, step, graphs,
                                        noise)
            before = after = test("test", noise=noise)

            # 2. Prune the filters that the schedule asks for, or start their noise.
            pruned, ties = {}, {}
            to_prune = num_filters_to_prune(model, schedule, epoch, noise)
            if to_prune:
                epoch_metrics(where, data, trained, before)  # raises if training diverged
                pruned, ties = prune(to_prune)
                graphs.clear_unless(lr, graph_key(model))

            # 3. Test again: stability is the accuracy after the event over that before it.
            if to_prune or noise:
                after = test("test", noise=noise)
            validation = test("val") if "val" in data else None
            metrics = epoch_metrics(where, data, trained, before, after, validation, bool(pruned))
            record = {"epoch": epoch, "lr": lr, **metrics,
                      **network_record(model, schedule, pruned, ties, noise, info["image"]),
                      "seconds": round(max(0, time.monotonic() - start_time), 3)}
            state = run_state(epoch + 1, step, model, optimizer, noise, generators)
            directory.save_epoch(record, state, keep_weights=epoch + 1 == scaled["save_epoch"])
            directory.print_epoch(summarize_run(directory.records, config)["mean_stability"])
        return directory.finish(summarize_run(directory.records, config))


# +-- Entry: one run, or a list of runs -----------------------------------------------------------+

def expand_seeds(argv):
    """Parses a command line; returns a list of (options, command line), one for each seed."""
    options = parse_options(argv)
    if options.seeds is None:
        return [(options, shlex.join(argv))]
    return [(argparse.Namespace(**vars(options) | {"seed": seed, "seeds": None}),
             f"{shlex.join(argv)} --seeds {seed}")  # the last --seeds counts
            for seed in options.seeds]


def unique_runs(commands):
    """Returns {run's path: (options, command line)} of all runs of `commands`."""
    runs, sources = {}, {}
    for options, line in (run for argv in commands for run in expand_seeds(argv)):
        check(not (options.runs or options.plan or options.status), f"{line}: a list cannot hold "
              "another list: give the options of a run")
        path = run_path(options)
        for kind, name, source in (
                ("score", options.score, score_fingerprint(options.score)),
                ("model", options.model, OWN_MODELS.get(options.model, {}).get("crc32"))):
            check(sources.setdefault((kind, name), source) == source,
                  f"different {kind}s are called {name}: rename one")
        first, _ = runs.setdefault(path, (options, line))
        same = all(getattr(first, k) == getattr(options, k)
                   for k in ("dataset", "data_dir", "save_epoch", "tensorboard"))
        check(same, f"two of the runs would share {path}, but differ in --dataset, --data-dir, "
              "--save-epoch or --tensorboard: give one of them another --log-dir")
    return runs


def read_runs(file):
    """Returns unique_runs of a file with a line of options for each run."""
    try:
        commands = [shlex.split(line) for line in open(file) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as lines of options: {first_line(error)}") from None
    return unique_runs(commands)


def train_runs(runs):
    """Trains runs one after the other; reports those that fail and goes on with the next."""
    num_failed = 0
    for path, (options, line) in runs.items():
        try:
            train(options)
        except Exception as error:
            report_error(error, "train.py", "")
            refused = isinstance(error, UserError) and error.code == 2
            # A run that another process trains or has trained meanwhile did not fail.
            if refused or rundir.run_status(path) not in ("running", "done"):
                print_line(f"failed: train.py {line}", sys.stderr)
                num_failed += 1
    check(not num_failed, f"{num_failed} of {len(runs)} runs failed; the same train.py command "
          "tries them again", code=1)


def print_plan(runs, retry_failed):
    """Prints the lines of the runs that are left, and on stderr how many there are."""
    for path in rundir.group_by_status(runs)["done"]:
        check_finished(path, runs[path][0])
    num_epochs = {path: scaled_schedule(options)["epochs"] for path, (options, _) in runs.items()}
    left = rundir.report_plan(num_epochs, retry_failed)
    for path in left:  # a download that fails should fail here, once
        load_arrays(runs[path][0].dataset, runs[path][0].data_dir)
    for path in left:
        print_line(runs[path][1])


def terminate(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal must not disturb the end
    raise KeyboardInterrupt("terminated")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    load_arrays.cache_clear()  # an earlier call's: files may have changed since
    load_prepared.cache_clear()
    try:
        options = parse_options(argv)
        ops.keep_freed_memory()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
        if options.plan:
            print_plan(read_runs(options.plan), options.retry_failed)
        elif options.status:
            rundir.print_status({file: {path: scaled_schedule(run)["epochs"] for path, (run, _)
                                        in read_runs(file).items()} for file in options.status})
        elif options.runs:
            train_runs(read_runs(options.runs))
        elif options.seeds:
            train_runs(unique_runs([argv]))
        else:
            train(options)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error, "train.py",
                            "the same command continues after the last finished epoch")


if __name__ == "__main__":
    sys.exit(main())
