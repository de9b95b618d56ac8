#!/usr/bin/env python3
"""Train a network, prune it while it trains, and measure how stable its accuracy is under pruning.

The paper is "The Generalization-Stability Tradeoff in Neural Network Pruning" (NeurIPS 2020,
arXiv 1906.03728). Section numbers are those of its appendix. Every default is the paper's setting
for the model (Figure 2; Figure 4 for SGD).

    python train.py --model vgg11 --target L --r 40                  # Prune_L, r = 40, CIFAR-10
    python train.py --model vgg11 --target none --scale-epochs 0.08  # the baseline, in 26 epochs
    python train.py --model resnet20 --target S --seeds 1-10         # SGD, l1 scores, every layer

A run leaves logs/<dataset>/<model>/<method>/seed<k>/ with config.json, epochs.jsonl,
checkpoint.pt and, at its end, done.json (docs/files.md). The same command again continues a
stopped run and leaves a finished one alone.
"""
import argparse
import contextlib
import functools
import inspect
import math
import os
import pathlib
import shlex
import signal
import sys
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
from gst_ext.errors import (OneLineParser, UserError, check, first_line, format_value, number,
                            print_line, read_function, repeated, report_error, seed_list, warn_once)
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
}  # --score FILE.py:FUNCTION adds one
PAPER_SCORES = tuple(SCORES)
OWN_MODELS = {}  # name: what --model FILE.py:FUNCTION gave: its file, crc32, blocks and options
MOMENTUM = 0.9  # of SGD (A.3)
ACT_EVERY = 10  # training batches between updates of the act score (A.4, footnote 4)
THREADS = torch.get_num_threads()  # of a new run; one that continues keeps its own number
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
DEFAULTS = dict(  # those that all models share
    dataset="cifar10", width=1.0, scale_epochs=1.0, batch_size=128, test_batch_size=128,
    val_split=0, train_images=0, test_images=0, label_noise=0.0, precision="fp32",
    deterministic=False)
METHOD_DEFAULTS = dict(target="none", scratch=False, prune_bn="drop", noise="none", noise_batches=1,
                       noise_filters="newest", noise_restore=False, seed=1)
RUNTIME_DEFAULTS = dict(  # of the options that do not decide what a run computes
    data_dir="data", device="auto", backend="auto", cuda_graphs=True, log_dir="logs",
    save_epoch=None, tensorboard=False, preset=None, seeds=None, runs=None, plan=None, status=None,
    retry_failed=None)
DATA_OPTIONS = ("val_split", "train_images", "test_images", "label_noise", "augment")

DIGITS = dict(dataset="digits", width=0.25)
SMALL = dict(train_images=2560, test_images=3000, width=0.25, batch_size=64, scale_epochs=0.1)
PRESETS = {  # what --preset changes, by optimizer
    # Pruned networks have time to recover: 7 of 18 epochs follow the last event.
    "quick": {"adam": dict(DIGITS, train_images=400, test_images=500, batch_size=32, lr=0.005,
                           epochs=450, lrs=[400], scale_epochs=0.04),
              "sgd": dict(DIGITS, val_split=300, batch_size=12, scale_epochs=0.08, p=0.5)},
    # p: the paper's 0.1 of a narrow layer is one filter or none
    "small": {"adam": SMALL, "sgd": dict(SMALL, p=0.5)},
}


def paper_options(model, optimizer=None):
    """Returns the paper's options for a model, or those that an own model's file gives; a dict.

    optimizer None is the paper's choice.
    """
    if model in OWN_MODELS:
        options = {"save_epoch": 0} | OWN_MODELS[model]["options"]
        return options | {"optimizer": optimizer or options.get("optimizer")}
    optimizer = optimizer or ("sgd" if model in ("resnet20", "resnet56") else "adam")
    n = PRUNABLE_BLOCKS[model]
    pruning = dict(s=[40] * n, e=[100] * n, p=[0.1] * n, r=30, score="l1", save_epoch=0)
    if optimizer == "adam":
        pruning = ADAM_PRUNING[model.rstrip("0123456789")]
    return dict(optimizer=optimizer, **OPTIMIZERS[optimizer], **pruning)


def default_options(model, optimizer=None, preset=None):
    """Returns the defaults of a model's options, the paper's or a preset's; a dict."""
    options = DEFAULTS | paper_options(model, optimizer)
    if preset:
        options |= PRESETS[preset].get(options.get("optimizer"), {})
    if isinstance(options.get("p"), float):
        options["p"] = [options["p"]] * num_blocks(model)
    return options


def num_blocks(model):
    return PRUNABLE_BLOCKS.get(model) or OWN_MODELS[model]["blocks"]


def score_name(text):
    """An argparse type: a name in SCORES, or FILE.py:FUNCTION, which is added to SCORES."""
    name, defined = read_function(text, PAPER_SCORES, SCORES)
    if defined:
        SCORES[name] = defined[name]
    return name


def model_name(text):
    """An argparse type: a model's name, or FILE.py:FUNCTION, which is added to OWN_MODELS."""
    name, defined = read_function(text, PRUNABLE_BLOCKS, OWN_MODELS)
    if defined:
        file = pathlib.Path(text.rpartition(":")[0]).resolve()
        try:
            OWN_MODELS[name] = {
                "file": str(file), "crc32": zlib.crc32(file.read_bytes()),
                "blocks": add_own_network(name, defined[name]),
                "options": own_options(defined.get("OPTIONS", ""))}
        except Exception as error:
            raise argparse.ArgumentTypeError(f"{text} is no network to prune: "
                                             f"{first_line(error)}") from None
    return name


def own_options(text):
    """Returns the options that OPTIONS, a str in the file of an own model, gives; a dict."""
    check("--model" not in text, "OPTIONS names a --model: remove that")  # its own would recurse
    given = {k: v for k, v in vars(parse_arguments(shlex.split(text))).items() if v is not None}
    others = given.keys() - default_options("vgg11").keys()
    check(not others, f"OPTIONS gives {option_names(others)}, of which a network has no default")
    return given


def target_name(text):
    """An argparse type: "none", "S", "L", "R", or "Q" and a quantile, where Q0 is S and Q1 is L."""
    if text in ("none", "S", "L", "R"):
        return text
    with contextlib.suppress(ValueError):
        quantile = float(text.removeprefix("Q"))
        if text[:1] == "Q" and 0 <= quantile <= 1:
            return {0: "S", 1: "L"}.get(quantile, f"Q{format_value(quantile)}")
    raise argparse.ArgumentTypeError(
        f"{text}: give none, S, L, R, or Q and a quantile from 0 to 1, as in Q0.75")


def make_parser():
    """Returns the parser of the command line; options that are not given are None."""
    defaults = {"every model": DEFAULTS | METHOD_DEFAULTS | RUNTIME_DEFAULTS}
    defaults |= {model: paper_options(model) for model in PRUNABLE_BLOCKS}
    lines = [f"  {name}: " + " ".join(f"{k}={format_value(v)}" for k, v in values.items()
                                      if v is not None) for name, values in defaults.items()]
    parser = OneLineParser(prog="train.py", description=__doc__,
                           epilog="\n".join(["defaults:", *lines]), allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    from_0 = number(int, lambda x: 0 <= x < 2**32, "0 or more, below 2^32")
    from_1 = number(int, lambda x: 1 <= x < 2**32, "1 or more, below 2^32")
    positive = number(float, lambda x: 0 < x < 1e6, "a number above 0 and below a million")
    decay = number(float, lambda x: 0 <= x < 1e6, "a number from 0 to below a million")
    fraction = number(float, lambda x: 0 <= x <= 1, "a fraction from 0 to 1")
    pruned = number(float, lambda x: 0 <= x < 1, "a fraction from 0 to below 1, since a layer "
                    "without filters cuts the network in two")

    add = parser.add_argument_group("network and data").add_argument
    add("--model", type=model_name, metavar="NAME", help=f"one of {', '.join(PRUNABLE_BLOCKS)}, or "
        "FILE.py:FUNCTION, a network of your own (docs/networks.md); default: vgg11")
    add("--preset", choices=PRESETS, help="a set of options, which given ones override: quick is a "
        "few epochs of digits, small is CIFAR-10 with few images")
    add("--width", type=positive, help="multiplies every channel count")
    add("--dataset", help="cifar10, cifar100, digits, a .npz file or a folder (docs/data.md)")
    add("--data-dir", help="where <dataset>.npz is or will be")
    add("--val-split", type=from_0, help="validation images taken from the training images")
    add("--train-images", type=from_0, help="how many training images to use; 0: all")
    add("--test-images", type=from_0, help="how many test images to use; 0: all")
    add("--label-noise", type=fraction, help="the fraction of the training images that get a "
        "random class, the same for every seed and method")
    add("--augment", action=flag, help="random crop and flip")

    add = parser.add_argument_group("pruning").add_argument
    add("--target", type=target_name, metavar="T", help="none, or the filters to prune: S, those "
        "with the smallest scores, L, the largest, R, random ones, or Q0.75, those around the 0.75 "
        "quantile of the scores")
    add("--r", type=from_1, help="retrain period: epochs between pruning events")
    for name, kind, what in (("s", from_0, "first epoch of pruning"),
                             ("e", from_0, "last epoch of pruning"),
                             ("p", pruned, "fraction of filters to prune")):
        add(f"--{name}", type=repeated(kind), nargs="+", metavar=name, help=f"{what}, one value "
            "(VxN: N times V) for each of the last n prunable layers")
    add("--score", type=score_name, metavar="NAME", help="what makes a filter small or large: "
        f"{', '.join(SCORES)}, or FILE.py:FUNCTION, your own (README.md)")
    add("--scratch", action=flag, help="prune everything at initialization")
    add("--prune-bn", choices=("drop", "keep"), help="prune a filter's batch norm and shortcut, "
        "too, or keep them")

    add = parser.add_argument_group("noise instead of pruning (appendix D)").add_argument
    add("--noise", choices=("none", "zero", "gauss"), help="add noise to the targeted filters "
        "instead of removing them")
    add("--noise-batches", type=from_1, help="training batches after which an event's noise ends; "
        "1 is a single application, at the first test batch")
    add("--noise-filters", choices=("newest", "all"), help="those of the event, or of all so far")
    add("--noise-restore", action=flag, help="zero batch norm, too, and restore all values "
        "afterwards (D.2)")

    add = parser.add_argument_group("optimization and schedule").add_argument
    add("--optimizer", choices=OPTIMIZERS)
    add("--lr", type=positive, help="initial learning rate")
    add("--weight-decay", type=decay)
    add("--batch-size", type=from_1)
    add("--test-batch-size", type=from_1, help="each test batch has its own noise")
    add("--epochs", type=from_1)
    add("--lrs", type=repeated(from_0), nargs="*", help="epochs at which lr is divided by ten")
    add("--scale-epochs", type=positive, help="multiplies epochs, lrs, s, e, r and noise batches, "
        "rounded, r at least 1")

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", choices=("auto", "cpu", "cuda"))
    add("--backend", choices=("auto", "ext", "eager"), help="ext: the extension, which computes "
        "live filters only; eager: plain PyTorch, masked; auto: ext if it is built")
    add("--precision", choices=("fp32", "tf32", "bf16"))
    add("--deterministic", action=flag, help="use deterministic CUDA kernels only; docs/files.md "
        "says when CPU runs repeat exactly")
    add("--cuda-graphs", action=flag, help="capture steps as CUDA graphs")
    add("--log-dir")
    add("--save-epoch", type=from_0, help="keep the weights after N epochs as epoch<N>.pt; 0: no")
    add("--tensorboard", action=flag, help="write <run>/tensorboard, too")

    group = parser.add_argument_group("which runs, one after the other")
    group.add_argument("--retry-failed", action=flag, help="count failed runs as left in --plan")
    add = group.add_mutually_exclusive_group().add_argument
    add("--seed", type=from_0)
    add("--seeds", type=seed_list, metavar="1-10", help="a run for each seed, 1-10 or 1,4,7")
    add("--runs", metavar="FILE", help="train the runs listed in FILE, a line of options each")
    add("--plan", metavar="FILE", help="train nothing: report how many of the runs in FILE are "
        "left, download their data, and print their lines")
    add("--status", metavar="FILE", nargs="+", help="train nothing: report on the runs in FILE")
    return parser


def parse_arguments(argv):
    """Parses options (a list of str); those that are not given are None."""
    options = make_parser().parse_args(argv)
    for name in ("s", "e", "p", "lrs"):
        if getattr(options, name) is not None:
            setattr(options, name, sum(getattr(options, name), []))  # a list for each word
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
    options.model = options.model or "vgg11"
    defaults = METHOD_DEFAULTS | RUNTIME_DEFAULTS | default_options(
        options.model, options.optimizer, options.preset)
    for name in defaults.keys() - given:
        setattr(options, name, defaults[name])
    missing = [name for name in paper_options("vgg11") if getattr(options, name) is None]
    check(not missing, f"{options.model} has no default of {option_names(missing)}: give them "
          "here, or in OPTIONS of its file")
    check_combinations(options, given)
    check_schedule(options, given)

    for name in unused_options(options):
        setattr(options, name, None)
    if options.save_epoch > options.epochs:
        options.save_epoch = 0
    return options


def unused_options(options):
    """Returns the names of the options that do not change what a run computes, a list."""
    unused = ["noise_batches", "noise_filters", "noise_restore"] * (options.noise == "none")
    unused += ["r", "s", "e"] * (options.target == "none" or options.scratch)
    unused += ["p"] * (options.target == "none")
    return unused + ["score"] * (options.target in ("none", "R"))


def option_names(names):
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def check_combinations(options, given):
    """Refuses options that would have no effect beside the others."""
    lists = {"runs", "plan", "status"}
    others = given - lists - {"retry_failed"}
    check(not (lists & given and others), f"{option_names(others)} cannot be combined with a list "
          "of runs: put it on the lines of the list")
    pruning, noise = options.target != "none", options.noise != "none"
    without_target = "does nothing without --target: add --target S, L, R or Q0.5"
    for names, takes_effect, problem in (
            ({"retry_failed"}, options.plan, "is for --plan, and not for --runs or --status"),
            ({"s", "e", "p", "r", "score"}, "target" in given, without_target),
            ({"scratch", "prune_bn", "noise"}, pruning, without_target),
            ({"scratch", "prune_bn"}, not noise, "and --noise exclude each other: choose one"),
            ({"noise_batches", "noise_filters", "noise_restore"}, noise,
             "does nothing without --noise: add --noise zero or gauss"),
            ({"noise_restore"}, options.noise == "zero", "is for --noise zero")):
        idle = {k for k in names & given if getattr(options, k) != METHOD_DEFAULTS.get(k)}
        check(takes_effect or not idle, f"{option_names(idle)} {problem}")


def check_schedule(options, given):
    """Checks the pruning schedule against the network and the epochs."""
    lengths = [len(values) for values in (options.s, options.e, options.p)]
    check(len({*lengths}) == 1 or options.scratch, "--s, --e and --p need one value for each "
          f"pruned layer (0.5x4 is four): there are {format_value(lengths)}, counting defaults")
    n = num_blocks(options.model)
    check(len(options.p) <= n, f"--p has {len(options.p)} values, but {options.model} has {n} "
          "layers to prune: give fewer")
    for s, e in zip(options.s, options.e):
        check(s <= e, f"pruning starts at epoch {s} and ends at {e}: each s must be at most its e")
    check(max(options.e) < options.epochs or options.target == "none" or options.scratch,
          f"pruning ends at epoch {max(options.e)}, but epochs count from 0 to "
          f"{options.epochs - 1}: lower --e or raise --epochs")
    check("save_epoch" not in given or options.save_epoch <= options.epochs,
          f"--save-epoch {options.save_epoch} is past the last of {options.epochs} epochs")


def scaled_schedule(options):
    """Returns epochs, lrs, s, e, r, save_epoch, noise_batches after --scale-epochs, a dict."""
    def scale(x, least=0):
        return max(least, math.floor(Fraction(str(options.scale_epochs)) * x + Fraction(1, 2)))

    epochs, s, e, k = scale(options.epochs, 1), options.s, options.e, options.noise_batches
    if e:  # rounding up must not move the last pruning event past the end
        e = [min(scale(x), epochs - 1) for x in e]
        s = [min(scale(x), end) for x, end in zip(s, e)]
    return {"epochs": epochs, "lrs": [scale(x) for x in options.lrs], "s": s, "e": e,
            "r": options.r and scale(options.r, 1),
            "save_epoch": options.save_epoch and scale(options.save_epoch, 1),
            "noise_batches": k if k in (None, 1) else scale(k, 2)}  # one application stays one


def lr_schedule_warnings(options, scaled):
    """Returns a line, in a list, if milestones in --lrs are lost, by scaling or past the end.

    Given milestones may equal the number of epochs, which means "never".
    """
    lrs, n = options.lrs, options.epochs
    is_default = lrs == paper_options(options.model, options.optimizer).get("lrs")
    used, left = ({x for x in milestones if 0 < x < end}
                  for milestones, end in ((lrs, n), (scaled["lrs"], scaled["epochs"])))
    if len(left) == len(used) and max(lrs, default=0) <= n - is_default:
        return []
    return [f"--scale-epochs {format_value(options.scale_epochs)} makes --lrs {format_value(lrs)} "
            f"of {n} epochs {format_value(scaled['lrs'])} of {scaled['epochs']}, which loses a "
            "fall of the learning rate: give --epochs and --lrs that fit, or --lrs alone for none"]


def run_name(options):
    """Returns (method, setting), str: what is done to the filters, and everything else.

    Both name what differs from the paper's settings or, with a preset, from the preset's.
    """
    default = METHOD_DEFAULTS | default_options(options.model, options.optimizer, options.preset)
    default["optimizer"] = paper_options(options.model).get("optimizer")

    def differing(**labels):
        for name, label in labels.items():
            value = getattr(options, name)
            if isinstance(value, bool) and value != default.get(name):
                yield label if value else f"no{label}"
            elif value not in (None, default.get(name)):
                yield label + format_value(value)

    if options.noise != "none":
        method = [options.noise, str(options.noise_batches)]
        method += [options.target] * (options.target != "L")
        method += differing(r="r", noise_filters="", noise_restore="restore", test_batch_size="tb")
    elif options.scratch:
        method = ["scratch", options.target]
    else:
        method = [options.target] + [f"r{options.r}"] * (options.target != "none")
    method += differing(score="", prune_bn="bn", s="s", e="e", p="p")
    setting = differing(
        optimizer="", preset="", width="w", scale_epochs="x", epochs="epochs", lrs="lrs", lr="lr",
        weight_decay="wd", batch_size="batch", val_split="val", train_images="n", test_images="t",
        label_noise="noise", precision="", augment="augment", deterministic="deterministic")
    return "-".join(method), "-".join(setting)


def run_path(options):
    """Returns the run's directory: <log_dir>/<dataset>/<model>/<method>[-<setting>]/seed<k>."""
    name = "-".join(filter(None, run_name(options)))
    if len(name.encode()) > 200:  # file systems allow 255 bytes; config.json holds every option
        name = f"{name[:180]}-{zlib.crc32(name.encode()):08x}"
    return pathlib.Path(options.log_dir, dataset_label(options.dataset), options.model, name,
                        f"seed{options.seed:d}")


def experiment_options(options):
    """Returns the options that decide what a run computes, a dict."""
    return {k: v for k, v in vars(options).items() if k not in RUNTIME_DEFAULTS}


# +-- Pruning: when (A.4), which filters (B), and how they are removed ----------------------------+

def pruning_epochs(s, e, r):
    """Returns the epochs after whose training a layer is pruned: s, s+r, ... up to e (A.4).

    The paper's formula for their number counts one past e whenever r divides e - s + 1.
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
    scores, order = torch.sort(scores.detach().cpu().double()[live], stable=True)
    check(not scores.isnan().any(), "a filter's score is NaN, as when training diverges: lower "
          "--lr", code=1)
    quantile = {"S": 0, "L": 1}[target] if target in "SL" else float(target[1:])
    first = math.floor(quantile * (len(live) - k) + 0.5)
    places = torch.arange(first, first + k)
    # Of equal scores that begin before `first`, take those with the lowest indices.
    smallest = scores[first:first + 1]
    places[scores[places] == smallest] += torch.searchsorted(scores, smallest) - first
    return live[order[places]].sort().values


def count_ties(scores, mask, indices):
    """Counts the live filters (mask) whose score both a selected and a remaining filter have.

    Between these the order of the filters decided, and not their scores.
    """
    mask = mask.cpu()
    remaining = scores[mask.index_fill(0, indices, False)]
    shared = remaining[torch.isin(remaining, scores[indices])]
    return int(torch.isin(scores[mask], shared).sum())


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


def pruning_event(model, optimizer, score, target, generator, noise, keep_bn, schedule, epoch):
    """Removes the filters that are due after an epoch or, with a FilterNoise, starts their noise.

    Args:
        generator: The random generator of target R.

    Returns:
        ({layer: list of the filters' indices}, {layer: count_ties, where it is not 0}).
    """
    pruned, ties = {}, {}
    for layer, k in num_filters_to_prune(model, schedule, epoch, noise).items():
        block = model.prunable[layer]
        if noise:
            noise.stop(layer)  # scores are those without noise
        live = noise.never_noised(layer) if noise else block.mask
        scores = None if target == "R" else filter_scores(block, score).cpu().double()
        indices = select_filters(scores, live, k, target, generator)
        if scores is not None and (num_tied := count_ties(scores, live, indices)):
            # At initialization all E[BN] are equal, and F.1 prunes by them.
            check(num_tied < int(live.sum()) or epoch < 0, f"all {num_tied} filters of layer "
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
    if pruned:
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

    def tensors(self, layer):
        """Returns the tensors that noise changes, indexed by filter; the weights are the first."""
        bn = self.blocks[layer].bn
        extra = [bn.weight, bn.bias, bn.running_mean, bn.running_var] if self.restore else []
        return [self.blocks[layer].conv.weight, *extra]

    @torch.no_grad()
    def start(self, layer, indices):
        """Starts an event's noise on filters `indices` of a layer."""
        self.stop(layer)  # restores an earlier event's values before they are saved again
        state = self.state[layer]
        state["noised"][indices] = True
        active = indices if self.filters == "newest" else state["noised"].nonzero().flatten()
        active = active.to(self.blocks[layer].mask.device)
        state.update(active=active, test=0, train=0,
                     reference=int(self.never_noised(layer).nonzero()[0]))
        if self.restore:
            state["saved"] = [tensor[active] for tensor in self.tensors(layer)]

    @torch.no_grad()
    def apply(self, training):
        """Changes the active filters' weights in place; called before every forward pass."""
        for layer, state in self.state.items():
            active, tensors = state["active"], self.tensors(layer)
            if active is None:
                continue
            state["train" if training else "test"] += 1
            if self.kind == "gauss":
                weight = tensors[0]
                noise = torch.randn(weight[active].shape, generator=self.generator,
                                    device=weight.device)
                weight[active] += weight[state["reference"]].std() * noise
            else:
                for tensor in tensors[:3]:  # not the running statistics
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
        if state["saved"]:
            for tensor, saved in zip(self.tensors(layer), state["saved"]):
                tensor[state["active"]] = saved
        state.update(active=None, saved=None)

    def load(self, state):
        """Restores the state of a checkpoint, whose tensors are on the CPU."""
        for layer, saved in state.items():
            device = self.blocks[layer].mask.device
            if saved["active"] is not None:
                saved["active"] = saved["active"].to(device)
                saved["saved"] = saved["saved"] and [x.to(device) for x in saved["saved"]]
            self.state[layer] = saved


# +-- What a run records: its config, a line an epoch, a summary ----------------------------------+

def identity(options, info=None):
    """Returns what of config.json tells one run from another; info is the dataset_info."""
    score_crc32 = None  # of the function's source, not of what it calls
    if options.score not in (None, *PAPER_SCORES):
        with contextlib.suppress(OSError, TypeError):
            score_crc32 = zlib.crc32(inspect.getsource(SCORES[options.score]).encode())
    return {"options": experiment_options(options), "score_crc32": score_crc32,
            "own_model": OWN_MODELS.get(options.model), "data": info}


def run_config(options, scaled, schedule, model, device, info):
    """Returns the content of config.json (docs/files.md)."""
    method, setting = run_name(options)
    num_params, macs = count_params_and_macs(model, info["image"])
    return {
        "method": method, "setting": setting, **identity(options, info), "schedule": scaled,
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


def check_finished(path, options):
    """Checks a finished run's options, and its data unless they would have to be downloaded."""
    info = None
    if options.dataset not in CIFAR or dataset_path(options.dataset, options.data_dir).exists():
        _, info = load_arrays(options.dataset, options.data_dir)
    rundir.check_same_run(path, identity(options, info))


def epoch_metrics(where, data, trained, before, after, val=None, event=False):
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
    n_train, n, n_val = (len(data[split][1]) if split in data else 0
                         for split in ("train", "test", "val"))
    train_loss, train_correct = to_list(trained)
    correct_before, loss_before, finite_before = to_list(before[0])
    correct, loss, finite = to_list(after[0])
    val_correct, _, val_finite = to_list(val[0]) if val else (0, 0, n_val)
    check(math.isfinite(train_loss) and (finite_before, finite, val_finite) == (n, n, n_val),
          f"{where}: the training loss, {train_loss / n_train:g}, or logits of the evaluation are "
          "NaN or infinite: lower --lr; the checkpoint of the epoch before is kept", code=1)
    return {
        "train_loss": train_loss / n_train, "train_acc": 100 * (train_correct / n_train),
        "test_acc_before": 100 * correct_before / n, "test_acc": 100 * correct / n,
        "test_loss_before": loss_before / n, "test_loss": loss / n,
        "val_acc": 100 * val_correct / n_val if val else None,
        "stability": 100 * correct / correct_before if event and correct_before else None,
        "churn": 100 * int((before[1] != after[1]).sum()) / n if event else None,
        "train_correct": int(train_correct), "test_correct_before": int(correct_before),
        "test_correct": int(correct), "val_correct": int(val_correct) if val else None}


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


def summarize_run(records, config):
    """Summarizes the records of epochs.jsonl in a dict (docs/files.md lists its fields).

    The best accuracy is over the epochs from the last event on. Without events the mean stability
    is 100. A field that an older log lacks is None.
    """
    events = [r for r in records if any(r["removed"])]
    stabilities = [r["stability"] for r in events if r["stability"] is not None]
    final = [r for r in records if r["epoch"] >= (events[-1]["epoch"] if events else 0)]
    best = max(final, key=lambda r: r["test_acc"])  # the first of equal ones
    chosen = max(final, key=lambda r: r["val_acc"]) if best["val_acc"] is not None else {}
    summary = {
        "epochs": len(records), "events": len(events), "best_acc": best["test_acc"],
        "best_epoch": best["epoch"], "gap": best["train_acc"] - best["test_acc"],
        "last_acc": records[-1]["test_acc"], "val_chosen_acc": chosen.get("test_acc"),
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
        rises = [r["test_loss"] - r["test_loss_before"] for r in events]
        summary |= {"loss_rise": math.fsum(rises) / max(1, len(events)),
                    "churn": math.fsum(r["churn"] for r in events) / max(1, len(events)),
                    "parameters": records[-1]["parameters"], "macs": records[-1]["macs"],
                    "macs_spent": passes * sum(macs),
                    "macs_unpruned": passes * len(records) * config["macs"]}
    return summary


# +-- Training ------------------------------------------------------------------------------------+

def setup_device(device="auto", precision="fp32", deterministic=False):
    """Returns the torch.device of --device; sets precision, determinism and threads globally."""
    cuda = torch.cuda.is_available() and device != "cpu"
    check(cuda or device != "cuda", "--device cuda, but torch sees no CUDA device here: use "
          "--device cpu, or check the driver")
    check(cuda or precision != "tf32", "--precision tf32 needs a CUDA device: use fp32 here")
    if precision == "bf16" and not cuda and not ops.cpu_multiplies_bf16():
        warn_once("train.py: this CPU has no instructions for bf16, so --precision bf16 will be "
                  "slower than fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(THREADS)
    return torch.device("cuda" if cuda else "cpu")


@functools.lru_cache(maxsize=1)  # consecutive runs share a data set
def load_arrays(dataset, data_dir):
    """Returns a data set's arrays and their dataset_info."""
    arrays = load_dataset(dataset, data_dir)
    return arrays, dataset_info(arrays)


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
    # fused needs gradients in the memory format of their weights, as backward() leaves them.
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


def batches(n, batch_size, device, noise, training):
    """Yields the indices (b,) of each batch of n images, and applies noise around it."""
    for start in range(0, n, batch_size):
        if noise:
            noise.apply(training)
        yield torch.arange(start, min(start + batch_size, n), device=device)
        if noise:
            noise.after_batch()


@torch.no_grad()
def evaluate(model, data, split, batch_size, precision, graphs, noise=None):
    """Evaluates the network on a split, in eval mode.

    Returns:
        Tensors on the device: totals (3,) float64, of correct answers, losses in nats and images
        with finite logits, and the predicted classes (images,) int64.
    """
    model.eval()
    x, y = data[split]
    totals = torch.zeros(3, dtype=torch.float64, device=x.device)
    totals, predicted = graphs.static(split, totals, torch.zeros_like(y))

    def test_batch(index):
        logits, labels = predict(model, x[index], data, precision), y[index]
        classes = logits.argmax(1)
        predicted.index_copy_(0, index, classes)
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        finite = logits.isfinite().all(1).sum()
        totals.add_(torch.stack([(classes == labels).sum(), loss, finite]))

    for index in batches(len(x), batch_size, x.device, noise, training=False):
        graphs.run(split, test_batch, index)
    return totals.clone(), predicted.clone()  # the next evaluation reuses the static tensors


def train_epoch(model, data, optimizer, options, generators, epoch, graphs, noise=None):
    """Trains for one pass over the training data.

    Returns:
        Totals (2,) float64 on the device, of losses in nats and correct answers.
    """
    model.train()
    x, y = data["train"]
    device, n = x.device, len(x)
    order = torch.randperm(n, generator=generators["order"]).to(device)
    crops = []
    if options.augment:
        crops = [tensor.to(device) for tensor in draw_crops(n, generators["augment"])]
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    totals, order, *crops = graphs.static("train", totals, order, *crops)

    def train_batch(batch):
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
        totals.add_(torch.stack([loss.detach() * len(batch), correct]))

    # A function of --score FILE.py:FUNCTION may read act, too.
    reads_act = options.score not in (None, "l1", "l2", "ebn", "ebn-signed")
    first_step = epoch * math.ceil(n / options.batch_size) + 1
    for step, batch in enumerate(
            batches(n, options.batch_size, device, noise, training=True), first_step):
        update_act = reads_act and step % ACT_EVERY == 0
        for block in model.prunable:
            block.update_act = update_act
        graphs.run(f"train {update_act}", train_batch, batch)
    return totals.clone()


def build(options, scaled, num_classes, device):
    """Returns (model, optimizer, generators, pruning schedule, FilterNoise or None)."""
    generators = make_generators(options.seed, device if options.noise == "gauss" else None)
    model = build_model(options.model, num_classes, options.width).to(device)
    model.round_to = ROUND_TO[device.type]
    set_backend(model, ops.choose_backend(options.backend, device))
    optimizer = make_optimizer(model, options.optimizer, options.lr, options.weight_decay)
    schedule, noise = pruning_schedule(model, options, scaled), None
    if idle := sum(p > 0 and min(keep.values()) == len(model.prunable[layer].mask)
                   for p, (layer, keep) in zip(options.p or (), schedule.items())):
        warn_once(f"train.py: --p {format_value(options.p)} is less than one filter in {idle} of "
                  f"{len(schedule)} layers, which are not pruned: raise --p or --width")
    if options.noise != "none":
        noise = FilterNoise({layer: model.prunable[layer] for layer in schedule}, options.noise,
                            scaled["noise_batches"], options.noise_filters, options.noise_restore,
                            generators.get("noise"))
    return model, optimizer, generators, schedule, noise


def run_state(epoch, model, optimizer, noise, generators):
    """Returns what a run needs to continue after `epoch` epochs, a dict."""
    return {"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "noise": noise and noise.state,
            "generators": {name: g.get_state() for name, g in generators.items()}}


def restore_state(model, optimizer, noise, generators, state):
    """Restores what run_state returned."""
    model.load_state_dict(state["model"])
    set_backend(model, model.backend)
    optimizer.load_state_dict(state["optimizer"])
    group, = optimizer.param_groups
    if "capturable" in group:  # the checkpoint may come from another device
        group["capturable"] = group["params"][0].is_cuda
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    if noise:
        noise.load(state["noise"])


def train(options):
    """Trains one run, or what is left of it, and prunes the network while it trains.

    Returns:
        The run's summary (summarize_run); None for a run that was finished before.
    """
    path, scaled = run_path(options), scaled_schedule(options)
    rundir.warn_missing_outputs(path, scaled, options.tensorboard)
    if rundir.run_status(path) == "done":
        check_finished(path, options)
        return rundir.report_finished(path, scaled["epochs"])
    for line in lr_schedule_warnings(options, scaled):
        warn_once(f"train.py: {line}")
    device = setup_device(options.device, options.precision, options.deterministic)
    arrays, info = load_arrays(options.dataset, options.data_dir)
    data = prepare_data(arrays, device, **{name: getattr(options, name) for name in DATA_OPTIONS})
    with side_stream(device), rundir.RunDirectory(path, scaled["epochs"], options.tensorboard,
                                                  CHECKPOINT_SECONDS[device.type]) as directory:
        model, optimizer, generators, schedule, noise = build(
            options, scaled, info["classes"], device)
        config = run_config(options, scaled, schedule, model, device, info)
        graphs = Graphs(options.cuda_graphs and device.type == "cuda")
        test = functools.partial(evaluate, model, data, batch_size=options.test_batch_size,
                                 precision=options.precision, graphs=graphs)
        prune = functools.partial(pruning_event, model, optimizer, options.score, options.target,
                                  generators.get("target"), noise, options.prune_bn == "keep",
                                  schedule)
        if directory.has_checkpoint():
            config = rundir.continued_config(path, config)
            directory.resume(functools.partial(restore_state, model, optimizer, noise, generators))
        else:  # --scratch prunes before the first epoch, which the schedule calls -1
            _, config["tied"] = prune(-1)
        directory.begin(config)

        for epoch in range(len(directory.records), scaled["epochs"]):
            start_time = time.monotonic()
            lr = options.lr * 0.1 ** sum(epoch >= x for x in scaled["lrs"])
            optimizer.param_groups[0]["lr"] = lr

            # 1. Train for one epoch, then test. CUDA graphs contain lr and numbers of filters.
            graphs.clear_unless(lr, graph_key(model))
            trained = train_epoch(model, data, optimizer, options, generators, epoch, graphs, noise)
            before = after = test("test", noise=noise)

            # 2. Prune the filters that the schedule asks for, or start their noise.
            pruned, ties = prune(epoch)

            # 3. Test again: stability is the accuracy after the event over that before it.
            if pruned or noise:
                graphs.clear_unless(lr, graph_key(model))
                after = test("test", noise=noise)
            validation = test("val") if "val" in data else None
            metrics = epoch_metrics(f"{path}: epoch {epoch}, lr {lr:g}", data, trained, before,
                                    after, validation, bool(pruned))
            record = {"epoch": epoch, "lr": lr, **metrics,
                      **network_record(model, schedule, pruned, ties, noise, info["image"]),
                      "seconds": round(max(0, time.monotonic() - start_time), 3)}
            state = run_state(epoch + 1, model, optimizer, noise, generators)
            directory.save_epoch(record, state, keep_weights=epoch + 1 == scaled["save_epoch"])
            directory.print_epoch(summarize_run(directory.records, config)["mean_stability"])
        return directory.finish(summarize_run(directory.records, config))


# +-- Entry: one run, or a list of runs -----------------------------------------------------------+

def unique_runs(commands):
    """Returns {run's path: (options, command line)} of all runs of `commands`, lists of str."""
    runs, sources = {}, {}
    for argv in commands:
        given = parse_options(argv)
        check(not (given.runs or given.plan or given.status), f"{shlex.join(argv)}: a list cannot "
              "hold another list: give the options of a run")
        for seed in given.seeds or [given.seed]:
            options = argparse.Namespace(**vars(given) | {"seed": seed, "seeds": None})
            line = shlex.join(argv) + f" --seeds {seed}" * bool(given.seeds)  # the last one counts
            path = run_path(options)
            first, _ = runs.setdefault(path, (options, line))
            same = all(getattr(first, k) == getattr(options, k)
                       for k in ("dataset", "data_dir", "save_epoch", "tensorboard"))
            check(same, f"two of the runs would share {path}, but differ in --dataset, --data-dir, "
                  "--save-epoch or --tensorboard: give one of them another --log-dir")
        for what, crc32 in rundir.sources(identity(given)).items():
            check(sources.setdefault(what, crc32) == crc32,
                  f"the {what} has two sources: rename one of the two functions")
    return runs


def read_runs(file):
    """Returns unique_runs of a file with a line of options for each run."""
    try:
        commands = [shlex.split(line) for line in open(file) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as lines of options: {first_line(error)}") from None
    return unique_runs(commands)


def count_epochs(runs):
    return {path: scaled_schedule(options)["epochs"] for path, (options, _) in runs.items()}


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
    left = rundir.report_plan(count_epochs(runs), retry_failed)
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
    try:
        options = parse_options(argv)
        ops.keep_freed_memory()
        signal.signal(signal.SIGTERM, terminate)
        if options.plan:
            print_plan(read_runs(options.plan), options.retry_failed)
        elif options.status:
            rundir.print_status({file: count_epochs(read_runs(file)) for file in options.status})
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
