#!/usr/bin/env python3
"""Train a network, prune it while it trains, and measure how stable its accuracy is under pruning.

The paper: "The Generalization-Stability Tradeoff in Neural Network Pruning" (NeurIPS 2020). Section numbers in this
file are those of its appendix. Every default is the paper's setting for the model (Figure 2; Figure 4 for SGD).

    python train.py --model vgg11 --target L --r 40                     # Prune_L 13%, CIFAR-10, 325 epochs
    python train.py --model resnet18 --target S --r 4 --seed 7          # Prune_S 1%
    python train.py --model vgg11 --target none --scale-epochs 0.08     # the baseline, in 26 epochs
    python train.py --model vgg11 --target L --noise zero --noise-batches 50
    python train.py --model resnet20 --target S --r 60                  # SGD, l1 scores, every layer
    python train.py --model vgg11 --target S --seeds 1-10               # ten runs in one process
    python train.py --dataset digits --width 0.25 --epochs 20 --lrs 12 18 --target S --s 0 --e 9 --p 0.5 --r 3

A run leaves logs/<dataset>/<model>/<method>/seed<k>/ with config.json, epochs.jsonl, checkpoint.pt and, at its end,
done.json. The same command again continues a half-done run and leaves a finished one alone.

The experiment in ten lines; `experiment` below is these, with noise, learning rates, validation and CUDA graphs:

    args = parse_options(["--preset", "quick", "--target", "L", "--device", "cpu"])
    device, arrays = runs.choose_device(args), load_data(args.dataset)
    data, run = put_on_device(arrays, device, args), new_run(args, len(arrays["classes"]), device)
    for epoch in range(run.times["epochs"]):
        totals, run.step = train_epoch(run.model, data, run.optimizer, args, run.generators, run.step)
        before = evaluate(run.model, data, "test", args)
        due = filters_due(run.model, args, run.plan, epoch, run.noise)
        gone = prune_now(run.model, run.optimizer, args, run.plan, due, run.noise, run.generators["target"])
        after = evaluate(run.model, data, "test", args)
        print(epoch, measured(f"epoch {epoch}", data, totals, before, after, event=bool(gone)))
"""
import argparse
import io
import math
import os
import pathlib
import platform
import shlex
import signal
import sys
import threading
import time
import types
import warnings
from fractions import Fraction

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from gst_ext import files, ops, runs
from gst_ext.files import UserError, require, short
from gst_ext.graphs import fed, hold_for, new_graphs, numbers, replayed

# +--------------------------------------------------------------------------------------------------------------------+
# | Configuration: the paper's settings, the command line, the run's name                                              |
# +--------------------------------------------------------------------------------------------------------------------+

PRUNABLE_BLOCKS = {"vgg11": 8, "vgg19": 16, "resnet18": 16, "resnet20": 18, "resnet56": 54}
SCORES = {  # name: the score of each filter of a block, (c_out,); of its weights (A.4), its map, its batch norm (B.2)
    "l1": lambda block: block.conv.weight.detach().flatten(1).abs().sum(1),
    "l2": lambda block: block.conv.weight.detach().flatten(1).square().sum(1).sqrt(),
    "act": lambda block: block.act.clone(),
    "ebn": lambda block: ops.ebn_score(block.bn.weight.double(), block.bn.bias.double()),
    "ebn-signed": lambda block: ops.ebn_score(block.bn.weight.double(), block.bn.bias.double(), signed=True),
}
MOMENTUM, BN_MOMENTUM, BN_EPS = 0.9, 0.1, 1e-5
ACT_KEEP, ACT_EVERY = 0.9, 10  # act score: 0.9 * old + 0.1 * new on every tenth training batch (A.4, footnote 4)
CROP_PADDING = 4

OPTIMIZERS = {
    "adam": dict(lr=0.001, weight_decay=0.0, epochs=325, lrs=[150, 300], augment=False),  # A.3, B.1
    "sgd": dict(lr=0.1, weight_decay=1e-4, epochs=165, lrs=[83, 125], augment=True),  # Figures 4 and C.3
}
ADAM_PRUNING = {  # B.1
    "vgg": dict(s=[3, 4, 5, 6], e=[150, 150, 150, 275], p=[0.3, 0.3, 0.3, 0.9], r=40, score="l2", save_epoch=315),
    "resnet": dict(s=[7, 8, 9, 10], e=[150, 150, 170, 275], p=[0.25, 0.4, 0.25, 0.95], r=40, score="act", save_epoch=0),
}
DEFAULTS = dict(dataset="cifar10", width=1.0, scale_epochs=1.0, batch_size=128, test_batch_size=128, val_split=0,
                train_images=0, test_images=0, label_noise=0.0, precision="fp32",
                deterministic=False)  # of what else decides a result, for every model
PRESETS = {  # --preset: by optimizer, what takes the place of the settings above
    "quick": {"adam": dict(dataset="digits", width=0.25, val_split=300, batch_size=12, lr=0.002, epochs=350, lrs=[350],
                           scale_epochs=0.0375),
              "sgd": dict(dataset="digits", width=0.25, val_split=300, batch_size=12, scale_epochs=0.08)},
    "small": dict.fromkeys(OPTIMIZERS, dict(train_images=2560, test_images=3000, width=0.25, batch_size=64,
                                              scale_epochs=0.1)),
}
NOT_THE_RESULT = ("log_dir", "data_dir", "device", "backend", "cuda_graphs", "save_epoch", "tensorboard", "seeds",
                  "runs", "at_once", "plan", "retry_failed", "status", "preset")  # not what a run computes
CIFAR = ("cifar10", "cifar100")
BUILT_IN = (*CIFAR, "digits")
LISTS = ("runs", "plan", "status", "at-once", "retry-failed")  # the options of lists of runs
DATA_OPTIONS = types.SimpleNamespace(augment=False, **{name: DEFAULTS[name] for name in (
    "val_split", "train_images", "test_images", "label_noise")})  # what put_on_device reads: the whole set as it is
MULTIPLE = {"cpu": 1, "cuda": 32}  # a layer's live filters are computed as so many, rounded up: shapes a device likes


def paper_settings(model, optimizer=None):
    """The paper's options for `model` (str) under `optimizer` ("adam", "sgd" or None: the paper's own for it)."""
    optimizer = optimizer or ("sgd" if model in ("resnet20", "resnet56") else "adam")
    n = PRUNABLE_BLOCKS[model]
    pruning = dict(s=[40] * n, e=[100] * n, p=[0.1] * n, r=30, score="l1", save_epoch=0)
    if optimizer == "adam":
        pruning = ADAM_PRUNING[model.rstrip("0123456789")]
    return dict(optimizer=optimizer, **OPTIMIZERS[optimizer], **pruning)


def usual_settings(model, optimizer=None, preset=None):
    """What a run of `model` (str) uses where no option is given: the paper's settings, or a preset's in their place."""
    settings = paper_settings(model, optimizer) | DEFAULTS
    return settings | (PRESETS[preset][settings["optimizer"]] if preset else {})


def make_parser():
    table = ["the paper's settings, used for whatever is not given:"]
    for model, optimizer in [("vgg11", "adam"), ("resnet18", "adam"), ("resnet20", "sgd")]:
        options = paper_settings(model, optimizer)
        table.append(f"  {model}: " + " ".join(f"{name}={short(value)}" for name, value in options.items()))
    table.append("  vgg19 is as vgg11, resnet56 as resnet20; --optimizer brings the other settings of its kind along.")
    parser = files.OneLineParser(prog="train.py", description=__doc__, epilog="\n".join(table), allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("network and data").add_argument
    add("--model", choices=PRUNABLE_BLOCKS, default="vgg11", help="(default: vgg11)")
    add("--preset", choices=PRESETS, help="a named set of options: quick is a few epochs of digits, small is CIFAR-10 "
        "with few images; an option given beside it counts (default: none, the paper's settings)")
    add("--width", type=float, help="multiplies every channel count (default: 1)")
    add("--dataset", help="cifar10, cifar100, digits, a .npz file, or a folder with train/ and test/ class folders of "
        "images (default: cifar10)")
    add("--data-dir", default="data", help="where <dataset>.npz lies or is put (default: data)")
    add("--val-split", type=int, metavar="N", help="hold N training images out to validate (default: 0)")
    add("--train-images", type=int, metavar="N", help="train on N of the training images, after those held out; 0: all "
        "(default: 0)")
    add("--test-images", type=int, metavar="N", help="test on N of the test images; 0: all (default: 0)")
    add("--label-noise", type=float, metavar="F", help="give a fraction F of the training images a random class, the "
        "same ones for every seed and method (default: 0)")
    add("--augment", action=flag, help="random crop and flip (default: the paper's)")

    add = parser.add_argument_group("pruning (defaults: the paper's for the model, listed below)").add_argument
    add("--target", choices=("none", "S", "L", "R"),
        help="prune the filters with the Smallest or the Largest score, or Random ones (default: none)")
    add("--r", type=int, help="retrain period: epochs between pruning iterations")
    for name, kind, what in (("s", int, "first epochs"), ("e", int, "last epochs"), ("p", float, "pruned fractions")):
        add(f"--{name}", type=files.repeated(kind), nargs="+", metavar=name,
            help=f"{what} of pruning, one value (VxN: N times V) for each of the last n prunable layers")
    add("--score", choices=SCORES, help="what makes a filter small or large")
    add("--scratch", action=flag, default=False, help="prune everything once, before training (default: no)")
    add("--prune-bn", choices=("drop", "keep"), default="drop",
        help="drop a pruned filter's batch norm and shortcut too, or keep them (default: drop)")

    add = parser.add_argument_group("noise in place of pruning (appendix D)").add_argument
    add("--noise", choices=("none", "zero", "gauss"), default="none",
        help="noise the targeted filters instead of removing them (default: none)")
    add("--noise-batches", type=int, metavar="K", help="end an event's noise after K noised training batches; 1 is a "
        "single application, on the first test batch (default: 1)")
    add("--noise-filters", choices=("newest", "all"), help="only the event's filters, or all so far (default: newest)")
    add("--noise-restore", action=flag, help="zero batch norm too, and put all back afterwards, D.2 (default: no)")

    add = parser.add_argument_group("optimisation and schedule").add_argument
    add("--optimizer", choices=OPTIMIZERS, help="(default: the paper's for the model)")
    add("--lr", type=float, help="initial learning rate")
    add("--weight-decay", type=float)
    add("--batch-size", type=int, help="(default: 128)")
    add("--test-batch-size", type=int, help="each adds its noise in a noise run (default: 128)")
    add("--epochs", type=int)
    add("--lrs", type=files.repeated(int), nargs="*", metavar="epoch", help="epochs that divide the rate by ten")
    add("--scale-epochs", type=float, metavar="F",
        help="multiply epochs, lrs, s, e, r and noise batches by F, each rounded, r at least 1 (default: 1)")
    add("--seed", type=int, default=1, help="(default: 1)")

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--backend", choices=("auto", "ext", "eager"), default="auto", help="who computes the blocks: the extension, "
        "live filters only, or plain PyTorch, masked; auto is ext where it is built (default: auto)")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="(default: fp32)")
    add("--deterministic", action=flag,
        help="CUDA: only deterministic kernels; CPU runs repeat exactly anyway (default: no)")
    add("--cuda-graphs", action=flag, default=True, help="CUDA: capture a step once, then replay it (default: yes)")
    add("--log-dir", default="logs", help="(default: logs)")
    add("--save-epoch", type=int, metavar="N", help="also keep the weights after the N-th epoch, as epoch<N>.pt; 0: no")
    add("--tensorboard", action=flag, default=False, help="also write <run>/tensorboard, if installed (default: no)")

    add = parser.add_argument_group("many runs, each with the files and results it would have alone").add_argument
    add("--seeds", type=files.seed_list, metavar="1-10", help="a run for each seed, 1-10 or 1,4,7, in place of --seed")
    add("--runs", metavar="FILE", help="train the runs listed in FILE, a line of options each")
    add("--at-once", type=int, metavar="N", help="runs that take turns in this process; on a GPU they compute side by "
        "side (default: what a GPU's memory holds, at most 16; 1 on a CPU)")
    add("--plan", metavar="FILE", help="train nothing: say how many of the runs listed in FILE are left, fetch their "
        "data, and print their lines")
    add("--retry-failed", action=flag, default=False, help="count failed runs as left in --plan (default: no)")
    add("--status", metavar="FILE", nargs="+", help="train nothing: say what became of the runs listed in each FILE")
    return parser


def parse_options(argv):
    """Parses, fills in the paper's settings, checks; raises UserError. Options that a run does not use become None."""
    args = make_parser().parse_args(argv)
    for name in ("s", "e", "p", "lrs"):
        if getattr(args, name) is not None:
            setattr(args, name, [value for values in getattr(args, name) for value in values])
    given = {name for name, value in vars(args).items() if value is not None}
    for name, value in usual_settings(args.model, args.optimizer, args.preset).items():
        if name not in given:
            setattr(args, name, value)

    if {"runs", "plan", "status"} & given:
        more = [x for x in argv if x.startswith("--") and x.split("=")[0][2:] not in LISTS]
        require(not more, f"{' '.join(more)} beside a list would count for none of its runs: write it into their lines")
    from_0 = ("seed", "val_split", "train_images", "test_images", "save_epoch")
    for name in ("epochs", "batch_size", "test_batch_size", "r", "noise_batches", "at_once", *from_0):
        value, least = getattr(args, name), 0 if name in from_0 else 1
        require(value is None or least <= value < 2**32,
                f"--{name.replace('_', '-')} {value}: give {least} or more, below 2^32")
    for name in ("width", "scale_epochs", "lr", "weight_decay"):
        value = getattr(args, name)
        require(0 < value < 1e6 or value == 0 and name == "weight_decay",
                f"--{name.replace('_', '-')} {short(value)}: give a number above 0 and below a million")
    require(0 <= args.label_noise <= 1, f"--label-noise {short(args.label_noise)}: give a fraction from 0 to 1")
    require(all(epoch >= 0 for epoch in args.lrs), f"--lrs {short(args.lrs)}: epochs count from 0")

    args.target = args.target or "none"
    pruning, noise = args.target != "none", args.noise != "none"
    require(pruning or not (args.scratch or noise), "--scratch and --noise need filters: give --target S, L or R too")
    require(not (noise and args.scratch), "--noise and --scratch exclude each other: choose one")
    require(args.prune_bn == "drop" or pruning and not noise, "--prune-bn keep needs a --target, and no --noise")
    for name in {"noise_batches", "noise_filters", "noise_restore"} & given:
        require(noise, f"--{name.replace('_', '-')} does nothing without --noise: add --noise zero or gauss")
    for name in {"s", "e", "p", "r", "score"} & given:  # beside an explicit none they are those of a list's other runs
        require("target" in given, f"--{name} does nothing without --target: add --target S, L or R")
    require(not args.noise_restore or args.noise == "zero", "--noise-restore is for --noise zero")
    if noise:
        args.noise_batches, args.noise_filters = args.noise_batches or 1, args.noise_filters or "newest"
        args.noise_restore = bool(args.noise_restore)

    counts = ", ".join(f"{len(getattr(args, k))} (--{k}{'' if k in given else ', the default'})" for k in "sep")
    require(len(args.s) == len(args.e) == len(args.p) or args.scratch,
            f"--s, --e and --p need one value for each pruned layer: there are {counts}")
    n = PRUNABLE_BLOCKS[args.model]
    require(len(args.p) <= n, f"--p has {len(args.p)} values, but {args.model} has {n} layers to prune: give fewer")
    require(all(0 <= p < 1 for p in args.p), f"--p {short(args.p)}: give fractions from 0 to below 1, since a layer "
            "without filters cuts the network in two")
    for s, e in zip(args.s, args.e):
        require(0 <= s <= e, f"pruning starts at epoch {s} and ends at {e}: each s must be 0 or more and at most its e")
    if not pruning or args.scratch:
        args.r = args.s = args.e = None
    else:
        require(max(args.e) < args.epochs, f"pruning ends at epoch {max(args.e)}, but epochs count from 0 to "
                                           f"{args.epochs - 1}: lower --e or raise --epochs")
    if not pruning:
        args.p = args.score = None
    require("save_epoch" not in given or args.save_epoch <= args.epochs,
            f"--save-epoch {args.save_epoch} is past the last of {args.epochs} epochs")
    if args.save_epoch > args.epochs:
        args.save_epoch = 0
    return args


def schedule(args):
    """The run's epochs, lrs, s, e, r, save_epoch and noise_batches after --scale-epochs, a dict; None: not used."""
    def scaled(x):
        return math.floor(Fraction(str(args.scale_epochs)) * x + Fraction(1, 2))

    times = {name: getattr(args, name) and [scaled(x) for x in getattr(args, name)] for name in ("lrs", "s", "e")}
    times["epochs"] = max(1, scaled(args.epochs))
    times["save_epoch"] = args.save_epoch and max(1, scaled(args.save_epoch))
    times["r"] = args.r and max(1, scaled(args.r))
    k = args.noise_batches  # 1 is another thing, a single pass
    times["noise_batches"] = k if k in (None, 1) else max(2, scaled(k))
    if times["e"]:  # rounding up must not carry the last pruning iteration past the end
        times["e"] = [min(e, times["epochs"] - 1) for e in times["e"]]
        times["s"] = [min(s, e) for s, e in zip(times["s"], times["e"])]
    return times


def run_name(args):
    """(method, setting): what is done to the filters, and all else: the preset and what differs from that (without
    one, from the paper's settings), "" if nothing."""
    usual = usual_settings(args.model, args.optimizer, args.preset)
    usual["optimizer"] = paper_settings(args.model)["optimizer"]

    def differing(**labels):
        return [label + short(getattr(args, name)) for name, label in labels.items()
                if getattr(args, name) not in (None, usual[name])]

    if args.noise != "none":
        method = [args.noise, str(args.noise_batches)] + [args.target] * (args.target != "L") + differing(r="r")
        method += [args.noise_filters] * (args.noise_filters != "newest") + ["restore"] * args.noise_restore
        method += differing(test_batch_size="tb")
    elif args.scratch:
        method = ["scratch", args.target]
    else:
        method = [args.target] + [f"r{args.r}"] * (args.target != "none")
    method += differing(score="") + ["bnkeep"] * (args.prune_bn == "keep") + differing(s="s", e="e", p="p")
    setting = differing(optimizer="") + [args.preset] * bool(args.preset)
    setting += differing(width="w", scale_epochs="x", epochs="epochs", lrs="lrs", lr="lr",
                         weight_decay="wd", batch_size="batch", val_split="val", train_images="n", test_images="t",
                         label_noise="noise", precision="")
    setting += ["augment" if args.augment else "noaugment"] * (args.augment != usual["augment"])
    return "-".join(method), "-".join(setting + ["deterministic"] * args.deterministic)


def dataset_name(name):
    """The data set's part of a path: the whole name of a file or folder, or a built-in name, which is nobody else's."""
    if name in BUILT_IN:
        return name
    whole = os.path.basename(os.path.abspath(name))  # of "..", too
    return f"own-{whole}" if whole.lower() in ("", *BUILT_IN) else whole


def run_directory(args):
    return pathlib.Path(args.log_dir, dataset_name(args.dataset), args.model, "-".join(filter(None, run_name(args))),
                        f"seed{args.seed}")


# +--------------------------------------------------------------------------------------------------------------------+
# | Data: every source gives the same dict of arrays; the whole set lives on the device as uint8                       |
# +--------------------------------------------------------------------------------------------------------------------+

def data_path(name, data_dir):
    """The file or folder of a data set; digits have none."""
    return pathlib.Path(data_dir, f"{name}.npz") if name in CIFAR else pathlib.Path(name)


def load_data(name, data_dir="data"):
    """Loads a data set by name or path, checked.

    name: "cifar10", "cifar100" (read from data_dir/<name>.npz; downloaded by torchvision and cached there the first
    time), "digits" (scikit-learn's), the path of a .npz of the same form, or of a folder with train/ and test/, each
    with one folder of images per class (resized to 32x32). Returns a dict: train_x, test_x (n, height, width, 3)
    uint8; train_y, test_y (n,) int64, 0 … k-1; classes (k,) str. Raises UserError if that cannot be had.
    """
    path = data_path(name, data_dir)
    if name in CIFAR:
        if not path.exists():
            with files.lock_directory(path.parent, wait=True):
                if not path.exists():
                    buffer = io.BytesIO()
                    np.savez(buffer, **files.download_cifar(name, data_dir))
                    files.write_atomically(path, buffer.getbuffer())
    elif name != "digits":
        require(path.is_dir() or path.suffix == ".npz" and path.exists(),
                f"--dataset {name}: no such thing; give cifar10, cifar100, digits, a .npz file, or a folder with "
                "train/ and test/ class folders of images")
    read = files.read_image_folder if path.is_dir() else files.read_npz
    return files.checked_arrays(path, files.load_digits() if name == "digits" else read(path))


def subset(n, *counts):
    """Disjoint ascending indices into n images, so many as each of counts says: the same for every seed and method."""
    order, bounds = np.random.RandomState(0).permutation(n), np.cumsum([0, *counts])
    return [np.sort(order[start:end]) for start, end in zip(bounds, bounds[1:])]


def put_on_device(data, device, args=DATA_OPTIONS):
    """The arrays as tensors on `device`: {"train": (x uint8 NHWC, y), "test": …, "val": … if asked, "mean", "std"}
    and, for --augment, "padded", the training images in a border for crop_and_flip.

    args: a namespace with DATA_OPTIONS' fields; mean and std (3,): the training images' per-channel ones, in units of a
    uint8 pixel, exact. The options draw the same images and labels for every seed, so that runs differ in what they
    learn and not in what teaches and judges it.
    """
    train_x, train_y, test_x, test_y = (data[k] for k in ("train_x", "train_y", "test_x", "test_y"))
    val_split, train_images, test_images = args.val_split, args.train_images, args.test_images
    left = len(train_x) - val_split
    require(left > 0, f"--val-split {val_split} leaves none of {len(train_x)} images: give fewer")
    for name, wanted, there in (("train", train_images, left), ("test", test_images, len(test_x))):
        require(wanted <= there, f"--{name}-images {wanted}, but there are {there}: give fewer")
    splits = {"test": (test_x, test_y)}
    if test_images:
        kept, = subset(len(test_x), test_images)
        splits["test"] = (test_x[kept], test_y[kept])
    if val_split or train_images:
        held_out, kept = subset(len(train_x), val_split, train_images or left)
        if val_split:
            splits["val"] = (train_x[held_out], train_y[held_out])
        train_x, train_y = train_x[kept], train_y[kept]
    if args.label_noise:
        random, train_y = np.random.RandomState(1), train_y.copy()
        noised = random.permutation(len(train_y))[:math.floor(args.label_noise * len(train_y) + 0.5)]
        train_y[noised] = random.randint(len(data["classes"]), size=len(noised))
    splits["train"] = (train_x, train_y)
    counts = np.stack([np.bincount(train_x[..., c].ravel(), minlength=256) for c in range(3)]) / train_x[..., 0].size
    mean = counts @ np.arange(256)
    variance = counts @ np.arange(256) ** 2 - mean**2
    require(variance.min() > 1e-9, "the training images are constant in one channel: nothing can be learnt from it")
    tensors = {k: tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in v) for k, v in splits.items()}
    if args.augment:
        tensors["padded"] = F.pad(tensors["train"][0], (0, 0, *[CROP_PADDING] * 4))
    return tensors | {k: torch.tensor(v, dtype=torch.float32, device=device)
                      for k, v in (("mean", mean), ("std", np.sqrt(variance)))}


def normalise(x, data):
    """uint8 (n, h, w, 3) → float32 (n, 3, h, w) in channels-last memory, by the training set's mean and deviation."""
    return ((x.float() - data["mean"]) / data["std"]).permute(0, 3, 1, 2)


def draw_crops(n, generator):
    """Crop offsets (2, n) in 0 … 8 and flips (n,) for one epoch, drawn on the CPU so that any device trains alike."""
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, n), generator=generator)
    return offsets, torch.randint(0, 2, (n,), generator=generator).bool()


def crop_and_flip(padded, index, offsets, flips):
    """Images `index` of `padded` (n, h+8, w+8, 3), cropped to (h, w) at `offsets` and mirrored where `flips`."""
    height, width = (size - 2 * CROP_PADDING for size in padded.shape[1:3])
    rows = offsets[0][:, None] + torch.arange(height, device=padded.device)
    columns = torch.arange(width, device=padded.device).expand(len(index), width)
    columns = torch.where(flips[:, None], width - 1 - columns, columns) + offsets[1][:, None]
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


# +--------------------------------------------------------------------------------------------------------------------+
# | Networks: every one is made of blocks, and a block knows which of its filters are live                             |
# +--------------------------------------------------------------------------------------------------------------------+

class Block(nn.Module):
    """conv → batch norm → (+ shortcut) → ReLU, with a mask of its filters.

    mask (c_out,) bool, True = live; bn_mask the same for the batch norm's scale and shift and the shortcut, which
    differs from mask only under --prune-bn keep; act (c_out,) the running mean |a| before ReLU.

    The backend "eager" multiplies by the masks. "ext" computes compact maps: live_in and live_out (int64 indices, None
    for all) are the channels it gets and gives, all that are live and as many pruned ones, which stay zero, as make a
    shape the device likes; shortcut_map says where each lies in the shortcut (-1: nowhere). use_backend sets them,
    which whoever changes masks has to call again. pool ends the block with a 2x2 max-pool.
    """

    def __init__(self, c_in, c_out, kernel=3, stride=1, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(c_out, BN_EPS, BN_MOMENTUM)
        self.register_buffer("mask", torch.ones(c_out, dtype=torch.bool))
        self.register_buffer("bn_mask", torch.ones(c_out, dtype=torch.bool))
        self.register_buffer("act", torch.zeros(c_out))
        self.pool = False
        self.measure = False  # whether this forward pass updates act
        self.backend, self.keeps_bn, self.live_in, self.live_out, self.shortcut_map = "eager", False, None, None, None

    def forward(self, x, shortcut=None):
        """x (n, c_in, h, w), shortcut (n, c_out, h', w') or None → (n, c_out, h', w'); a pruned map is exactly 0.

        Masking the parameters, not only the map, is what keeps the gradient of a pruned filter exactly 0.
        """
        conv, bn = self.conv, self.bn
        if self.backend == "ext":
            weight = conv.weight * self.mask.view(-1, 1, 1, 1) if self.keeps_bn else conv.weight
            return ops.masked_conv_bn_act(
                x, weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, self.live_out, self.live_in,
                conv.stride[0], conv.padding[0], shortcut, self.shortcut_map, self.act if self.measure else None,
                training=self.training, momentum=bn.momentum, eps=bn.eps, act_keep=ACT_KEEP, pool=self.pool)
        weight = conv.weight * self.mask.view(-1, 1, 1, 1)
        a = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)
        a = F.batch_norm(a, bn.running_mean, bn.running_var, bn.weight * self.bn_mask, bn.bias * self.bn_mask,
                         self.training, bn.momentum, bn.eps)
        if shortcut is not None:
            a = a + shortcut * self.bn_mask.view(-1, 1, 1)
        if self.measure:
            self.act.mul_(ACT_KEEP).add_(a.detach().abs().mean((0, 2, 3), dtype=torch.float32), alpha=1 - ACT_KEEP)
        a = F.relu(a, inplace=True)
        return F.max_pool2d(a, 2) if self.pool else a

    def connect(self, live_in, multiple):
        """Takes the channels of its input and returns those of its output (indices, None for all)."""
        self.keeps_bn = not torch.equal(self.mask, self.bn_mask)
        n = min(len(self.mask), -(-int(self.bn_mask.sum()) // multiple) * multiple)
        chosen = torch.argsort(~self.bn_mask, stable=True)[:n].sort().values if n < len(self.mask) else None
        self.live_in, self.live_out = live_in, in_place_of(self.live_out, chosen)
        return self.live_out

    def computed(self):
        """How many filters it computes: under "ext" the live ones, and those that fill up the shape."""
        return len(self.mask) if self.backend == "eager" or self.live_out is None else len(self.live_out)


def in_place_of(old, new):
    """new, but in old's memory where it fits in there: a captured graph goes on reading its indices from that."""
    return new if old is None or new is None or old.shape != new.shape else old.copy_(new)


def use_backend(model, backend):
    """Makes every block of `model` compute by "ext" or "eager", by its masks as they are now; returns the model.

    Under "ext" a pruned block computes its live filters, their number rounded up to a multiple of model.multiple.
    """
    for block in model.modules():
        if isinstance(block, Block):
            block.backend = backend
    model.backend = backend
    if backend == "ext":
        model.connect()
    return model


def shapes_of(model):
    """What a captured step holds fast of how `model` computes; where the channels lie it reads anew each time."""
    return [(block.keeps_bn, block.computed(), block.shortcut_map is None) for block in model.prunable]


def classify(model, x):
    """The last layer, on the mean of each map of x (n, c, h, w), c all or the live channels."""
    live = model.live if model.backend == "ext" else None
    weight = model.linear.weight if live is None else model.linear.weight[:, live]
    return F.linear(x.mean((2, 3)), weight, model.linear.bias)


class PaddedShortcut(nn.Module):
    """ResNet's option A: zero maps around the old ones; no parameters."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.c_in, self.before = c_in, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class VGG(nn.Module):
    def __init__(self, maps, num_classes):
        super().__init__()
        layers, c_in = [], 3
        for c_out in maps:  # 0 stands for a 2x2 max-pool, which is the end of the block before
            layers.append(Block(c_in, c_out, bias=True) if c_out else nn.Identity())
            layers[-1 if c_out else -2].pool = not c_out
            c_in = c_out or c_in
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(c_in, num_classes)
        self.prunable = [layer for layer in layers if isinstance(layer, Block)]
        nn.init.normal_(self.linear.weight, 0, 0.01)
        nn.init.zeros_(self.linear.bias)

    def connect(self):
        self.live = None
        for block in self.prunable:
            self.live = block.connect(self.live, self.multiple)

    def forward(self, x):
        return classify(self, self.features(x))  # 32x32 images end as 1x1 maps, larger ones are averaged


class ResNet(nn.Module):
    def __init__(self, stem, stages, depth, projection, num_classes):
        super().__init__()
        self.stem = Block(3, stem)
        self.pairs, self.shortcuts, c_in = nn.ModuleList(), nn.ModuleList(), stem
        for stage, c_out in enumerate(stages):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                self.pairs.append(nn.ModuleList([Block(c_in, c_out, stride=stride), Block(c_out, c_out)]))
                if stride == 1 and c_in == c_out:
                    shortcut = nn.Identity()
                elif projection:
                    shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False),
                                             nn.BatchNorm2d(c_out, BN_EPS, BN_MOMENTUM))
                else:
                    shortcut = PaddedShortcut(c_in, c_out)
                self.shortcuts.append(shortcut)
                c_in = c_out
        self.linear = nn.Linear(c_in, num_classes)
        self.prunable = [block for pair in self.pairs for block in pair]

    def connect(self):
        self.live = self.stem.connect(None, 1)
        for (first, second), shortcut in zip(self.pairs, self.shortcuts):
            came = self.live
            self.live = second.connect(first.connect(came, self.multiple), self.multiple)
            second.shortcut_map = in_place_of(second.shortcut_map, shortcut_map(shortcut, came, second))

    def forward(self, x):
        x = self.stem(x)
        for (first, second), shortcut in zip(self.pairs, self.shortcuts):
            stride = first.conv.stride[0]
            # The shortcut reads every second pixel by itself: of fewer than eight channels, oneDNN's AVX2 code for a
            # strided 1x1 convolution's gradient writes past its buffer.
            seen = x[:, :, ::stride, ::stride]
            x = second(first(x), live_shortcut(shortcut, seen, first) if self.backend == "ext" else shortcut(seen))
        return classify(self, x)


def shortcut_map(shortcut, came, block):
    """Where each filter that `block` computes lies in what live_shortcut gives (-1: nowhere), an index; None: in order.

    came: the channels that come in, as Block.connect takes them. A pruned filter's shortcut is pruned too.
    """
    before, n = (shortcut.before, shortcut.c_in) if isinstance(shortcut, PaddedShortcut) else (0, len(block.mask))
    if isinstance(shortcut, nn.Sequential):
        came = None  # a projection gives all its maps
    alive = block.bn_mask.tolist()
    if n == len(alive) and came is block.live_out is None and all(alive):
        return None
    where = {channel + before: i for i, channel in enumerate(range(n) if came is None else came.tolist())}
    filters = range(len(alive)) if block.live_out is None else block.live_out.tolist()
    return torch.tensor([where.get(f, -1) if alive[f] else -1 for f in filters], dtype=torch.int64,
                        device=block.mask.device)


def live_shortcut(shortcut, x, block):
    """The shortcut past `block` of compact maps x: a projection gives all its maps, the others the live ones of x."""
    if not isinstance(shortcut, nn.Sequential):
        return x
    conv, bn = shortcut
    if block.training:
        bn.num_batches_tracked.add_(1)  # as the module itself would
    return ops.masked_conv_bn_act(x, conv.weight, None, bn.weight, bn.bias, bn.running_mean, bn.running_var, None,
                                      block.live_in, 1, 0, training=block.training, relu=False,
                                      momentum=bn.momentum, eps=bn.eps)


def cost(model, image):
    """(parameters left, multiply-adds of one image's forward pass): what live filters hold and what reads live maps.

    image: (height, width, …). Convolutions and the last layer are what multiplies.
    """
    parameters, macs, came, size = 0, 0, 3, image[:2]

    def add(conv, filters, maps):
        nonlocal parameters, macs
        weights = came * filters * conv.kernel_size[0] ** 2
        after = [(s + 2 * conv.padding[0] - conv.kernel_size[0]) // conv.stride[0] + 1 for s in size]
        parameters += weights + filters * (conv.bias is not None) + 2 * maps
        macs += weights * math.prod(after)
        return after

    past = dict(zip((first for first, _ in getattr(model, "pairs", ())), getattr(model, "shortcuts", ())))
    for block in (module for module in model.modules() if isinstance(module, Block)):
        maps = int(block.bn_mask.sum())
        size = [s // 2 if block.pool else s for s in add(block.conv, int(block.mask.sum()), maps)]
        if isinstance(past.get(block), nn.Sequential):
            add(past[block][0], len(block.mask), len(block.mask))  # a projection stays whole
        came = maps
    classes = len(model.linear.bias)
    return parameters + classes * (came + 1), macs + classes * came


def build_model(name, num_classes=10, width=1.0):
    """A CIFAR network, initialised from torch's global generator, in channels-last memory.

    name: vgg11, vgg19, resnet18, resnet20 or resnet56; width multiplies every channel count. Input (n, 3, h, w), h and
    w at least 32; output (n, num_classes) logits. `.prunable` lists the blocks that may be pruned, in network order.
    """
    def channels(*counts):
        return [max(1, math.floor(c * width + 0.5)) if c else 0 for c in counts]

    if name == "vgg11":
        model = VGG(channels(64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0), num_classes)
    elif name == "vgg19":
        model = VGG(channels(64, 64, 0, 128, 128, 0, *[256] * 4, 0, *[512] * 4, 0, *[512] * 4, 0), num_classes)
    elif name == "resnet18":
        model = ResNet(*channels(64), channels(64, 128, 256, 512), 2, True, num_classes)
    elif name in ("resnet20", "resnet56"):
        model = ResNet(*channels(16), channels(16, 32, 64), {"resnet20": 3, "resnet56": 9}[name], False, num_classes)
    else:
        raise UserError(f"no model {name}: choose from {', '.join(PRUNABLE_BLOCKS)}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.multiple = 1
    return use_backend(model.to(memory_format=torch.channels_last), "eager")


# +--------------------------------------------------------------------------------------------------------------------+
# | Pruning: when (A.4), which filters (B), and how they go                                                            |
# +--------------------------------------------------------------------------------------------------------------------+

def prune_epochs(s, e, r):
    """The epochs (from 0) after whose training a layer is pruned: s, s+r, … up to e (A.4; docs/deviations.md)."""
    return range(s, e + 1, r)


def kept_filters(n, p, n_iter):
    """How many of n filters survive iterations 1 … n_iter when a fraction p goes in the end (A.4), exactly: a list.

    p is read as the decimal number it prints as, so that (1 - 0.3) * 10 is 7 and not the ceiling of 7.000000000000001.
    """
    m = math.ceil((1 - Fraction(str(p))) * n)
    return [math.ceil(m + Fraction((n - m) * (n_iter - j), n_iter)) for j in range(1, n_iter + 1)]


def pruning_plan(model, args, times):
    """One entry per pruned layer: its index in model.prunable, and the survivors by epoch, {epoch: filters kept}.

    --scratch prunes at epoch -1, before the first; without a target the list is empty.
    """
    plan = []
    for i, p in enumerate(args.p or ()):
        layer = len(model.prunable) - len(args.p) + i
        epochs = [-1] if args.scratch else prune_epochs(times["s"][i], times["e"][i], times["r"])
        plan.append((layer, dict(zip(epochs, kept_filters(len(model.prunable[layer].mask), p, len(epochs))))))
    return plan


def filter_scores(block, method):
    """The score of each filter of `block`, (c_out,), by the method of that name in SCORES."""
    require(method in SCORES, f"no score {method}: choose from {', '.join(SCORES)}")
    return SCORES[method](block)


def select_filters(scores, mask, k, target, generator=None):
    """The k filters to prune among those live in mask (c,), as ascending indices (k,) on the CPU.

    target: "S" smallest scores, "L" largest, "R" uniformly random (by `generator`); of equal scores the lower index
    goes. Raises UserError if fewer than k are live or a score is not a number.
    """
    live = mask.cpu().nonzero().flatten()
    scores = scores.detach().cpu()[live]
    require(target in ("S", "L", "R"), f"no target {target}: choose S, L or R")
    require(k <= len(live), f"cannot prune {k} of {len(live)} live filters")
    require(not scores.isnan().any(), "a filter's score is not a number, the run has diverged: lower --lr", 1)
    if target == "R":
        order = torch.randperm(len(live), generator=generator)
    else:
        order = torch.sort(scores, stable=True, descending=target == "L").indices
    return live[order[:k]].sort().values


def count_tied(scores, mask, indices):
    """How many live filters share the score between those that go (indices) and those that stay; 0 if none does.

    Where it is not 0, the order of the filters decided between them, and not their scores.
    """
    gone = torch.zeros_like(mask, device="cpu")
    gone[indices] = True
    stay = mask.cpu() & ~gone
    shared = set(scores[gone].tolist()) & set(scores[stay].tolist())
    return sum(s in shared for s in scores[gone | stay].tolist())


@torch.no_grad()
def prune_block(block, indices, keep_bn=False, optimizer=None):
    """Removes filters `indices` of `block` for good: weights, bias, batch norm's scale and shift and shortcut become 0.

    With keep_bn only the convolution's weights go (D.1's Prune_L). The optimiser's memory of what goes is cleared: what
    is left of a filter's momentum would move the zeros again.
    """
    indices = indices.to(block.mask.device)
    block.mask[indices] = False
    if not keep_bn:
        block.bn_mask[indices] = False
    for param in [block.conv.weight] if keep_bn else [*block.conv.parameters(), *block.bn.parameters()]:
        param[indices] = 0
        for value in optimizer.state[param].values() if optimizer else ():
            if torch.is_tensor(value) and value.shape == param.shape:
                value[indices] = 0


def prune_scratch(run):
    """--scratch: prunes before the first step; returns what was tied (prune_now)."""
    due, tied = filters_due(run.model, run.args, run.plan, -1, run.noise), {}
    prune_now(run.model, run.optimizer, run.args, run.plan, due, run.noise, run.generators["target"], tied)
    runs.say_ties(run, tied)
    return tied


def filters_due(model, args, plan, epoch, noise):
    """{index in plan: number of filters to go after this epoch}; nothing to remove is nothing due (A.4)."""
    due = {}
    for i, (layer, kept) in enumerate(plan):
        if epoch in kept:  # else the device would be asked, and waited for, in vain
            live = int((~noise[i]["targeted"]).sum() if noise else model.prunable[layer].mask.sum())
            due |= {i: live - kept[epoch]} if kept[epoch] < live else {}
    return due


def prune_now(model, optimizer, args, plan, due, noise, generator, tied=None):
    """Removes (or starts to noise) the filters that are due; returns {layer: their indices}.

    tied: a dict that takes {layer: how many filters equal scores left to their order} (count_tied). UserError if all
    filters of a layer have one score, which then says nothing, but under --scratch: there the paper's rule takes the
    scores of a fresh network.
    """
    gone = {}
    for i, k in due.items():
        layer = plan[i][0]
        block = model.prunable[layer]
        if noise:
            end_noise(block, noise[i], args)  # scores are taken of the network itself
        live = ~noise[i]["targeted"] if noise else block.mask
        scores = filter_scores(block, args.score).cpu()
        indices = select_filters(scores, live, k, args.target, generator)
        if args.target != "R" and (n := count_tied(scores, live, indices)):
            require(n < int(live.sum()) or args.scratch, f"all {n} filters of layer {layer} have the same "
                    f"{args.score} score, which says nothing of which should go: prune later (--s; act is measured on "
                    "every tenth training batch), or choose another --score", 1)
            if tied is not None:
                tied[layer] = n
        if noise:
            start_noise(block, noise[i], indices, args)
        else:
            prune_block(block, indices, args.prune_bn == "keep", optimizer)
        gone[layer] = indices.tolist()
    use_backend(model, model.backend)
    return gone


# +--------------------------------------------------------------------------------------------------------------------+
# | Noise in place of pruning (D): the schedule picks filters as usual, but they stay and are noised for a while       |
# +--------------------------------------------------------------------------------------------------------------------+

def new_noise(block):
    """The noise state of a layer: filters ever targeted, those noised now, passes noised, and what to put back."""
    return {"targeted": torch.zeros_like(block.mask, device="cpu"), "active": None, "calm": 0, "test": 0, "train": 0,
            "backup": None}


def noised_tensors(block, args):
    """What the noise touches in a block, each indexed by filter: weights; to restore, batch norm as well (D.2)."""
    bn = block.bn
    return [block.conv.weight] + ([bn.weight, bn.bias, bn.running_mean, bn.running_var] if args.noise_restore else [])


@torch.no_grad()
def start_noise(block, state, indices, args):
    end_noise(block, state, args)  # what an earlier event still holds is put back before its successor copies it
    state["targeted"][indices] = True
    active = indices if args.noise_filters == "newest" else state["targeted"].nonzero().flatten()
    state.update(active=active.to(block.mask.device), test=0, train=0,
                 calm=int((~state["targeted"]).nonzero()[0]))  # the filter whose deviation sets the noise's
    if args.noise_restore:
        state["backup"] = [tensor[state["active"]].clone() for tensor in noised_tensors(block, args)]


@torch.no_grad()
def noise_pass(block, state, args, generator, training):
    """Noises the active filters' weights in place; called before every forward pass, of test and training batches."""
    if state["active"] is None:
        return
    state["train" if training else "test"] += 1
    active, weight = state["active"], block.conv.weight
    if args.noise == "gauss":
        noise = torch.randn((len(active), *weight.shape[1:]), generator=generator, device=weight.device)
        weight[active] += weight[state["calm"]].std() * noise
    else:
        for tensor in noised_tensors(block, args)[:3]:  # not the running statistics
            tensor.index_fill_(0, active, 0)


def end_noise_if_due(block, state, args, k):
    """Called after every batch, that is after the optimiser's step: k = 1 is a single pass, else k training passes."""
    if k == 1 or state["train"] == k:
        end_noise(block, state, args)


@torch.no_grad()
def end_noise(block, state, args):
    if state["active"] is not None and args.noise_restore:
        for tensor, value in zip(noised_tensors(block, args), state["backup"]):
            tensor[state["active"]] = value
    state.update(active=None, backup=None)


# +--------------------------------------------------------------------------------------------------------------------+
# | What a run records: its settings, its checkpoint, a line for each epoch, a summary                                 |
# +--------------------------------------------------------------------------------------------------------------------+

def result_options(args):
    """The options that decide a result, a dict."""
    return {k: v for k, v in vars(args).items() if k not in NOT_THE_RESULT}


def describe_run(run, facts):
    """config.json: every option, the schedule it gives, the constants behind it, the data, machine and versions."""
    args, model = run.args, run.model
    method, setting = run_name(args)
    return {
        "method": method, "setting": setting, "backend": model.backend,
        "options": result_options(args), "schedule": run.times,
        "pruned_layers": [{"layer": layer, "filters": len(model.prunable[layer].mask), "epochs": list(kept),
                           "kept": list(kept.values())} for layer, kept in run.plan],
        # in %, the largest of any layer (A.4)
        "iterative_rate": max((100 * p / len(kept) for p, (_, kept) in zip(args.p or (), run.plan)), default=0.0),
        **dict(zip(("parameters", "macs"), cost(model, facts["image"]))),
        "constants": {"momentum": MOMENTUM, "adam_betas": [0.9, 0.999], "adam_eps": 1e-8, "bn_momentum": BN_MOMENTUM,
                      "bn_eps": BN_EPS, "act_keep": ACT_KEEP, "act_every": ACT_EVERY, "crop_padding": CROP_PADDING},
        "data": facts | {"train": args.train_images or facts["train"] - args.val_split, "val": args.val_split,
                         "test": args.test_images or facts["test"]},
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "machine": platform.machine(), "git": files.commit_of(__file__),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def measured(where, data, trained, before, after=None, val=None, event=False):
    """An epoch's losses (nats), accuracies, stability and churn (%) as its record holds them: one look at the device.

    trained: what train_epoch gives; before, after, val: what evaluate gives, at the end of the epoch and, where filters
    went (event) or noise was added, after that. Raises UserError, which begins with `where`, unless all is finite.
    """
    after = after or before
    changed, *found = numbers(torch.cat([(before[1] != after[1]).sum()[None], trained, before[0], after[0],
                                         *([val[0]] if val else ())]))
    train_loss, train_right, right_before, loss_before, _, right, loss, *_ = found
    n_train, n = len(data["train"][1]), len(data["test"][1])
    finite = sum(found[4::3]) == 2 * n + (len(data["val"][1]) if val else 0)
    require(math.isfinite(train_loss) and finite, f"{where}: the training loss is {train_loss / n_train:g}"
            f"{'' if finite else ', and logits of the evaluation are not finite'}: lower --lr; the checkpoint of the "
            "epoch before is kept", 1)
    return {"train_loss": train_loss / n_train, "train_acc": 100 * (train_right / n_train),
            "test_acc_before": 100 * right_before / n, "test_acc": 100 * right / n,
            "test_loss_before": loss_before / n, "test_loss": loss / n,
            "val_acc": 100 * found[8] / len(data["val"][1]) if val else None,
            "stability": 100 * right / right_before if event and right_before else None,
            "churn": 100 * changed / n if event else None}


def summarize_epochs(records, config):
    """What a run's epoch records say (docs/files.md), as a dict; percentages, nats, counts. config: its config.json.

    best_acc, best_epoch: the best test accuracy from the last pruning event on, that epoch included; gap: training
    minus test accuracy there; last_acc; val_chosen_acc: test accuracy at the best validation epoch (None without
    one). Over the events that removed (or noised) at least one filter: mean_stability and min_stability (100 without
    any), below, how many were below 99, 98, 95 and 90%, loss_rise and churn, means (0 without any). parameters, macs:
    of the network in the end; macs_spent: all of the training's multiply-adds, a backward pass as two forward ones,
    and macs_unpruned: without pruning. None for what an older log does not say.
    """
    events = [r for r in records if any(r["removed"])]
    stabilities = [r["stability"] for r in events if r["stability"] is not None]
    late = [r for r in records if r["epoch"] >= (events[-1]["epoch"] if events else 0)]
    best = max(late, key=lambda r: r["test_acc"])  # the first of equal ones
    chosen = max(late, key=lambda r: r["val_acc"]) if best["val_acc"] is not None else None
    summary = {
        "epochs": len(records), "events": len(events), "best_acc": best["test_acc"], "best_epoch": best["epoch"],
        "gap": best["train_acc"] - best["test_acc"], "last_acc": records[-1]["test_acc"],
        "val_chosen_acc": chosen["test_acc"] if chosen else None,
        "mean_stability": math.fsum(stabilities) / len(stabilities) if stabilities else 100.0,
        "min_stability": min(stabilities, default=100.0),
        "below": {str(limit): sum(s < limit for s in stabilities) for limit in (99, 98, 95, 90)},
        **dict.fromkeys(("loss_rise", "churn", "parameters", "macs", "macs_spent", "macs_unpruned")),
        "seconds": sum(r["seconds"] for r in records)}
    if "macs" in config:
        first = config["macs"] if any(records[0]["removed"]) else records[0]["macs"]
        trained = [first] + [r["macs"] for r in records[:-1]]  # an epoch trains what the one before left
        passes, n = 3 * config["data"]["train"], max(1, len(events))
        summary |= {"loss_rise": math.fsum(r["test_loss"] - r["test_loss_before"] for r in events) / n,
                    "churn": math.fsum(r["churn"] for r in events) / n,
                    "parameters": records[-1]["parameters"], "macs": records[-1]["macs"],
                    "macs_spent": passes * sum(trained), "macs_unpruned": passes * len(records) * config["macs"]}
    return summary


# +--------------------------------------------------------------------------------------------------------------------+
# | Training                                                                                                           |
# +--------------------------------------------------------------------------------------------------------------------+

def predict(model, images, data, args):
    """Logits in float32 for uint8 images (n, h, w, 3); under bf16, only the network runs in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return model(normalise(images, data)).float()


@torch.no_grad()
def evaluate(model, data, split, args, before_batch=None, after_batch=None, graphs=None):
    """What the network says of a split, in eval mode, as tensors on the device: (totals (3,) float64, right answers,
    summed loss in nats and images whose logits are finite; predicted classes (images,) int64)."""
    model.eval()
    x, y = data[split]
    totals, at, predicted = fed(graphs, split, torch.zeros(3, dtype=torch.float64, device=x.device),
                                torch.zeros((), dtype=torch.int64, device=x.device), torch.zeros_like(y))

    def count(size):
        index = at + torch.arange(size, device=x.device)
        logits, labels = predict(model, x[index], data, args), y[index]
        classes = logits.argmax(1)
        predicted.index_copy_(0, index, classes)
        totals.add_(torch.stack([(classes == labels).sum(), F.cross_entropy(logits, labels, reduction="sum").double(),
                                 logits.isfinite().all(1).sum()]))
        at.add_(size)

    for start in range(0, len(x), args.test_batch_size):
        if before_batch:
            before_batch(training=False)
        replayed(graphs, split, count, min(args.test_batch_size, len(x) - start))
        if after_batch:
            after_batch()
    return totals.clone(), predicted.clone()  # the next evaluation's go into the same memory


def train_epoch(model, data, optimizer, args, generators, step, before_batch=None, after_batch=None, graphs=None):
    """One pass over the training data; returns (summed loss and right answers, (2,) float64 on the device; next step).

    graphs: a dict for CUDA graphs of the step (replayed); None: no graphs.
    """
    model.train()
    x, y = data["train"]
    device, n = x.device, len(x)
    order = torch.randperm(n, generator=generators["order"]).to(device)
    crops = [t.to(device) for t in draw_crops(n, generators["augment"])] if args.augment else []
    totals, at = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    totals, at, order, *crops = fed(graphs, "train", totals, at, order, *crops)

    def train_batch(size):
        batch = at + torch.arange(size, device=device)
        index = order[batch]
        images = crop_and_flip(data["padded"], index, *[t[..., batch] for t in crops]) if crops else x[index]
        labels = y[index]
        logits = predict(model, images, data, args)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        totals.add_(torch.stack([loss.detach() * size, (logits.detach().argmax(1) == labels).sum()]))
        at.add_(size)

    for start in range(0, n, args.batch_size):
        step += 1
        measure = args.score == "act" and step % ACT_EVERY == 0
        for block in model.prunable:
            block.measure = measure
        if before_batch:
            before_batch(training=True)
        replayed(graphs, f"train {measure}", train_batch, min(args.batch_size, n - start))
        if after_batch:
            after_batch()
    for block in model.prunable:
        block.measure = False
    return totals.clone(), step


def make_optimizer(model, args):
    params, settings = list(model.parameters()), dict(lr=args.lr, weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "sgd":
        return torch.optim.SGD(params, momentum=MOMENTUM, **settings)
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # the steps before
    return torch.optim.Adam(params, capturable=params[0].is_cuda, **settings)


def make_generators(args, device):
    """One generator per source of randomness: runs with the same seed share initial weights, order and augmentation."""
    torch.manual_seed(args.seed)  # the initial weights
    generators = {}
    for i, name in enumerate(("order", "augment", "target") + ("noise",) * (args.noise == "gauss")):
        seed = int(np.random.SeedSequence((args.seed, i)).generate_state(1)[0])
        generators[name] = torch.Generator(device if name == "noise" else "cpu").manual_seed(seed)
    return generators


def new_run(args, num_classes, device):
    """A run before its first step: a namespace of what `experiment` works with.

    args; directory, where its files go, and label, the end of that; device; model and optimizer; generators, one for
    each source of randomness; times (schedule) and plan (pruning_plan); noise, the state of each pruned layer, []
    without --noise; graphs, those of captured steps; hooks, what train_epoch and evaluate take for noise and graphs;
    epoch and step, how many are done; lines, their log, and records, what it says.
    """
    directory, times = run_directory(args), schedule(args)
    generators = make_generators(args, device)
    model = build_model(args.model, num_classes, args.width).to(device)
    model.multiple = MULTIPLE[device.type]
    use_backend(model, runs.choose_backend(args, device))
    plan = pruning_plan(model, args, times)
    noise, graphs = [], new_graphs(device) if args.cuda_graphs else None
    hooks = {"graphs": graphs}
    if args.noise != "none":
        noise = [new_noise(model.prunable[layer]) for layer, _ in plan]
        noised = [(model.prunable[layer], state) for (layer, _), state in zip(plan, noise)]
        hooks |= {"before_batch": lambda training: [noise_pass(block, state, args, generators.get("noise"), training)
                                                    for block, state in noised],
                  "after_batch": lambda: [end_noise_if_due(block, state, args, times["noise_batches"])
                                          for block, state in noised]}
    return types.SimpleNamespace(
        args=args, directory=directory, label="/".join(directory.parts[-3:]), device=device, model=model,
        optimizer=make_optimizer(model, args), generators=generators, times=times, plan=plan, noise=noise,
        graphs=graphs, hooks=hooks, epoch=0, step=0, lines=[], records=[])


def experiment(run, data, record):
    """The epochs that are left of a run. Each trains, evaluates, chooses, prunes, evaluates and records.

    data: as put_on_device gives it; record(dict) takes what an epoch found. A generator, which yields once an epoch,
    when the device has work and the host would wait for it.
    """
    args, model, optimizer, times, plan, noise = run.args, run.model, run.optimizer, run.times, run.plan, run.noise
    image = data["test"][0].shape[1:]
    live, left = [int(block.mask.sum()) for block in model.prunable], cost(model, image)
    for epoch in range(run.epoch, times["epochs"]):
        clock = time.monotonic()
        lr = optimizer.param_groups[0]["lr"] = args.lr * 0.1 ** sum(epoch >= x for x in times["lrs"])
        hold_for(run.graphs, lr, shapes_of(model))
        totals, run.step = train_epoch(model, data, optimizer, args, run.generators, run.step, **run.hooks)
        before = after = evaluate(model, data, "test", args, **run.hooks)
        yield

        gone, tied, due = {}, {}, filters_due(model, args, plan, epoch, noise)
        where = f"{run.directory}: epoch {epoch}, lr {lr:g}"
        if due:
            measured(where, data, totals, before)  # a network that has diverged must not choose
            gone = prune_now(model, optimizer, args, plan, due, noise, run.generators["target"], tied)
            runs.say_ties(run, tied)
            live, left = [int(block.mask.sum()) for block in model.prunable], cost(model, image)
            hold_for(run.graphs, lr, shapes_of(model))
        if due or noise:
            after = evaluate(model, data, "test", args, **run.hooks)
        val = evaluate(model, data, "val", args, graphs=run.graphs) if args.val_split else None

        run.epoch = epoch + 1
        record({
            "epoch": epoch, "lr": lr, **measured(where, data, totals, before, after, val, event=bool(gone)),
            "removed": [len(gone.get(layer, ())) for layer, _ in plan], "live": live, "filters": gone, "tied": tied,
            "computed": [block.computed() for block in model.prunable], "parameters": left[0], "macs": left[1],
            "noised": [{k: state[k] for k in ("test", "train")} for state in noise],
            "seconds": round(max(0, time.monotonic() - clock), 3)})


# +--------------------------------------------------------------------------------------------------------------------+
# | Entry                                                                                                              |
# +--------------------------------------------------------------------------------------------------------------------+

def runs_of(command):
    """The runs of an option list, one for each seed: (directory, runs.Run) each."""
    args = parse_options(command)
    for seed in args.seeds or [args.seed]:
        one = argparse.Namespace(**vars(args) | {"seed": seed, "seeds": None})
        line = shlex.join(command) + (f" --seeds {seed}" if args.seeds else "")  # the last one counts
        unnamed = os.path.abspath(data_path(one.dataset, one.data_dir)), one.save_epoch, one.tensorboard
        yield run_directory(one), runs.Run(one, line, schedule(one)["epochs"], unnamed)


def main(argv=None):
    argv, this = sys.argv[1:] if argv is None else argv, sys.modules[__name__]
    try:
        args = parse_options(argv)
        runs.keep_freed_memory()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, runs.terminate)
        if args.plan:
            runs.print_plan(runs.read_runs(args.plan, runs_of), args.retry_failed, this)
        elif args.status:
            runs.print_status(args.status, runs_of)
        elif args.runs:
            runs.train_all(runs.read_runs(args.runs, runs_of), args.at_once, this)
        elif args.seeds:
            runs.train_all(runs.once_each([argv], runs_of), args.at_once, this)
        else:
            runs.train_one(args, this)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return files.tell(error, "train.py")


if __name__ == "__main__":
    sys.exit(main())
