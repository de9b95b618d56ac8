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
"""
import argparse
import collections
import contextlib
import ctypes
import fcntl
import io
import json
import math
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
import warnings
import zipfile
import zlib
from fractions import Fraction

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

from gst_ext import ops

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts: as many streams at once as runs

# +--------------------------------------------------------------------------------------------------------------------+
# | Configuration: the paper's settings, the command line, the run's name                                              |
# +--------------------------------------------------------------------------------------------------------------------+

PRUNABLE_BLOCKS = {"vgg11": 8, "vgg19": 16, "resnet18": 16, "resnet20": 18, "resnet56": 54}
SCORES = ("l1", "l2", "act", "ebn", "ebn-signed")
MOMENTUM, BN_MOMENTUM, BN_EPS = 0.9, 0.1, 1e-5
ACT_KEEP, ACT_EVERY = 0.9, 10  # act score: 0.9 * old + 0.1 * new on every tenth training batch (A.4, footnote 4)
CROP_PADDING = 4
EXIF_ORIENTATION = 0x0112

OPTIMIZERS = {
    "adam": dict(lr=0.001, weight_decay=0.0, epochs=325, lrs=[150, 300], augment=False),  # A.3, B.1
    "sgd": dict(lr=0.1, weight_decay=1e-4, epochs=165, lrs=[83, 125], augment=True),  # Figures 4 and C.3
}
ADAM_PRUNING = {  # B.1
    "vgg": dict(s=[3, 4, 5, 6], e=[150, 150, 150, 275], p=[0.3, 0.3, 0.3, 0.9], r=40, score="l2", save_epoch=315),
    "resnet": dict(s=[7, 8, 9, 10], e=[150, 150, 170, 275], p=[0.25, 0.4, 0.25, 0.95], r=40, score="act", save_epoch=0),
}
DEFAULTS = dict(dataset="cifar10", width=1.0, scale_epochs=1.0, batch_size=128, test_batch_size=128, val_split=0,
                precision="fp32", deterministic=False)  # of what else decides a result, for every model
NOT_THE_RESULT = ("log_dir", "data_dir", "device", "backend", "save_epoch", "tensorboard", "seeds", "runs", "at_once",
                  "plan", "retry_failed", "status")  # not what a run computes
BUILT_IN = ("cifar10", "cifar100", "digits")
GRAPHED = ("cuda",)  # devices whose steps are captured in graphs
WARM_UP = 3  # calls of a step before it becomes a graph: the libraries choose their algorithms in them
SHAPE_STEPS = 20  # steps that are timed to choose the shapes of pruned layers
CHECKPOINT_EVERY = {"cpu": 0, "cuda": 30}  # seconds at least; on a GPU, writing may take longer than an epoch
AT_ONCE = 16  # runs in one process at most, unless --at-once says more
BEAT, SILENCE = 30, 120  # seconds: how often a run's claim is refreshed, and when one that is not belongs to the dead


class UserError(Exception):
    """Something the user can mend: printed as one line. `code` is the exit code, 2 before the run and 1 during it."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(message.splitlines()))  # a file's name may hold anything
        self.code = code


def require(ok, message, code=2):
    if not ok:
        raise UserError(message, code)


def reason(error):
    """The first line of an exception's message, or its name."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def say_once(line):
    """One line on stderr, once in a process, however many runs it concerns."""
    if line not in say_once.said:
        say_once.said.add(line)
        print(f"train.py: {line}", file=sys.stderr)


say_once.said = set()


def paper_settings(model, optimizer=None):
    """The paper's options for `model` (str) under `optimizer` ("adam", "sgd" or None: the paper's own for it)."""
    optimizer = optimizer or ("sgd" if model in ("resnet20", "resnet56") else "adam")
    n = PRUNABLE_BLOCKS[model]
    pruning = dict(s=[40] * n, e=[100] * n, p=[0.1] * n, r=30, score="l1", save_epoch=0)
    if optimizer == "adam":
        pruning = ADAM_PRUNING[model.rstrip("0123456789")]
    return dict(optimizer=optimizer, **OPTIMIZERS[optimizer], **pruning)


def short(value):
    """A value as it stands in names and messages: 0.25, 3,4,5,6, 0.1x16."""
    if isinstance(value, (list, tuple)):
        return f"{short(value[0])}x{len(value)}" if len(value) > 1 == len(set(value)) else ",".join(map(short, value))
    return str(value).removesuffix(".0")


def repeated(kind):
    """An argparse type for list options: `V` is one value, `VxN` is V repeated N times; gives a list."""
    def parse(text):
        value, _, times = text.partition("x")
        if not 1 <= int(times or 1) <= 1000:
            raise ValueError
        return [kind(value)] * int(times or 1)
    parse.__name__ = f"{kind.__name__} or VxN"
    return parse


def seed_list(text):
    """An argparse type: 1-3,7 is [1, 2, 3, 7]."""
    parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
    spans = [range(part[0], part[-1] + 1) for part in parts]
    if not all(spans) or sum(map(len, spans)) > 10_000 or max(map(len, parts)) > 2 or max(map(max, parts)) >= 2**32:
        raise ValueError  # a span that holds no seed, such as 3-1, too
    return [seed for span in spans for seed in span]


seed_list.__name__ = "range or list of seeds"  # as argparse names it


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists every option)")


def make_parser():
    table = ["the paper's settings, used for whatever is not given:"]
    for model, optimizer in [("vgg11", "adam"), ("resnet18", "adam"), ("resnet20", "sgd")]:
        options = paper_settings(model, optimizer)
        table.append(f"  {model}: " + " ".join(f"{name}={short(value)}" for name, value in options.items()))
    table.append("  vgg19 is as vgg11, resnet56 as resnet20; --optimizer brings the other settings of its kind along.")
    parser = OneLineParser(prog="train.py", description=__doc__, epilog="\n".join(table), allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument_group("network and data").add_argument
    add("--model", choices=PRUNABLE_BLOCKS, default="vgg11", help="(default: vgg11)")
    add("--width", type=float, help="multiplies every channel count (default: 1)")
    add("--dataset", help="cifar10, cifar100, digits, a .npz file, or a folder with train/ and test/ class folders of "
        "images (default: cifar10)")
    add("--data-dir", default="data", help="where <dataset>.npz lies or is put (default: data)")
    add("--val-split", type=int, metavar="N", help="hold N training images out to validate (default: 0)")
    add("--augment", action=flag, help="random crop and flip (default: the paper's)")

    add = parser.add_argument_group("pruning (defaults: the paper's for the model, listed below)").add_argument
    add("--target", choices=("none", "S", "L", "R"), default="none",
        help="prune the filters with the Smallest or the Largest score, or Random ones (default: none)")
    add("--r", type=int, help="retrain period: epochs between pruning iterations")
    for name, kind, what in (("s", int, "first epochs"), ("e", int, "last epochs"), ("p", float, "pruned fractions")):
        add(f"--{name}", type=repeated(kind), nargs="+", metavar=name,
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
    add("--lrs", type=repeated(int), nargs="*", metavar="epoch", help="epochs that divide the learning rate by ten")
    add("--scale-epochs", type=float, metavar="F",
        help="multiply epochs, lrs, s, e and r by F, each rounded, r at least 1 (default: 1)")
    add("--seed", type=int, default=1, help="(default: 1)")

    add = parser.add_argument_group("machine and files").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--backend", choices=("auto", "ext", "eager"), default="auto", help="who computes the blocks: the extension, "
        "live filters only, or plain PyTorch, masked; auto is ext where it is built (default: auto)")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="(default: fp32)")
    add("--deterministic", action=flag,
        help="CUDA: only deterministic kernels; CPU runs repeat exactly anyway (default: no)")
    add("--log-dir", default="logs", help="(default: logs)")
    add("--save-epoch", type=int, metavar="N", help="also keep the weights after the N-th epoch, as epoch<N>.pt; 0: no")
    add("--tensorboard", action=flag, default=False, help="also write <run>/tensorboard, if installed (default: no)")

    add = parser.add_argument_group("many runs, each with the files and results it would have alone").add_argument
    add("--seeds", type=seed_list, metavar="1-10", help="a run for each seed, 1-10 or 1,4,7, in place of --seed")
    add("--runs", metavar="FILE", help="train the runs listed in FILE, a line of options each")
    add("--at-once", type=int, metavar="N", help="runs that take turns in this process; on a GPU they compute side by "
        "side (default: what a GPU's memory holds, at most 16; 1 on a CPU)")
    add("--plan", metavar="FILE", help="train nothing: say how many of the runs listed in FILE are left, fetch their "
        "data, and print their lines")
    add("--retry-failed", action=flag, default=False, help="count failed runs as left in --plan (default: no)")
    add("--status", metavar="FILE", nargs="+", help="train nothing: say what became of the runs listed in each FILE")
    parser.set_defaults(**DEFAULTS)
    return parser


def parse_options(argv):
    """Parses, fills in the paper's settings, checks; raises UserError. Options that a run does not use become None."""
    args = make_parser().parse_args(argv)
    for name in ("s", "e", "p", "lrs"):
        if getattr(args, name) is not None:
            setattr(args, name, [value for values in getattr(args, name) for value in values])
    given = {name for name, value in vars(args).items() if value is not None}
    for name, value in paper_settings(args.model, args.optimizer).items():
        if name not in given:
            setattr(args, name, value)

    for name in ("epochs", "batch_size", "test_batch_size", "r", "noise_batches", "at_once", "seed", "val_split",
                 "save_epoch"):
        value, least = getattr(args, name), 0 if name in ("seed", "val_split", "save_epoch") else 1
        require(value is None or least <= value < 2**32, f"--{name.replace('_', '-')} {value}: give {least} or more")
    for name in ("width", "scale_epochs", "lr", "weight_decay"):
        value = getattr(args, name)
        require(0 < value < 1e6 or value == 0 and name == "weight_decay",
                f"--{name.replace('_', '-')} {short(value)}: give a number above 0")
    require(all(epoch >= 0 for epoch in args.lrs), f"--lrs {short(args.lrs)}: epochs count from 0")

    pruning, noise = args.target != "none", args.noise != "none"
    require(pruning or not (args.scratch or noise), "--scratch and --noise need filters: give --target S, L or R too")
    require(not (noise and args.scratch), "--noise and --scratch exclude each other: choose one")
    require(args.prune_bn == "drop" or pruning and not noise, "--prune-bn keep needs a --target, and no --noise")
    for name in {"noise_batches", "noise_filters", "noise_restore"} & given:
        require(noise, f"--{name.replace('_', '-')} does nothing without --noise: add --noise zero or gauss")
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
    """The run's epochs after --scale-epochs: dict of epochs, lrs, s, e, r, save_epoch (None where not used)."""
    def scaled(x):
        return math.floor(Fraction(str(args.scale_epochs)) * x + Fraction(1, 2))

    times = {name: getattr(args, name) and [scaled(x) for x in getattr(args, name)] for name in ("lrs", "s", "e")}
    times["epochs"] = max(1, scaled(args.epochs))
    times["save_epoch"] = args.save_epoch and max(1, scaled(args.save_epoch))
    times["r"] = args.r and max(1, scaled(args.r))
    if times["e"]:  # rounding up must not carry the last pruning iteration past the end
        times["e"] = [min(e, times["epochs"] - 1) for e in times["e"]]
        times["s"] = [min(s, e) for s, e in zip(times["s"], times["e"])]
    return times


def doubts_about_rate(args):
    """What the user may not have meant of the learning rate's epochs, a list of lines. A fall at the very end that was
    asked for is a way to say never."""
    def spelled(epochs):
        return " ".join(map(str, epochs))

    times = schedule(args)
    usual = args.lrs == paper_settings(args.model, args.optimizer)["lrs"]
    late = [x for x in args.lrs if x > args.epochs - usual]
    lines = [f"the learning rate never falls at --lrs {spelled(late)}, since epochs count from 0 to {args.epochs - 1}: "
             "give --lrs that fit --epochs, or --lrs alone for none"] * bool(late)
    kept, scaled = ([x for x in lrs if x < n] for lrs, n in ((args.lrs, args.epochs), (times["lrs"], times["epochs"])))
    if len(set(scaled)) < len(set(kept)) or 0 in scaled and 0 not in kept:
        lines.append(f"--scale-epochs {short(args.scale_epochs)} rounds --lrs {spelled(kept)} of {args.epochs} epochs to "
                     f"{spelled(times['lrs'])} of {times['epochs']}, so that not every fall is left: give --epochs and "
                     "--lrs")
    return lines


def run_name(args):
    """(method, setting): what is done to the filters, and all else that differs from the paper's, "" if nothing."""
    optimizer = paper_settings(args.model)["optimizer"]
    usual = paper_settings(args.model, args.optimizer) | DEFAULTS | {"optimizer": optimizer}

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
    setting = differing(optimizer="", width="w", scale_epochs="x", epochs="epochs", lrs="lrs", lr="lr",
                        weight_decay="wd", batch_size="batch", val_split="val", precision="")
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
    return pathlib.Path(data_dir, f"{name}.npz") if name in ("cifar10", "cifar100") else pathlib.Path(name)


def load_data(name, data_dir="data"):
    """Loads a data set by name or path, checked.

    name: "cifar10", "cifar100" (read from data_dir/<name>.npz; downloaded by torchvision and cached there the first
    time), "digits" (scikit-learn's), the path of a .npz of the same form, or of a folder with train/ and test/, each
    with one folder of images per class (resized to 32x32). Returns a dict: train_x, test_x (n, height, width, 3)
    uint8; train_y, test_y (n,) int64, 0 … k-1; classes (k,) str. Raises UserError if that cannot be had.
    """
    path = data_path(name, data_dir)
    if name in ("cifar10", "cifar100"):
        if not path.exists():
            with lock_directory(path.parent, wait=True):
                if not path.exists():
                    buffer = io.BytesIO()
                    np.savez(buffer, **download_cifar(name, data_dir))
                    write_atomically(path, buffer.getbuffer())
    elif name != "digits":
        require(name.endswith(".npz") or path.is_dir(), f"--dataset {name}: no such thing; give cifar10, cifar100, "
                "digits, a .npz file, or a folder with train/ and test/ class folders of images")
    data = load_digits() if name == "digits" else read_image_folder(path) if path.is_dir() else read_npz(path)

    missing = [k for k in ("train_x", "train_y", "test_x", "test_y", "classes") if k not in data]
    require(not missing, f"{path} lacks {', '.join(missing)}: it needs train_x, train_y, test_x, test_y and classes")
    k = len(data["classes"]) if data["classes"].ndim == 1 else 0
    require(k >= 2, f"{path}: classes must be a list of at least two names")
    for split in ("train", "test"):
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        require(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 32,
                f"{path}: {split}_x is {x.dtype} {x.shape}; it must be uint8 (n, height, width, 3), at least 32x32")
        require(len(x) > 0 and y.shape == (len(x),) and y.dtype.kind in "iu",
                f"{path}: {split}_y is {y.dtype} {y.shape}; it must hold one whole number for each of {len(x)} images")
        require(0 <= y.min() and y.max() < k,
                f"{path}: {split}_y goes from {y.min()} to {y.max()}; the labels of {k} classes are 0 to {k - 1}")
        data[f"{split}_y"] = y.astype(np.int64)
    require(data["train_x"].shape[1:] == data["test_x"].shape[1:], f"{path}: training and test images differ in size")
    return data


def read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"{path} cannot be read as .npz ({reason(error)}): make it again, or delete it if it came from "
                        "a download") from None


def download_cifar(name, data_dir):
    try:
        import torchvision
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        train, test = (kind(data_dir, train=flag, download=True) for flag in (True, False))
    except Exception as error:
        raise UserError(f"cannot download {name} ({reason(error)}): put {name}.npz into {data_dir}/, or the official "
                        f"cifar-{name[5:]}-python.tar.gz, or use --dataset digits, which needs no download") from None
    return dict(train_x=train.data, train_y=np.array(train.targets), test_x=test.data, test_y=np.array(test.targets),
                classes=np.array(train.classes))


def load_digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 in three equal channels: 1,000 train, 797 test."""
    import sklearn.datasets
    from PIL import Image
    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    x = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR)) for image in grey])
    x = np.repeat(x[..., None], 3, axis=3)
    order = np.random.RandomState(0).permutation(len(x))  # one split for everybody: the bundled order is by writer
    train, test = order[:1000], order[1000:]
    return dict(train_x=x[train], train_y=digits.target[train], test_x=x[test], test_y=digits.target[test],
                classes=digits.target_names.astype(str))


def read_image_folder(folder):
    """The images of folder/train/<class>/ and folder/test/<class>/; what was made of them is said in one line."""
    def seen(path):
        return sorted(p for p in path.glob("*") if not p.name.startswith("."))  # .ipynb_checkpoints is no class

    classes, notes = [p.name for p in seen(folder / "train") if p.is_dir()], collections.Counter()
    unknown = {p.name for p in seen(folder / "test") if p.is_dir()} - set(classes)
    require(classes, f"{folder}/train has no class folders: lay the images out as train/<class>/<image>")
    require(not unknown, f"{folder}/test/{min(unknown, default='')} is no class of {folder}/train: rename or remove it")
    data = {"classes": np.array(classes)}
    for split in ("train", "test"):
        files = [(path, label) for label, name in enumerate(classes) for path in seen(folder / split / name)]
        for label in set(range(len(classes))) - {label for _, label in files}:
            raise UserError(f"{folder}/{split}/{classes[label]} has no images: put some there, or remove the class")
        notes["beside the class folders left out"] += sum(not p.is_dir() for p in seen(folder / split))
        data[f"{split}_x"] = np.stack([read_image(path, notes) for path, _ in files])
        data[f"{split}_y"] = np.array([label for _, label in files], np.int64)
    if +notes:
        say_once(f"images of {folder}: " + ", ".join(f"{n} {what}" for what, n in (+notes).items()))
    return data


def read_image(path, notes):
    """An image as it is to be seen, (32, 32, 3) uint8; UserError where it cannot be read or its pixels have no range.

    It is turned as its EXIF orientation says; 16 bits are scaled to 8; what is transparent lies on white. notes (a
    Counter) counts such images.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            several, turned = getattr(file, "n_frames", 1) > 1, file.getexif().get(EXIF_ORIENTATION, 1) != 1
            file.load()
            tags = getattr(file, "tag_v2", {})  # of a TIFF: bits of a pixel, and whether 0 is black
            wide = (file.format, file.mode) in (("PNG", "I"), ("PPM", "I")) or file.mode.startswith("I;16") and (
                file.format != "TIFF" or (tags.get(258), tags.get(262)) == ((16,), 1))
            image = ImageOps.exif_transpose(file)
    except Exception:  # Pillow has many for a damaged file
        raise UserError(f"{path} is not a readable image: repair or remove it") from None
    clear = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")
    require(image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr") or wide and not clear,
            f"{path} has pixels whose range, colours or transparency are not defined here (mode {image.mode}): save it "
            "as an 8-bit PNG")
    if wide:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if clear:
        image = image.convert("RGBA")
        clear = image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    for happened, what in ((several, "read to their first frame"), (turned, "turned as their EXIF data say"),
                           (wide, "scaled from 16 bits to 8"), (clear, "with transparency laid on white"),
                           (image.mode == "CMYK", "converted from CMYK")):
        notes[what] += happened
    return np.asarray(image.convert("RGB").resize((32, 32), Image.BILINEAR))


def put_on_device(data, device, val_split=0):
    """The arrays as tensors on `device`: {"train": (x uint8 NHWC, y), "test": …, "val": … if asked, "mean", "std"}.

    mean and std (3,) are the training images' per-channel ones, in units of a uint8 pixel, exact. The validation
    images are the same for every seed, so that runs differ in what they learn and not in what judges them.
    """
    train_x, train_y = data["train_x"], data["train_y"]
    require(val_split < len(train_x), f"--val-split {val_split} leaves none of {len(train_x)} images: give fewer")
    splits = {"test": (data["test_x"], data["test_y"])}
    if val_split:
        order = np.random.RandomState(0).permutation(len(train_x))
        held_out, kept = np.sort(order[:val_split]), np.sort(order[val_split:])
        splits["val"] = (train_x[held_out], train_y[held_out])
        train_x, train_y = train_x[kept], train_y[kept]
    splits["train"] = (train_x, train_y)
    counts = np.stack([np.bincount(train_x[..., c].ravel(), minlength=256) for c in range(3)]) / train_x[..., 0].size
    mean = counts @ np.arange(256)
    variance = counts @ np.arange(256) ** 2 - mean**2
    require(variance.min() > 1e-9, "the training images are constant in one channel: nothing can be learnt from it")
    tensors = {k: tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in v) for k, v in splits.items()}
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
        n = self.computed() if multiple is None else rounded_up(int(self.bn_mask.sum()), multiple, len(self.mask))
        chosen = torch.argsort(~self.bn_mask, stable=True)[:n].sort().values if n < len(self.mask) else None
        self.live_in, self.live_out = live_in, in_place_of(self.live_out, chosen)
        return self.live_out

    def computed(self):
        """How many filters it computes: under "ext" the live ones, and those that fill up the shape."""
        return len(self.mask) if self.backend == "eager" or self.live_out is None else len(self.live_out)


def rounded_up(n, multiple, most):
    return min(most, -(-n // multiple) * multiple)


def in_place_of(old, new):
    """new, but in old's memory where it fits in there: a captured graph goes on reading its indices from that."""
    return new if old is None or new is None or old.shape != new.shape else old.copy_(new)


def use_backend(model, backend):
    """Makes every block of `model` compute by "ext" or "eager", by its masks as they are now; returns the model.

    Under "ext" a pruned block computes its live filters, rounded up to model.multiple; None: as many as it does now.
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
    """ResNet's option A: every second pixel, and zero maps around the old ones; no parameters."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.c_in, self.stride, self.before = c_in, stride, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.before, self.after))


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
                    shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False),
                                             nn.BatchNorm2d(c_out, BN_EPS, BN_MOMENTUM))
                else:
                    shortcut = PaddedShortcut(c_in, c_out, stride)
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
            x = second(first(x), live_shortcut(shortcut, x, first) if self.backend == "ext" else shortcut(x))
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
    if isinstance(shortcut, nn.Identity):
        return x
    if isinstance(shortcut, PaddedShortcut):
        return x[:, :, ::shortcut.stride, ::shortcut.stride]
    conv, bn = shortcut
    if block.training:
        bn.num_batches_tracked.add_(1)  # as the module itself would
    return ops.masked_conv_bn_act(x, conv.weight, None, bn.weight, bn.bias, bn.running_mean, bn.running_var, None,
                                      block.live_in, conv.stride[0], 0, training=block.training, relu=False,
                                      momentum=bn.momentum, eps=bn.eps)


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
    """The epochs (from 0) after whose training a layer is pruned: s, s+r, … up to e (A.4; see README, Deviations)."""
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
    """The score of each filter of `block`, (c_out,); method l1 or l2 (of the weights, A.4), act, ebn or ebn-signed."""
    require(method in SCORES, f"no score {method}: choose from {', '.join(SCORES)}")
    weight = block.conv.weight.detach().flatten(1)
    if method == "l1":
        return weight.abs().sum(1)
    if method == "l2":
        return weight.square().sum(1).sqrt()
    if method == "act":
        return block.act.clone()
    return ops.ebn_score(block.bn.weight.double(), block.bn.bias.double(), signed=method == "ebn-signed")


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


def filters_due(model, args, plan, epoch, noise):
    """{index in plan: number of filters to go after this epoch}; nothing to remove is nothing due (A.4)."""
    due = {}
    for i, (layer, kept) in enumerate(plan):
        if epoch in kept:  # else the device would be asked, and waited for, in vain
            live = int((~noise[i]["targeted"]).sum() if noise else model.prunable[layer].mask.sum())
            due |= {i: live - kept[epoch]} if kept[epoch] < live else {}
    return due


def prune_now(model, optimizer, args, plan, due, noise, generator):
    """Removes (or starts to noise) the filters that are due.

    Returns {layer: their indices} and {layer: how many filters a tie of scores left to their order} (count_tied).
    UserError if all filters of a layer are alike by their score, which then says nothing, but before the first step
    (--scratch): there the paper's rule takes scores of a fresh network.
    """
    gone, tied = {}, {}
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
            tied[layer] = n
        if noise:
            start_noise(block, noise[i], indices, args)
        else:
            prune_block(block, indices, args.prune_bn == "keep", optimizer)
        gone[layer] = indices.tolist()
    use_backend(model, model.backend)
    return gone, tied


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


def end_noise_if_due(block, state, args):
    """Called after every batch, that is after the optimiser's step: K = 1 is a single pass, else K training passes."""
    if args.noise_batches == 1 or state["train"] == args.noise_batches:
        end_noise(block, state, args)


@torch.no_grad()
def end_noise(block, state, args):
    if state["active"] is not None and args.noise_restore:
        for tensor, value in zip(noised_tensors(block, args), state["backup"]):
            tensor[state["active"]] = value
    state.update(active=None, backup=None)


# +--------------------------------------------------------------------------------------------------------------------+
# | Files: all writes are atomic, one process per run directory, on whatever host                                      |
# +--------------------------------------------------------------------------------------------------------------------+

@contextlib.contextmanager
def writing(path):
    """Turns a full disk, a read-only folder and their kind into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({reason(error)}): make room or choose another folder, then start the "
                        "same command again", 1) from None


def write_atomically(path, content, check=None):
    """Writes bytes to `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    check: called last of all before the new file counts, since a write may hang for minutes on a network.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.partial")  # nobody else's
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if check:
                check()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def append_line(path, line):
    with writing(path), open(path, "a") as file:
        file.write(line + "\n")


def lock_directory(directory, wait=False):
    """Takes a directory for this process, and returns the lock, which goes with the process, however it ends."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return lock
        time.sleep(0.05)  # state_of holds it for a moment
    lock.close()
    raise UserError(f"{directory} is in use by another process: wait for it, or choose another --seed", 1)


def this_host():
    """What tells this host, since it was started, from every other."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{uuid.getnode():x}"


def read_claim(path):
    """(a claim's text, when it was last refreshed), (None, 0) without one; opened, since network file systems may
    answer from memory otherwise."""
    try:
        with open(path, errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def is_foreign(claim):
    """Whether a claim's text is of another host, or cut."""
    return claim is not None and claim.split(" ")[0] != this_host()


PROCESS = uuid.uuid4().hex  # tells this process from an earlier one of the same number
DEAD = set()  # claims of other hosts' processes that were seen not to be refreshed any more


@contextlib.contextmanager
def claimed(directory):
    """Holds a run for this process; gives a function that raises UserError once another process has taken it over.

    A lock keeps processes of one host apart, and goes with its process. Hosts that share only a file system, which may
    not share locks, are kept apart by a claim that its holder refreshes. The claim of another host is taken over when
    it was watched for SILENCE seconds without being refreshed, so that no two clocks need agree.
    """
    lock, path, pause = lock_directory(directory), directory / ".claim", min(1, SILENCE / 10)
    mine = f"{this_host()} {platform.node() or 'unnamed'} {os.getpid()} {PROCESS}"
    over = threading.Event()

    def still_ours():
        require(read_claim(path)[0] == mine, f"{directory} was taken over by another process, or deleted: nothing was "
                "written since", 1)

    def refresh(file):  # the file and not its name, which may be another's by now
        while not over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(file.fileno())

    with lock:
        seen, until, silent = read_claim(path), time.monotonic() + SILENCE, False
        while is_foreign(seen[0]) and seen[0] not in DEAD and not silent:
            silent = time.monotonic() > until  # before it is read for the last time
            time.sleep(pause)
            _, name, number, *_ = f"{seen[0]} ? ? ?".split(" ")
            require(read_claim(path) == seen, f"{directory} is in use by process {number} on {name}: leave it to that, "
                    "or choose another --seed", 1)
        with writing(path):
            if seen[0] is not None:
                DEAD.add(seen[0])
                path.unlink(missing_ok=True)
            for partial in directory.glob("*.partial"):
                partial.unlink(missing_ok=True)  # of a process that was killed, or must not finish it any more
            try:
                with contextlib.suppress(FileExistsError), open(path, "x") as file:  # else another host was quicker
                    file.write(mine)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        if is_foreign(seen[0]):
            time.sleep(pause)  # another host that saw the same silence has replaced our claim by now, or will not
        still_ours()
        with open(path) as file:
            beat = threading.Thread(target=refresh, args=(file,), daemon=True)
            beat.start()
            try:
                yield still_ours
            finally:
                over.set()
                beat.join()
                with contextlib.suppress(OSError):
                    if read_claim(path)[0] == mine:
                        path.unlink()


@contextlib.contextmanager
def failure_noted(directory, still_ours):
    """Leaves the reason of a failure in failed.txt, for --status; an earlier one is forgotten."""
    path = directory / "failed.txt"
    with writing(path):
        path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(UserError, OSError):  # a full disk, or a run that is another's now
            kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
            write_atomically(path, f"{kind}{str(error).strip()}\n".encode(errors="replace"), still_ours)
        raise


def why_failed(directory):
    """The first line of a run's failed.txt."""
    return ((directory / "failed.txt").read_text(errors="replace").splitlines() or ["no reason was noted"])[0]


def describe_data(arrays):
    """What config.json says of a data set."""
    return {"train": len(arrays["train_x"]), "test": len(arrays["test_x"]), "classes": len(arrays["classes"]),
            "image": list(arrays["train_x"].shape[1:]),
            "crc32": {k: zlib.crc32(np.ascontiguousarray(arrays[k])) for k in sorted(arrays) if k != "classes"}}


def describe_run(args, facts, model, times, plan, device):
    """config.json: every option, the schedule it gives, the constants behind it, the data, machine and versions."""
    method, setting = run_name(args)
    git = None
    with contextlib.suppress(OSError):  # no git here
        command = ["git", "-C", pathlib.Path(__file__).resolve().parent, "describe", "--always", "--dirty"]
        git = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "method": method, "setting": setting,
        "options": {k: v for k, v in vars(args).items() if k not in NOT_THE_RESULT}, "schedule": times,
        "pruned_layers": [{"layer": layer, "filters": len(model.prunable[layer].mask), "epochs": list(kept),
                           "kept": list(kept.values())} for layer, kept in plan],
        # in %, the largest of any layer (A.4)
        "iterative_rate": max((100 * p / len(kept) for p, (_, kept) in zip(args.p or (), plan)), default=0.0),
        "parameters": sum(p.numel() for p in model.parameters()),
        "constants": {"momentum": MOMENTUM, "adam_betas": [0.9, 0.999], "adam_eps": 1e-8, "bn_momentum": BN_MOMENTUM,
                      "bn_eps": BN_EPS, "act_keep": ACT_KEEP, "act_every": ACT_EVERY, "crop_padding": CROP_PADDING},
        "data": facts | {"train": facts["train"] - args.val_split, "val": args.val_split},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "machine": platform.machine(), "git": git,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def check_same_run(directory, args, facts):
    """Refuses a directory, half-done or finished, whose config.json says another experiment or other data.

    facts: describe_data's. An option that an older version did not have is not compared: directories' names hold every
    option that differs from its default.
    """
    try:
        old = json.loads((directory / "config.json").read_text())
        different = [k for k, v in vars(args).items() if k not in (*NOT_THE_RESULT, "dataset")
                     and old["options"].get(k, v) != v]
        different += ["data set"] * any(old["data"][k] != facts[k] for k in ("classes", "image", "crc32"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory}/config.json is missing or damaged: move the directory away to train this run "
                        "afresh") from None
    require(not different, f"{directory} holds a run with another {', '.join(different)}: move it away, or choose "
            "another --log-dir")


def check_finished(args, directory, shared):
    """check_same_run of a finished run; a built-in data set that is not here is not fetched for it."""
    if args.dataset not in ("cifar10", "cifar100") or data_path(args.dataset, args.data_dir).exists():
        check_same_run(directory, args, loaded(args, shared)[1])


def what_it_lacks(args, directory, epoch):
    """Says, for the end of a line, what args ask for that a run which has come to `epoch` did not leave."""
    times = schedule(args)
    names = [f"epoch{times['save_epoch']}.pt"] * (0 < times["save_epoch"] <= epoch)
    names += ["tensorboard"] * (args.tensorboard and epoch == times["epochs"])
    names = [name for name in names if not (directory / name).exists()]
    return f", without {' and '.join(names)}: move it away to train it with that" * bool(names)


def save_checkpoint(path, state, check=None):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer(), check)


@contextlib.contextmanager
def checkpoints(path, every, still_ours):
    """Gives keep(state, last), which writes a run's state at most every so many seconds, and the last one always.

    What is not written stays in memory, and is written when the run ends in whatever way but a kill -9.
    """
    pending, written = None, -math.inf

    def keep(state, last):
        nonlocal pending, written
        if last or time.monotonic() - written >= every:
            save_checkpoint(path, state, still_ours)
            pending, written = None, time.monotonic()
        else:
            pending = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)

    try:
        yield keep
    finally:
        if pending:
            save_checkpoint(path, pending, still_ours)


def read_checkpoint(path, mmap=False):
    """What save_checkpoint wrote; damage raises one of many exceptions, and a flipped bit, which torch loads, too."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    require(not damaged, f"{damaged} in it fails its checksum")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def resume(path, model, optimizer, generators, noise, device):
    """Puts a run back to where its checkpoint was written; returns (next epoch, step, log lines)."""
    try:
        state = read_checkpoint(path)
        require(isinstance(state, dict), "not a checkpoint")
        epochs = [json.loads(line)["epoch"] for line in state["log"]]
        require(epochs == list(range(state["epoch"])), "its log is of other epochs")
        model.load_state_dict(state["model"])
        use_backend(model, model.backend)
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:
            if "capturable" in group:  # the checkpoint may come from another device
                group["capturable"] = device.type == "cuda"
        for name, generator in generators.items():
            generator.set_state(state["generators"][name])
        for layer_state, saved in zip(noise, state["noise"], strict=True):
            layer_state.update(saved)
            if saved["active"] is not None:
                layer_state["active"] = saved["active"].to(device)
                layer_state["backup"] = saved["backup"] and [tensor.to(device) for tensor in saved["backup"]]
        return state["epoch"], state["step"], state["log"]
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        raise UserError(f"{path} is damaged or of another version ({reason(error)}): move it away to train this run "
                        "afresh", 1) from None


def summarize_epochs(records):
    """What a run's epoch records say (README, "A run's files"), as a dict; percentages throughout.

    best_acc, best_epoch: the best test accuracy from the last pruning event on, that epoch included; gap: training
    minus test accuracy there; last_acc; val_chosen_acc: test accuracy at the best validation epoch (None without
    one); mean_stability: over the events that removed (or noised) at least one filter, 100 without any.
    """
    events = [r for r in records if any(r["removed"])]
    stabilities = [r["stability"] for r in events if r["stability"] is not None]
    late = [r for r in records if r["epoch"] >= (events[-1]["epoch"] if events else 0)]
    best = max(late, key=lambda r: r["test_acc"])  # the first of equal ones
    chosen = max(late, key=lambda r: r["val_acc"]) if best["val_acc"] is not None else None
    return {"epochs": len(records), "events": len(events), "best_acc": best["test_acc"], "best_epoch": best["epoch"],
            "gap": best["train_acc"] - best["test_acc"], "last_acc": records[-1]["test_acc"],
            "val_chosen_acc": chosen["test_acc"] if chosen else None,
            "mean_stability": sum(stabilities) / len(stabilities) if stabilities else 100.0,
            "seconds": sum(r["seconds"] for r in records)}


# +--------------------------------------------------------------------------------------------------------------------+
# | Training                                                                                                           |
# +--------------------------------------------------------------------------------------------------------------------+

def predict(model, images, data, args):
    """Logits in float32 for uint8 images (n, h, w, 3); under bf16, only the network runs in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        return model(normalise(images, data)).float()


@torch.no_grad()
def evaluate(model, data, split, args, before_batch=None, after_batch=None, graphs=None):
    """Accuracy in % on a split, in eval mode: () float64, on the device."""
    model.eval()
    x, y = data[split]
    correct, at = fed(graphs, split, torch.zeros(2, dtype=torch.int64, device=x.device))[0]

    def count(size):
        index = at + torch.arange(size, device=x.device)
        correct.add_((predict(model, x[index], data, args).argmax(1) == y[index]).sum())
        at.add_(size)

    for start in range(0, len(x), args.test_batch_size):
        if before_batch:
            before_batch(training=False)
        replayed(graphs, split, count, min(args.test_batch_size, len(x) - start))
        if after_batch:
            after_batch()
    return 100 * correct.double() / len(x)


def train_epoch(model, data, optimizer, args, generators, step, before_batch=None, after_batch=None, graphs=None):
    """One pass over the training data; returns (mean loss and share of right answers, (2,) on the device; next step).

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
    return totals / n, step


def fed(graphs, name, *tensors):
    """The tensors, at the addresses that captured graphs of that name read and write."""
    if graphs is None:
        return tensors
    held = graphs.setdefault(("fed", name), [t.clone() for t in tensors])
    for mine, new in zip(held, tensors):
        mine.copy_(new)
    return held


def replayed(graphs, name, function, size):
    """function(size); on a GPU from a CUDA graph, after WARM_UP calls of that name and size.

    A replay is all that a step asks of the host: the driver queues about a thousand launches, and a run that fills the
    queue keeps the other runs' waiting. So function itself finds its batch and adds up what it finds, in tensors that
    are `fed`. graphs (dict) keeps the graphs; whatever changes the network's shapes or the learning rate, which a graph
    holds fast, has to clear it. Without graphs (None) it is called as it is.
    """
    if graphs is None:
        return function(size)
    calls = graphs[name, size, "calls"] = graphs.get((name, size, "calls"), 0) + 1
    if calls <= WARM_UP:
        return function(size)
    if (name, size) not in graphs:
        graphs[name, size] = record(lambda: function(size), graphs)
    graphs[name, size]()


def record(function, graphs):
    """Captures function() in a CUDA graph, computing nothing; returns what replays it.

    The graphs of a run share memory: they are replayed one after the other, and nothing that one leaves there is read
    once another has begun.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, graphs.get("pool"), torch.cuda.current_stream(), capture_error_mode="thread_local"):
        function()
    graphs["pool"] = graph.pool()  # goes with the graphs when they are cleared: a pool without graphs is no pool
    return graph.replay


def measure_shapes(args, num_classes, data, device):
    """Measures what decides whether an event is worth new shapes or only masks; a dict, as config.json holds it.

    multiple: what numbers of filters are rounded up to: that of 1, 8, 16 and 32 whose step is fastest when an odd
    half of each pruned layer is left. ms: the steps' times, "unpruned" and by multiple. ms_per_filter: what a filter
    less saves of a step. capture_ms: what new shapes cost, warm-up included.
    """
    args = argparse.Namespace(**vars(args) | {"score": "l2"})  # no step that measures activations is among these
    model = use_backend(build_model(args.model, num_classes, args.width).to(device), "ext")
    optimizer, generators = make_optimizer(model, args), make_generators(args, device)
    few = data | {"train": tuple(t[:SHAPE_STEPS * args.batch_size] for t in data["train"])}
    steps = -(-len(few["train"][0]) // args.batch_size)

    def epochs_ms():
        graphs, ms = {}, []
        for _ in range(WARM_UP + 2):
            clock = time.perf_counter()
            train_epoch(model, few, optimizer, args, generators, 0, graphs=graphs)[0].tolist()
            ms.append(1000 * (time.perf_counter() - clock))
        return min(ms[WARM_UP:]) / steps, ms[0]

    found = {"unpruned": epochs_ms()}
    blocks = [model.prunable[layer] for layer, _ in pruning_plan(model, args, schedule(args))]
    for block in blocks:
        prune_block(block, torch.arange(len(block.mask) // 2 | 1, len(block.mask)))
    gone = sum(int((~block.mask).sum()) for block in blocks)
    for model.multiple in (1, 8, 16, 32):
        model.connect()
        found[model.multiple] = epochs_ms()
    ms = {name: round(step, 4) for name, (step, _) in found.items()}
    best = min((1, 8, 16, 32), key=ms.get)
    return {"multiple": best, "ms": ms, "ms_per_filter": max(0.0, ms["unpruned"] - ms[best]) / max(1, gone),
            "capture_ms": max(0.0, found[best][1] - steps * ms[best])}


def choose_shapes(model, shapes, plan, due, steps):
    """Just before filters go: lets them change the model's shapes only if `steps` then save more than a capture costs.

    due: as filters_due gives them; steps: until the next event. The choice is model.multiple.
    """
    fewer = 0
    for i, k in due.items():
        block = model.prunable[plan[i][0]]
        fewer += block.computed() - rounded_up(int(block.mask.sum()) - k, shapes["multiple"], len(block.mask))
    worth = fewer * shapes["ms_per_filter"] * steps > shapes["capture_ms"]
    model.multiple = shapes["multiple"] if worth else None


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


def train(args):
    """Trains, prunes and logs one run as `args` (from parse_options) say; returns its summary (summarize_epochs)."""
    run = training(args, {})
    with stream_of(args):
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value


def stream_of(args):
    """A CUDA stream of its own to work on; on a CPU, nothing."""
    return torch.cuda.stream(torch.cuda.Stream() if choose_device(args).type == "cuda" else None)


def training(args, shared):
    """`train` as a generator, which yields once an epoch, when the device has work and the host would wait for it.

    shared: a dict where runs of one process keep the data sets they share on the device.
    """
    directory = run_directory(args)
    if (directory / "done.json").exists():
        check_finished(args, directory, shared)
        print(f"{directory}: finished already{what_it_lacks(args, directory, schedule(args)['epochs'])}", flush=True)
        return None
    for line in doubts_about_rate(args):
        say_once(line)
    device = choose_device(args)
    source = args.dataset, args.data_dir, args.val_split, args.augment, device
    if source not in shared:
        arrays, facts = loaded(args, shared)
        data = put_on_device(arrays, device, args.val_split)
        if args.augment:
            data["padded"] = F.pad(data["train"][0], (0, 0, *[CROP_PADDING] * 4))
        if device.type == "cuda":
            torch.cuda.synchronize()  # the other runs' streams do not wait for this one
        shared[source] = facts, data
    with claimed(directory) as still_ours:
        if (directory / "checkpoint.pt").exists():
            check_same_run(directory, args, shared[source][0])  # another's run must not be noted as failed
        with failure_noted(directory, still_ours):
            return (yield from epochs_of(args, directory, device, *shared[source], shared, still_ours))


def loaded(args, shared):
    """(arrays, describe_data's) of a run's data set, read once for all runs that share `shared`."""
    source = args.dataset, args.data_dir
    if source not in shared:
        arrays = load_data(*source)
        shared[source] = arrays, describe_data(arrays)
    return shared[source]


def epochs_of(args, directory, device, facts, data, shared, still_ours):
    """The epochs of `training`, from the first or from where a checkpoint stands."""
    label, backend, shapes = "/".join(directory.parts[-3:]), choose_backend(args), None
    if device.type in GRAPHED and backend == "ext" and args.p and args.noise == "none" and args.prune_bn == "drop":
        what = args.model, args.width, len(args.p), args.batch_size, args.precision, args.dataset, device
        if what not in shared:
            shared[what] = measure_shapes(args, facts["classes"], data, device)
        shapes = shared[what]
    generators = make_generators(args, device)
    model = use_backend(build_model(args.model, facts["classes"], args.width).to(device), backend)
    optimizer = make_optimizer(model, args)
    times = schedule(args)
    plan = pruning_plan(model, args, times)
    noise, graphs = [], {} if device.type in GRAPHED else None
    hooks = {"graphs": graphs}
    if args.noise != "none":
        noise = [new_noise(model.prunable[layer]) for layer, _ in plan]
        noised = [(model.prunable[layer], state) for (layer, _), state in zip(plan, noise)]
        hooks |= {"before_batch": lambda training: [noise_pass(block, state, args, generators.get("noise"), training)
                                                    for block, state in noised],
                  "after_batch": lambda: [end_noise_if_due(block, state, args) for block, state in noised]}

    config = describe_run(args, facts, model, times, plan, device) | {"backend": backend, "shapes": shapes}
    model.multiple = shapes["multiple"] if shapes else 1
    first_epoch, step, lines = 0, 0, []
    if (directory / "checkpoint.pt").exists():
        first_epoch, step, lines = resume(directory / "checkpoint.pt", model, optimizer, generators, noise, device)
        print(f"{label}: continues after epoch {first_epoch} of {times['epochs']}"
              f"{what_it_lacks(args, directory, first_epoch)}", flush=True)
    else:
        scratch = filters_due(model, args, plan, -1, noise)
        _, tied = prune_now(model, optimizer, args, plan, scratch, noise, generators["target"])
        say_ties(label, args, tied)
        write_json(directory / "config.json", config | {"tied": tied})
    write_atomically(directory / "epochs.jsonl", "".join(line + "\n" for line in lines).encode())
    records = [json.loads(line) for line in lines]
    live = [int(block.mask.sum()) for block in model.prunable]

    with (progress_bar(label, times["epochs"], first_epoch) as bar,
          tensorboard(args, directory, first_epoch) as scalars,
          checkpoints(directory / "checkpoint.pt", CHECKPOINT_EVERY[device.type], still_ours) as keep):
        for epoch in range(first_epoch, times["epochs"]):
            clock = time.monotonic()
            lr = args.lr * 0.1 ** sum(epoch >= x for x in times["lrs"])
            if graphs and lr != optimizer.param_groups[0]["lr"]:
                graphs.clear()
            optimizer.param_groups[0]["lr"] = lr
            totals, step = train_epoch(model, data, optimizer, args, generators, step, **hooks)
            test_acc = before = evaluate(model, data, "test", args, **hooks)
            yield
            choose_device(args)  # whoever had its turn may have set another precision

            gone, tied, due = {}, {}, filters_due(model, args, plan, epoch, noise)
            if due:
                captured = shapes_of(model)
                if shapes:
                    upcoming = min((e for _, kept in plan for e in kept if e > epoch), default=times["epochs"])
                    choose_shapes(model, shapes, plan, due, (upcoming - epoch) * step // (epoch + 1))
                gone, tied = prune_now(model, optimizer, args, plan, due, noise, generators["target"])
                say_ties(label, args, tied)
                live = [int(block.mask.sum()) for block in model.prunable]
                if graphs and shapes_of(model) != captured:
                    graphs.clear()
            if due or noise:
                test_acc = evaluate(model, data, "test", args, **hooks)
            val_acc = evaluate(model, data, "val", args, graphs=graphs) if args.val_split else before
            loss, train_acc, before, test_acc, val_acc = torch.stack([*totals, before, test_acc, val_acc]).tolist()
            require(math.isfinite(loss), f"{directory}: the loss is {loss} in epoch {epoch}: lower --lr (now {lr:g}); "
                    "the checkpoint of the epoch before is kept", 1)

            records.append({
                "epoch": epoch, "lr": lr, "train_loss": loss, "train_acc": 100 * train_acc, "test_acc_before": before,
                "test_acc": test_acc, "val_acc": val_acc if args.val_split else None,
                "stability": 100 * test_acc / before if gone and before else None,
                "removed": [len(gone.get(layer, ())) for layer, _ in plan], "live": live, "filters": gone,
                "tied": tied,
                "computed": [block.computed() for block in model.prunable],
                "noised": [{k: state[k] for k in ("test", "train")} for state in noise],
                "seconds": round(max(0, time.monotonic() - clock), 3)})
            lines.append(json.dumps(records[-1]))
            still_ours()
            if epoch + 1 == times["save_epoch"]:
                save_checkpoint(directory / f"epoch{epoch + 1}.pt", {"epoch": epoch + 1, "model": model.state_dict()},
                                still_ours)
            keep({"epoch": epoch + 1, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "noise": noise, "generators": {name: g.get_state() for name, g in generators.items()}, "log": lines},
                 last=epoch + 1 == times["epochs"])
            append_line(directory / "epochs.jsonl", lines[-1])  # after the checkpoint, which can rebuild it
            scalars(records[-1])
            report(label, records, bar)

    summary = summarize_epochs(records)
    write_json(directory / "done.json", summary)
    print(f"{label}: best accuracy {summary['best_acc']:.2f}% (epoch {summary['best_epoch']}), last "
          f"{summary['last_acc']:.2f}%, mean stability {summary['mean_stability']:.2f}% over {summary['events']} "
          "pruning events", flush=True)
    return summary


def say_ties(label, args, tied):
    """One line where filters were chosen by their order (prune_now)."""
    if tied:
        print(f"{label}: equal {args.score} scores, so that the first of them went: " +
              ", ".join(f"{n} filters of layer {layer}" for layer, n in tied.items()), flush=True)


@contextlib.contextmanager
def tensorboard(args, directory, first_epoch):
    """Gives what writes an epoch's numbers for TensorBoard, under --tensorboard; else what does nothing."""
    if not args.tensorboard:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install tensorboard, or leave the option out") from None
    with writing(directory), SummaryWriter(directory / "tensorboard", purge_step=first_epoch) as writer:
        def write(record):
            for name in ("lr", "train_loss", "train_acc", "test_acc_before", "test_acc", "val_acc", "stability"):
                if record[name] is not None:
                    writer.add_scalar(name, record[name], record["epoch"])
            writer.add_scalar("live_filters", sum(record["live"]), record["epoch"])
        yield write


def progress_bar(label, epochs, first_epoch):
    on_a_terminal = sys.stderr.isatty() and sys.stdout.isatty()
    return tqdm(total=epochs, initial=first_epoch, desc=label, disable=not on_a_terminal,
                bar_format="{desc} |{bar:20}| epoch {n_fmt}/{total_fmt}{postfix} {remaining} left")


def report(label, records, bar):
    """The epoch just done, for whoever watches: the bar on a terminal, a plain line in a file."""
    record, stability = records[-1], summarize_epochs(records)["mean_stability"]
    bar.update()
    if not bar.disable:
        bar.set_postfix_str(f"test {record['test_acc']:.2f}% stability {stability:.2f}%")
        return
    event = f" -> {record['test_acc']:.2f}% ({sum(record['removed'])} filters)" if any(record["removed"]) else ""
    left = sum(r["seconds"] for r in records[-5:]) / len(records[-5:]) * (bar.total - len(records)) / 60
    print(f"{label} epoch {len(records)}/{bar.total} lr {record['lr']:g} loss {record['train_loss']:.4f} train "
          f"{record['train_acc']:.2f}% test {record['test_acc_before']:.2f}%{event} stability {stability:.2f}% "
          f"{record['seconds']:.1f} s, {left:.0f} min left", flush=True)


# +--------------------------------------------------------------------------------------------------------------------+
# | Entry                                                                                                              |
# +--------------------------------------------------------------------------------------------------------------------+

def choose_device(args):
    """The torch device, with precision and determinism set; UserError where the machine lacks what was asked."""
    cuda = torch.cuda.is_available()
    require(cuda or args.device != "cuda", "--device cuda, but torch sees no CUDA device here: use --device cpu, or "
            "check the driver")
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    require(device.type == "cuda" or args.precision != "tf32", "--precision tf32 needs a CUDA device: use fp32 here")
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(args.deterministic)
    return device


def choose_backend(args):
    """"ext" or "eager", as --backend says; one line where "auto" has to do without the extension."""
    require(ops.available or args.backend != "ext", f"--backend ext, but the extension is not built here "
            f"({ops.why_not}): run bash runs.sh setup, or use --backend eager")
    if not ops.available and args.backend == "auto" and not choose_backend.told:
        print(f"train.py: the extension is not built ({ops.why_not}); plain PyTorch takes its place. bash runs.sh "
              "setup builds it", file=sys.stderr)
        choose_backend.told = True
    return "ext" if ops.available and args.backend != "eager" else "eager"


choose_backend.told = False  # once, not for every run of a list


def keep_freed_memory():
    """Tells glibc to keep freed activations: it would give them back each step, and page faults cost a fifth of it."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no shrinking of the heap


def read_runs(path):
    """The runs listed in a file, a line of options each, as runs_of gives them."""
    try:
        commands = [shlex.split(line) for line in open(path) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as lines of options: {reason(error)}") from None
    return runs_of(commands)


def runs_of(commands):
    """The runs of option lists, one for each seed: {directory: (args, line)}, each directory once."""
    runs = {}
    for command in commands:
        args = parse_options(command)
        for seed in args.seeds or [args.seed]:
            one = argparse.Namespace(**vars(args) | {"seed": seed, "seeds": None})
            line = shlex.join(command) + (f" --seeds {seed}" if args.seeds else "")  # the last one counts
            directory = run_directory(one)
            first, _ = runs.setdefault(directory, (one, line))
            require(sources(first) == sources(one), f"two of the runs would share {directory}, but differ in --dataset, "
                    "--data-dir, --save-epoch or --tensorboard: give one of them another --log-dir")
    return runs


def sources(args):
    """What a run's directory does not say of it: where its data lie, and what it is to leave beside its logs."""
    return os.path.realpath(data_path(args.dataset, args.data_dir)), args.save_epoch, args.tensorboard


def log_of(directory):
    """The lines of the epochs that a run has logged."""
    log = directory / "epochs.jsonl"
    return log.read_bytes().split(b"\n")[:-1] if log.exists() else []


def state_of(directory):
    """"done", "running", "failed" or "waiting" (half-done runs too)."""
    if (directory / "done.json").exists():
        return "done"
    claim, refreshed = read_claim(directory / ".claim")
    if is_foreign(claim) and abs(time.time() - refreshed / 1e9) < SILENCE:
        return "running"
    with contextlib.suppress(FileNotFoundError), open(directory / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return "running"
    return "failed" if (directory / "failed.txt").exists() else "waiting"


def by_state(runs):
    """The directories of runs under each of the states."""
    found = {state: [] for state in ("done", "running", "failed", "waiting")}
    for directory in runs:
        found[state_of(directory)].append(directory)
    return found


def print_plan(runs, retry_failed):
    """--plan: what is left of the runs, in numbers on stderr, as lines on stdout."""
    finished, running, failed, waiting = by_state(runs).values()
    shared = {}
    for directory in finished:
        check_finished(runs[directory][0], directory, shared)
    left = {*waiting, *failed} if retry_failed else {*waiting}
    todo = {directory: run for directory, run in runs.items() if directory in left}
    done = [len(log_of(directory)) for directory in todo]
    epochs = sum(schedule(args)["epochs"] for args, _ in todo.values()) - sum(done)
    print(f"{len(runs)} runs: {len(finished)} finished, {sum(map(bool, done))} half-done; to do now: "
          f"{len(todo)} runs, {epochs:,} epochs", file=sys.stderr)
    if running:
        print(f"{len(running)} runs are being trained by another process, such as {running[0]}", file=sys.stderr)
    if failed and not retry_failed:
        print(f"{len(failed)} runs that failed before are left alone, such as {failed[0]}: "
              f"{why_failed(failed[0])} (--retry-failed trains them again)", file=sys.stderr)
    for args, _ in todo.values():
        loaded(args, shared)  # a download that fails should fail here, once
    for _, line in todo.values():
        print(line)


def print_status(files):
    """--status: a line for each file of runs, named after it, and a line for each run that failed."""
    print(f"{'':12} {'runs':>6} {'done':>6} {'running':>8} {'failed':>7} {'waiting':>8}  time left")
    for file in files:
        runs, pace = read_runs(file), []
        done, running, failed, waiting = by_state(runs).values()
        for directory in runs:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no epoch, or a damaged one
                pace.append(float(json.loads(log_of(directory)[-1])["seconds"]))
        left = [max(0, schedule(runs[d][0])["epochs"] - len(log_of(d))) for d in running + waiting]
        at_once = max(1, len(running))
        hours = sum(left) * sum(pace) / max(1, len(pace)) / at_once / 3600
        time_left = f"{hours:.1f} h, {at_once} at once" if pace else "not known"
        print(f"{pathlib.Path(file).name:12} {len(runs):6} {len(done):6} {len(running):8} {len(failed):7} "
              f"{len(waiting):8}  {time_left if left else 'nothing to do'}")
        for directory in failed:
            print(f"  failed: {directory}: {why_failed(directory)}")


def tell(error):
    """One line on stderr for whatever the user can mend, a traceback for what is a bug; returns the exit code."""
    line, code = str(error), 1
    if isinstance(error, UserError):
        code = error.code
    elif isinstance(error, torch.OutOfMemoryError):
        line = ("the GPU's memory is full: lower --batch-size or wait for other programs; the same command continues "
                "this run")
    elif isinstance(error, OSError):  # a folder that may not even be looked into, and its kind
        line += ": mend that, or choose other folders with --log-dir and --data-dir"
    elif isinstance(error, KeyboardInterrupt):
        code = 143 if line else 130
        line = f"{line or 'interrupted'}; the same command goes on from the last finished epoch"
    else:
        line = "".join(traceback.format_exception(error)).rstrip()
    print(f"train.py: {line}", file=sys.stderr)
    return code


def terminate(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb what ends the run
    raise KeyboardInterrupt("terminated")


def fit_at_once(peak, free):
    """How many runs a GPU holds when the first takes `peak` bytes at most and `free` are left beside it."""
    return max(1, min(AT_ONCE, 1 + int(0.8 * free / max(1, peak))))


def train_all(runs, at_once):
    """--runs, --seeds: so many at once take turns; a run that fails is reported, and the others go on.

    at_once: None for one, and on a GPU, once the first run has shown what memory it takes, for as many as fit.
    """
    waiting, going, streams, shared, failed, limit = list(runs), {}, {}, {}, 0, at_once or 1
    try:
        while waiting or going:
            while waiting and len(going) < limit:
                directory = waiting.pop(0)
                going[directory] = training(runs[directory][0], shared)
            for directory, run in list(going.items()):
                args, line = runs[directory]
                try:
                    if directory not in streams:
                        streams[directory] = stream_of(args)
                    with streams[directory]:
                        next(run)
                except StopIteration:
                    del going[directory]
                except Exception as error:
                    del going[directory]
                    if going and isinstance(error, torch.OutOfMemoryError):
                        limit = at_once = len(going)
                        waiting.append(directory)
                        print(f"train.py: the GPU's memory holds {limit} runs at once: {directory} goes on when one of "
                              "them has ended", file=sys.stderr)
                        continue
                    tell(error)
                    refused = isinstance(error, UserError) and error.code == 2
                    if refused or state_of(directory) not in ("running", "done"):  # by another process
                        print(f"failed: train.py {line}", file=sys.stderr)
                        failed += 1
            if at_once is None and torch.cuda.is_available() and torch.cuda.max_memory_reserved():
                limit = at_once = fit_at_once(torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[0])
    finally:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # each run's stream, which is not the one that works from here on
        for run in going.values():
            run.close()  # which writes the checkpoints that are not on disk yet
    require(not failed, f"{failed} of {len(runs)} runs failed; the same command continues them", 1)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse_options(argv)
        keep_freed_memory()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)
        if args.plan:
            print_plan(read_runs(args.plan), args.retry_failed)
        elif args.status:
            print_status(args.status)
        elif args.runs:
            train_all(read_runs(args.runs), args.at_once)
        elif args.seeds:
            train_all(runs_of([argv]), args.at_once)
        else:
            train(args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return tell(error)


if __name__ == "__main__":
    sys.exit(main())
