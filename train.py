#!/usr/bin/env python3
"""Train a network, prune it while it trains, and measure how stable its accuracy is under pruning.

The paper: "The Generalization-Stability Tradeoff in Neural Network Pruning" (NeurIPS 2020). Section numbers in this
file are those of its appendix. Every default is the paper's setting for the model (Figure 2; Figure 4 for SGD).

    python train.py --model vgg11 --target L --r 40                     # Prune_L 13%, CIFAR-10, 325 epochs
    python train.py --model resnet18 --target S --r 4 --seed 7          # Prune_S 1%
    python train.py --model vgg11 --target none --scale-epochs 0.08     # the baseline, in 26 epochs
    python train.py --model vgg11 --target L --noise zero --noise-batches 50
    python train.py --model resnet20 --target S --r 60                  # SGD, l1 scores, every layer
    python train.py --dataset digits --width 0.25 --epochs 20 --lrs 12 18 --target S --s 0 --e 9 --p 0.5 --r 3

A run leaves logs/<dataset>/<model>/<method>/seed<k>/ with config.json, epochs.jsonl, checkpoint.pt and, at its end,
done.json. The same command again continues a half-done run and leaves a finished one alone.
"""
import argparse
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
import subprocess
import sys
import time
import zlib
from fractions import Fraction

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# +--------------------------------------------------------------------------------------------------------------------+
# | Configuration: the paper's settings, the command line, the run's name                                              |
# +--------------------------------------------------------------------------------------------------------------------+

PRUNABLE_BLOCKS = {"vgg11": 8, "vgg19": 16, "resnet18": 16, "resnet20": 18, "resnet56": 54}
SCORES = ("l1", "l2", "act", "ebn", "ebn-signed")
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
NOT_THE_RESULT = ("log_dir", "data_dir", "device", "plan", "save_epoch")  # options that do not say what a run computes


class UserError(Exception):
    """Something the user can mend: printed as one line. `code` is the exit code, 2 before the run and 1 during it."""

    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


def paper_settings(model, optimizer=None):
    """The paper's options for `model` (str) under `optimizer` ("adam", "sgd" or None: the paper's own for it)."""
    optimizer = optimizer or ("sgd" if model in ("resnet20", "resnet56") else "adam")
    if optimizer == "adam":
        pruning = ADAM_PRUNING[model.rstrip("0123456789")]
    else:
        n = PRUNABLE_BLOCKS[model]
        pruning = dict(s=[40] * n, e=[100] * n, p=[0.1] * n, r=30, score="l1", save_epoch=0)
    return dict(optimizer=optimizer, **OPTIMIZERS[optimizer], **pruning)


def repeated(kind):
    """An argparse type for list options: `V` is one value, `VxN` is V repeated N times; gives a list."""
    def parse(text):
        value, _, times = text.partition("x")
        return [kind(value)] * (int(times) if times else 1)
    parse.__name__ = f"{kind.__name__} (or VxN, V repeated N times)"
    return parse


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (train.py --help lists every option)")


def make_parser():
    table = ["the paper's settings, used for whatever is not given:"]
    for model, optimizer in [("vgg11", "adam"), ("resnet18", "adam"), ("resnet20", "sgd")]:
        options = paper_settings(model, optimizer)
        table.append(f"  {model}, {optimizer}: " + " ".join(f"{k}={short(v)}" for k, v in options.items()))
    table.append("  vgg19 is as vgg11; resnet56 as resnet20; --optimizer sgd or adam takes the other's settings along.")
    parser = OneLineParser(prog="train.py", description=__doc__, epilog="\n".join(table), allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = argparse.BooleanOptionalAction
    group = parser.add_argument_group("network and data")
    group.add_argument("--model", choices=PRUNABLE_BLOCKS, default="vgg11", help="(default: vgg11)")
    group.add_argument("--width", type=float, default=1.0, help="multiplies every channel count (default: 1)")
    group.add_argument("--dataset", default="cifar10",
                       help="cifar10, cifar100, digits, a .npz file, or a folder with train/ and test/ class folders "
                            "(default: cifar10)")
    group.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is put (default: data)")
    group.add_argument("--val-split", type=int, default=0, metavar="N",
                       help="hold N training images out for validation (default: 0)")
    group.add_argument("--augment", action=flag, help="random crop and flip (default: the paper's)")

    group = parser.add_argument_group("pruning (defaults: the paper's for the model, listed below)")
    group.add_argument("--target", choices=("none", "S", "L", "R"), default="none",
                       help="prune the filters with the Smallest or Largest score, or Random ones (default: none)")
    group.add_argument("--r", type=int, help="retrain period: epochs between pruning iterations")
    for name, kind, what in (("s", int, "first epochs"), ("e", int, "last epochs"), ("p", float, "pruned fractions")):
        group.add_argument(f"--{name}", type=repeated(kind), nargs="+", metavar=name,
                           help=f"{what} of pruning, one value (or VxN) for each of the last n prunable layers")
    group.add_argument("--score", choices=SCORES, help="what makes a filter small or large")
    group.add_argument("--scratch", action=flag, default=False,
                       help="prune everything once, before the first training step (default: no)")
    group.add_argument("--prune-bn", choices=("drop", "keep"), default="drop",
                       help="drop a pruned filter's batch norm and shortcut too, or keep them (default: drop)")

    group = parser.add_argument_group("noise in place of pruning (appendix D)")
    group.add_argument("--noise", choices=("none", "zero", "gauss"), default="none",
                       help="noise the targeted filters instead of removing them (default: none)")
    group.add_argument("--noise-batches", type=int, metavar="K",
                       help="end an event's noise after K noised training batches; 1 is a single application, on the "
                            "first test batch (default: 1)")
    group.add_argument("--noise-filters", choices=("newest", "all"),
                       help="noise the event's own filters or all ever targeted (default: newest)")
    group.add_argument("--noise-restore", action=flag,
                       help="zero batch norm too, and put everything back afterwards, D.2 (default: no)")

    group = parser.add_argument_group("optimisation and schedule")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: the paper's for the model)")
    group.add_argument("--lr", type=float, help="initial learning rate")
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--batch-size", type=int, default=128, help="(default: 128)")
    group.add_argument("--test-batch-size", type=int, default=128,
                       help="(default: 128; shapes noise runs, as each test batch adds its noise)")
    group.add_argument("--epochs", type=int)
    group.add_argument("--lrs", type=repeated(int), nargs="*", metavar="epoch", help="epochs that divide lr by ten")
    group.add_argument("--scale-epochs", type=float, default=1.0, metavar="F",
                       help="multiply epochs, lrs, s, e and r by F, each rounded, r at least 1 (default: 1)")
    group.add_argument("--seed", type=int, default=1, help="(default: 1)")

    group = parser.add_argument_group("machine and files")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    group.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32", help="(default: fp32)")
    group.add_argument("--deterministic", action=flag, default=False,
                       help="CUDA: only deterministic kernels; CPU runs always repeat exactly (default: no)")
    group.add_argument("--log-dir", default="logs", help="(default: logs)")
    group.add_argument("--save-epoch", type=int, metavar="N",
                       help="also keep the weights after the N-th epoch, as epoch<N>.pt (0: none)")
    group.add_argument("--plan", metavar="FILE",
                       help="train nothing: say how many of the runs listed in FILE (a line of options each) are left, "
                            "and print those lines")
    return parser


def parse_options(argv):
    """Parses, fills in the paper's settings, checks; raises UserError. Options that a run does not use become None."""
    args = make_parser().parse_args(argv)
    for name in ("s", "e", "p", "lrs"):
        if getattr(args, name) is not None:
            setattr(args, name, [value for values in getattr(args, name) for value in values])
    lengths_given = {name: len(getattr(args, name)) for name in "sep" if getattr(args, name) is not None}
    asked_to_save = args.save_epoch
    for name, value in paper_settings(args.model, args.optimizer).items():
        if getattr(args, name) is None:
            setattr(args, name, value)

    def check(ok, message):
        if not ok:
            raise UserError(message)

    check(0 < args.width <= 64, f"--width is {args.width:g}: give a factor above 0 and at most 64")
    check(0 < args.scale_epochs < 1e6, f"--scale-epochs is {args.scale_epochs:g}: give a factor above 0")
    check(0 < args.lr < 1e6, f"--lr is {args.lr:g}: give a learning rate above 0")
    check(0 <= args.weight_decay < 1e6, f"--weight-decay is {args.weight_decay:g}: give 0 or more")
    for name in ("epochs", "batch_size", "test_batch_size", "r"):
        check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    for name in ("val_split", "save_epoch"):
        check(getattr(args, name) >= 0, f"--{name.replace('_', '-')} is {getattr(args, name)}: give 0 or more")
    check(0 <= args.seed < 2**32, f"--seed is {args.seed}: give 0 to {2**32 - 1}")
    check(all(x >= 0 for x in args.lrs), f"--lrs has a negative epoch: {short(args.lrs)}")
    pruning = args.target != "none"
    check(pruning or not args.scratch, "--scratch needs something to prune: give --target S, L or R too")
    check(pruning or args.noise == "none", "--noise needs filters to noise: give --target S, L or R too")
    check(args.noise == "none" or not args.scratch, "--noise and --scratch exclude each other: choose one")
    check(args.noise == "none" or args.prune_bn == "drop", "--prune-bn keep is for pruning; noise never drops it")
    for name in ("noise_batches", "noise_filters", "noise_restore"):
        check(args.noise != "none" or getattr(args, name) is None,
              f"--{name.replace('_', '-')} does nothing without --noise zero or gauss: add one of them")
    check(not args.noise_restore or args.noise == "zero", "--noise-restore is for --noise zero")
    if args.noise != "none":
        args.noise_batches = 1 if args.noise_batches is None else args.noise_batches
        args.noise_filters, args.noise_restore = args.noise_filters or "newest", bool(args.noise_restore)
        check(args.noise_batches >= 1, f"--noise-batches is {args.noise_batches}: give at least 1")

    lengths = {name: len(getattr(args, name)) for name in "sep"}
    check(len(set(lengths.values())) == 1, "--s, --e and --p need one value for each pruned layer: they have "
          + ", ".join(str(n) + ("" if name in lengths_given else " (the default)") for name, n in lengths.items()))
    n_max = PRUNABLE_BLOCKS[args.model]
    check(lengths["s"] <= n_max, f"{lengths['s']} layers to prune, but {args.model} has {n_max}: give fewer values")
    check(all(0 <= p <= 1 for p in args.p), f"--p holds fractions from 0 to below 1, not {short(args.p)}")
    check(all(p < 1 for p in args.p), "--p 1 prunes a whole layer, which cuts the network in two: give less than 1")
    for s, e in zip(args.s, args.e):
        check(0 <= s <= e, f"pruning starts at epoch {s} and ends at {e}: each s must be 0 or more and at most its e")
    if pruning and not args.scratch:
        check(max(args.e) < args.epochs, f"pruning ends at epoch {max(args.e)} but epochs count from 0 to "
                                         f"{args.epochs - 1}: lower --e or raise --epochs")
    if asked_to_save is None and args.save_epoch > args.epochs:
        args.save_epoch = 0
    check(args.save_epoch <= args.epochs, f"--save-epoch {args.save_epoch} is past the last of {args.epochs} epochs")
    if not pruning or args.scratch:
        args.r = args.s = args.e = None
    if not pruning:
        args.p = args.score = None
    return args


def rounded(x):
    return math.floor(x + Fraction(1, 2))


def schedule(args):
    """The run's epochs after --scale-epochs: dict of epochs, lrs, s, e, r, save_epoch (None where not used)."""
    scale = Fraction(str(args.scale_epochs))
    scaled = {name: None if getattr(args, name) is None else [rounded(scale * x) for x in getattr(args, name)]
              for name in ("lrs", "s", "e")}
    scaled["epochs"] = max(1, rounded(scale * args.epochs))
    scaled["save_epoch"] = rounded(scale * args.save_epoch)
    scaled["r"] = None if args.r is None else max(1, rounded(scale * args.r))
    if scaled["e"]:  # rounding up must not carry the last pruning iteration past the end
        scaled["e"] = [min(e, scaled["epochs"] - 1) for e in scaled["e"]]
    return scaled


def short(value):
    """A value as it stands in names and messages: 0.25, 3,4,5,6, 0.1x16."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1 and len(set(value)) == 1:
            return f"{short(value[0])}x{len(value)}"
        return ",".join(short(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_name(args):
    """(method, setting): what is done to the filters, and all else that differs from the paper's, "" if nothing."""
    paper = paper_settings(args.model, args.optimizer)
    if args.target == "none":
        method = ["none"]
    elif args.noise != "none":
        method = [args.noise, str(args.noise_batches)] + [args.target] * (args.target != "L")
        method += [f"r{args.r}"] * (args.r != paper["r"])
        method += [args.noise_filters] * (args.noise_filters != "newest") + ["restore"] * args.noise_restore
        method += [f"tb{args.test_batch_size}"] * (args.test_batch_size != 128)
    elif args.scratch:
        method = ["scratch", args.target]
    else:
        method = [args.target, f"r{args.r}"]
    if args.target != "none":
        method += [args.score] * (args.score != paper["score"]) + ["bnkeep"] * (args.prune_bn == "keep")
        method += [f"{k}{short(getattr(args, k))}" for k in "sep" if getattr(args, k) not in (None, paper[k])]
    setting = [args.optimizer] * (args.optimizer != paper_settings(args.model)["optimizer"])
    for name, label, default in (
            ("width", "w", 1.0), ("scale_epochs", "x", 1.0), ("epochs", "epochs", paper["epochs"]),
            ("lrs", "lrs", paper["lrs"]), ("lr", "lr", paper["lr"]), ("weight_decay", "wd", paper["weight_decay"]),
            ("batch_size", "batch", 128), ("val_split", "val", 0)):
        if getattr(args, name) != default:
            setting.append(f"{label}{short(getattr(args, name))}")
    setting += ["augment" if args.augment else "noaugment"] * (args.augment != paper["augment"])
    setting += [args.precision] * (args.precision != "fp32") + ["deterministic"] * args.deterministic
    return "-".join(method), "-".join(setting)


def run_directory(args):
    dataset = pathlib.Path(args.dataset).stem if "/" in args.dataset or "." in args.dataset else args.dataset
    return pathlib.Path(args.log_dir, dataset, args.model, "-".join(filter(None, run_name(args))), f"seed{args.seed}")


# +--------------------------------------------------------------------------------------------------------------------+
# | Data: every source gives the same dict of arrays; the whole set lives on the device as uint8                       |
# +--------------------------------------------------------------------------------------------------------------------+

def load_data(name, data_dir="data"):
    """Loads a data set by name or path, checked.

    name: "cifar10", "cifar100" (read from data_dir/<name>.npz; downloaded by torchvision and cached there the first
    time), "digits" (scikit-learn's), the path of a .npz of the same form, or of a folder with train/ and test/, each
    with one folder of images per class (resized to 32x32). Returns a dict: train_x, test_x (n, height, width, 3)
    uint8; train_y, test_y (n,) int64, 0 … k-1; classes (k,) str. Raises UserError if that cannot be had.
    """
    path = pathlib.Path(name)
    if name in ("cifar10", "cifar100"):
        path = pathlib.Path(data_dir, f"{name}.npz")
        if not path.exists():
            save_npz(path, download_cifar(name, data_dir))
        data = read_npz(path)
    elif name == "digits":
        path, data = "digits", load_digits()
    elif name.endswith(".npz"):
        data = read_npz(path)
    elif path.is_dir():
        data = read_image_folder(path)
    else:
        raise UserError(f"--dataset {name}: no such file or folder; give cifar10, cifar100, digits, a .npz file, or a "
                        "folder with train/ and test/")
    return check_data(data, path)


def check_data(data, path):
    """The arrays of `data` in their final types, or UserError naming what is wrong with the one at `path`."""
    def check(ok, message):
        if not ok:
            raise UserError(f"{path}: {message}")

    missing = [k for k in ("train_x", "train_y", "test_x", "test_y", "classes") if k not in data]
    check(not missing, f"lacks {', '.join(missing)}; it needs train_x, train_y, test_x, test_y and classes")
    k = len(data["classes"]) if data["classes"].ndim == 1 else 0
    check(k >= 2, "classes must be a list of at least two names")
    for split in ("train", "test"):
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        check(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 32,
              f"{split}_x is {x.dtype} {x.shape}; it must be uint8 (images, height, width, 3), at least 32x32")
        check(len(x) > 0 and y.shape == (len(x),), f"{split}_y has shape {y.shape} for {len(x)} images; one label each")
        check(y.dtype.kind in "iu", f"{split}_y is {y.dtype}; labels must be whole numbers")
        check(0 <= y.min() and y.max() < k, f"{split}_y goes from {y.min()} to {y.max()}; {k} classes are 0 to {k - 1}")
        data[f"{split}_y"] = y.astype(np.int64)
    check(data["train_x"].shape[1:] == data["test_x"].shape[1:], "training and test images differ in size")
    return data


def read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"{path} cannot be read as .npz ({str(error).splitlines()[0] if str(error) else 'damaged'}): "
                        "make it again, or delete it to have it downloaded again") from None


def save_npz(path, arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getbuffer())


def download_cifar(name, data_dir):
    try:
        import torchvision
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        train, test = (kind(data_dir, train=flag, download=True) for flag in (True, False))
    except Exception as error:
        archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
        raise UserError(f"cannot download {name} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
                        f": put {name}.npz or the official {archive} into {data_dir}/, or use --dataset digits, which "
                        "needs no download") from None
    return dict(train_x=train.data, train_y=np.array(train.targets), test_x=test.data, test_y=np.array(test.targets),
                classes=np.array(train.classes))


def load_digits():
    """scikit-learn's 1,797 handwritten digits (8x8, 0 to 16) at 32x32 in three equal channels: 1,000 train, 797 test."""
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
    from PIL import Image
    classes = sorted(p.name for p in (folder / "train").glob("*") if p.is_dir())
    if not classes:
        raise UserError(f"{folder}: no class folders under {folder / 'train'}; lay images out as train/<class>/<image>")
    data = {"classes": np.array(classes)}
    for split in ("train", "test"):
        unknown = {p.name for p in (folder / split).glob("*") if p.is_dir()} - set(classes)
        if unknown:
            raise UserError(f"{folder / split}: {sorted(unknown)[0]} is not a class of {folder / 'train'}")
        x, y = [], []
        for label, name in enumerate(classes):
            for path in sorted(p for p in (folder / split / name).glob("*") if not p.name.startswith(".")):
                try:
                    x.append(np.asarray(Image.open(path).convert("RGB").resize((32, 32), Image.BILINEAR)))
                except Exception:
                    raise UserError(f"{path}: not a readable image; repair or remove it") from None
                y.append(label)
        data[f"{split}_x"] = np.stack(x) if x else np.empty((0, 32, 32, 3), np.uint8)
        data[f"{split}_y"] = np.array(y, np.int64)
    return data


def put_on_device(data, device, val_split=0):
    """The arrays as tensors on `device`: {"train": (x uint8 NHWC, y), "test": …, "val": … if asked, "mean", "std"}.

    mean and std (3,) are the training images' per-channel ones, in units of a uint8 pixel, exact. The validation
    images are the same for every seed, so that runs differ in what they learn and not in what judges them.
    """
    train_x, train_y = data["train_x"], data["train_y"]
    if val_split >= len(train_x):
        raise UserError(f"--val-split {val_split} leaves nothing of {len(train_x)} training images: give fewer")
    splits = {"test": (data["test_x"], data["test_y"])}
    if val_split:
        order = np.random.RandomState(0).permutation(len(train_x))
        held_out, kept = np.sort(order[:val_split]), np.sort(order[val_split:])
        splits["val"] = (train_x[held_out], train_y[held_out])
        train_x, train_y = train_x[kept], train_y[kept]
    splits["train"] = (train_x, train_y)
    counts = np.stack([np.bincount(train_x[..., c].ravel(), minlength=256) for c in range(3)]) / train_x[..., 0].size
    mean = counts @ np.arange(256)
    std = np.sqrt(counts @ np.arange(256) ** 2 - mean**2)
    if not std.min() > 0:
        raise UserError("the training images are constant in one channel: nothing can be learnt from it")
    tensors = {k: tuple(torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in v) for k, v in splits.items()}
    tensors["mean"], tensors["std"] = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))
    return tensors


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
    """

    def __init__(self, c_in, c_out, kernel=3, stride=1, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(c_out, BN_EPS, BN_MOMENTUM)
        self.register_buffer("mask", torch.ones(c_out, dtype=torch.bool))
        self.register_buffer("bn_mask", torch.ones(c_out, dtype=torch.bool))
        self.register_buffer("act", torch.zeros(c_out))
        self.measure = False  # whether this forward pass updates act

    def forward(self, x, shortcut=None):
        """x (n, c_in, h, w), shortcut (n, c_out, h', w') or None → (n, c_out, h', w'); a pruned map is exactly 0.

        This is the one place that computes a block: another backend replaces this function and nothing else. Masking
        the parameters, not only the map, is what keeps the gradient of a pruned filter exactly 0.
        """
        weight = self.conv.weight * self.mask.view(-1, 1, 1, 1)
        a = F.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)
        a = F.batch_norm(a, self.bn.running_mean, self.bn.running_var, self.bn.weight * self.bn_mask,
                         self.bn.bias * self.bn_mask, self.training, self.bn.momentum, self.bn.eps)
        if shortcut is not None:
            a = a + shortcut * self.bn_mask.view(-1, 1, 1)
        if self.measure:
            self.act.mul_(ACT_KEEP).add_(a.detach().abs().mean((0, 2, 3), dtype=torch.float32), alpha=1 - ACT_KEEP)
        return F.relu(a, inplace=True)


class PaddedShortcut(nn.Module):
    """ResNet's option A: every second pixel, and zero maps around the old ones; no parameters."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.stride, self.before = stride, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.before, self.after))


class VGG(nn.Module):
    def __init__(self, maps, num_classes):
        super().__init__()
        layers, c_in = [], 3
        for c_out in maps:  # 0 stands for a 2x2 max-pool
            layers.append(Block(c_in, c_out, bias=True) if c_out else nn.MaxPool2d(2))
            c_in = c_out or c_in
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(c_in, num_classes)
        self.prunable = [layer for layer in layers if isinstance(layer, Block)]
        nn.init.normal_(self.linear.weight, 0, 0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(self.features(x).mean((2, 3)))  # 32x32 images end as 1x1 maps, larger ones are averaged


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

    def forward(self, x):
        x = self.stem(x)
        for (first, second), shortcut in zip(self.pairs, self.shortcuts):
            x = second(first(x), shortcut(x))
        return self.linear(x.mean((2, 3)))


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
    return model.to(memory_format=torch.channels_last)


# +--------------------------------------------------------------------------------------------------------------------+
# | Pruning: when (A.4), which filters (B), and how they go                                                            |
# +--------------------------------------------------------------------------------------------------------------------+

def prune_epochs(s, e, r):
    """The epochs (from 0) after whose training a layer is pruned: s, s+r, … up to e (A.4, see README, Deviations)."""
    return range(s, e + 1, r)


def kept_filters(n, p, n_iter):
    """How many of n filters survive iterations 1 … n_iter when a fraction p goes in the end (A.4), exactly: a list.

    p is read as the decimal number it prints as, so that (1 - 0.3) * 10 is 7 and not the ceiling of 7.000000000000001.
    """
    m = math.ceil((1 - Fraction(str(p))) * n)
    return [math.ceil(m + Fraction((n - m) * (n_iter - j), n_iter)) for j in range(1, n_iter + 1)]


def ebn_score(gamma, beta, signed=False):
    """E[max(0, M)] for M ~ N(beta, |gamma|), |gamma| the standard deviation (B.2.1); a float64 tensor.

    With u = |beta/gamma| it is max(beta, 0) + |gamma| (phi(u) - u Phi(-u)), whose bracket is phi(u) times one minus a
    Mills ratio: erfcx keeps its relative accuracy where Phi itself would have rounded to 0. signed puts gamma for
    |gamma| (B.2.3), which for gamma < 0 makes it -E[max(0, -M)]. gamma = 0 gives max(beta, 0).
    """
    gamma, beta = gamma.detach().double(), beta.detach().double()
    negative = signed * (gamma < 0)
    scale = gamma.abs()
    beta = torch.where(negative, -beta, beta)
    u = torch.where(scale > 0, beta.abs() / scale, torch.inf).clamp(max=1e3)  # phi(40) is 0 already
    tail = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi) * (
        1 - u * math.sqrt(math.pi / 2) * torch.special.erfcx(u / math.sqrt(2)))
    score = beta.clamp(min=0) + scale * tail.clamp(min=0)
    return torch.where(negative, -score, score)


def filter_scores(block, method):
    """The score of each filter of `block`, (c_out,); method: one of l1, l2 (of the weights, A.4), act, ebn, ebn-signed."""
    weight = block.conv.weight.detach().flatten(1)
    if method == "l1":
        return weight.abs().sum(1)
    if method == "l2":
        return weight.square().sum(1).sqrt()
    if method == "act":
        return block.act.clone()
    if method in ("ebn", "ebn-signed"):
        return ebn_score(block.bn.weight, block.bn.bias, signed=method == "ebn-signed")
    raise UserError(f"no score {method}: choose from {', '.join(SCORES)}")


def select_filters(scores, mask, k, target, generator=None):
    """The k filters to prune among those live in mask (c,), as ascending indices (k,) on the CPU.

    target: "S" smallest scores, "L" largest, "R" uniformly random (by `generator`); of equal scores the lower index
    goes. Raises UserError if fewer than k are live or a score is not a number.
    """
    live = mask.cpu().nonzero().flatten()
    scores = scores.detach().cpu()[live]
    if k > len(live):
        raise UserError(f"cannot prune {k} of {len(live)} live filters")
    if scores.isnan().any():
        raise UserError("a filter's score is not a number: the run has diverged; lower --lr", 1)
    if target == "R":
        order = torch.randperm(len(live), generator=generator)
    elif target in ("S", "L"):
        order = torch.sort(scores, stable=True, descending=target == "L").indices
    else:
        raise UserError(f"no target {target}: choose S, L or R")
    return live[order[:k]].sort().values


@torch.no_grad()
def prune_block(block, indices, keep_bn=False):
    """Removes filters `indices` of `block` for good: weights, bias, batch norm's scale and shift and shortcut become 0.

    With keep_bn only the convolution weights go (D.1's Prune_L).
    """
    indices = indices.to(block.mask.device)
    block.mask[indices] = False
    block.conv.weight[indices] = 0
    if not keep_bn:
        block.bn_mask[indices] = False
        block.bn.weight[indices] = 0
        block.bn.bias[indices] = 0
        if block.conv.bias is not None:
            block.conv.bias[indices] = 0


def forget_filters(optimizer, block, indices, keep_bn):
    """Clears the optimiser's memory of pruned filters: what is left of their momentum would move the zeros again."""
    params = [block.conv.weight] if keep_bn else [*block.conv.parameters(), *block.bn.parameters()]
    for param in params:
        for value in optimizer.state[param].values():
            if torch.is_tensor(value) and value.shape == param.shape:
                value[indices.to(value.device)] = 0


def pruning_plan(model, args, times):
    """One entry per pruned layer: its index in model.prunable, and survivors by epoch, {epoch: filters kept}.

    --scratch prunes at epoch -1, before the first; no target gives no entries.
    """
    if args.target == "none":
        return []
    plan = []
    for i, p in enumerate(args.p):
        layer = len(model.prunable) - len(args.p) + i
        epochs = [-1] if args.scratch else prune_epochs(times["s"][i], times["e"][i], times["r"])
        n = len(model.prunable[layer].mask)
        plan.append((layer, dict(zip(epochs, kept_filters(n, p, len(epochs))))))
    return plan


# +--------------------------------------------------------------------------------------------------------------------+
# | Noise in place of pruning (D): the schedule picks filters as usual, but they stay and are noised for a while        |
# +--------------------------------------------------------------------------------------------------------------------+

def new_noise(block):
    """The noise state of a layer: filters ever targeted, those noised now, passes noised, and what to put back."""
    return {"targeted": torch.zeros_like(block.mask, device="cpu"), "active": None, "calm": 0, "test": 0, "train": 0,
            "backup": None}


def noised_tensors(block, args):
    """What the noise changes in a block; all are indexed by filter. Restoring also covers the running statistics."""
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
        for tensor in noised_tensors(block, args)[:3]:
            tensor.index_fill_(0, active, 0)


def end_noise_if_due(block, state, args):
    """Called after every batch, that is after the optimiser's step: K = 1 is a single pass, else K training passes."""
    if state["active"] is not None and (args.noise_batches == 1 or state["train"] == args.noise_batches):
        end_noise(block, state, args)


@torch.no_grad()
def end_noise(block, state, args):
    if state["active"] is not None and args.noise_restore:
        for tensor, value in zip(noised_tensors(block, args), state["backup"]):
            tensor[state["active"]] = value
    state.update(active=None, backup=None)


# +--------------------------------------------------------------------------------------------------------------------+
# | Files: all writes are atomic, one process per run directory                                                        |
# +--------------------------------------------------------------------------------------------------------------------+

def write_atomically(path, content):
    """Writes bytes to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path} ({error.strerror}): make room or choose another folder, then start the "
                        "same command again", 1) from None


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def append_line(path, line):
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): make room, then start the same command again; the "
                        "checkpoint holds what is missing", 1) from None


def lock_directory(directory):
    """Takes the run directory for this process; the lock goes with the process, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    except OSError as error:
        raise UserError(f"cannot write to {directory} ({error.strerror}): choose another --log-dir", 1) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{directory} is in use by another process: wait for it, or choose another --seed", 1) from None
    return lock


def describe_run(args, data, model, times, plan, device):
    """config.json: every option, the schedule it gives, the constants behind it, the data, machine and versions."""
    method, setting = run_name(args)
    fractions = [Fraction(str(p)) / len(kept) for p, (_, kept) in zip(args.p or [], plan)]
    here = pathlib.Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "method": method, "setting": setting, "options": options_of(args), "schedule": times,
        "pruned_layers": [{"layer": layer, "filters": len(model.prunable[layer].mask), "kept": list(kept.values()),
                           "epochs": list(kept)} for layer, kept in plan],
        "iterative_rate": float(100 * max(fractions)) if fractions else 0.0,  # %, the largest of any layer (A.4)
        "parameters": sum(p.numel() for p in model.parameters()),
        "constants": {"momentum": MOMENTUM, "bn_momentum": BN_MOMENTUM, "bn_eps": BN_EPS, "act_keep": ACT_KEEP,
                      "act_every": ACT_EVERY, "crop_padding": CROP_PADDING, "adam_betas": [0.9, 0.999],
                      "adam_eps": 1e-8},
        "data": {"train": len(data["train_x"]) - args.val_split, "val": args.val_split, "test": len(data["test_x"]),
                 "classes": len(data["classes"]), "image": list(data["train_x"].shape[1:]),
                 "crc32": [zlib.crc32(np.ascontiguousarray(data[k])) for k in ("train_x", "train_y", "test_x", "test_y")]},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(), "machine": platform.machine(), "git": git.stdout.strip() or None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def options_of(args):
    return {k: v for k, v in vars(args).items() if k not in NOT_THE_RESULT}


def check_same_run(directory, config):
    """Refuses to continue a directory whose config.json says another experiment or other data."""
    try:
        old = json.loads((directory / "config.json").read_text())
        different = [k for k in config["options"] if old["options"].get(k) != config["options"][k]]
        different += ["data"] * (old["data"] != config["data"]) + ["schedule"] * (old["schedule"] != config["schedule"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{directory}/config.json is damaged: move the directory away to train this run afresh") from None
    if different:
        raise UserError(f"{directory} holds a run with another {', '.join(different)}: move it away or choose another "
                        "--log-dir")


def save_checkpoint(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it to train this run afresh; the lines in "
                        "epochs.jsonl are kept until then", 1) from None


def summarize_epochs(records):
    """What a run's epoch records say (DESIGN, section 6), as a dict; percentages throughout.

    best_acc, best_epoch: the best test accuracy from the last pruning event on, that epoch included; gap: training
    minus test accuracy there; last_acc; val_chosen_acc: test accuracy at the best validation epoch (None without
    one); mean_stability: over the events that removed (or noised) at least one filter, 100 without any.
    """
    events = [r for r in records if r["epoch"] >= 0 and any(r["removed"])]
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

@torch.no_grad()
def evaluate(model, data, split, args, noise_hooks=None):
    """Accuracy in % on a split, in eval mode; the value is read back from the device once."""
    before, after = noise_hooks or (None, None)
    model.eval()
    x, y = data[split]
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), args.test_batch_size):
        batch = slice(start, start + args.test_batch_size)
        if before:
            before(training=False)
        with autocast(args, x.device):
            logits = model(normalise(x[batch], data))
        if after:
            after()
        correct += (logits.argmax(1) == y[batch]).sum()
    return 100 * correct.item() / len(x)


def autocast(args, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def train_epoch(model, data, optimizer, args, generators, noise_hooks, step, bar):
    """One pass over the training data; returns (mean loss, accuracy in %, next step), read from the device at the end."""
    before, after = noise_hooks or (None, None)
    model.train()
    x, y = data["train"]
    device, n = x.device, len(x)
    order = torch.randperm(n, generator=generators["order"]).to(device)
    if args.augment:
        padded = data["padded"]
        offsets, flips = (t.to(device) for t in draw_crops(n, generators["augment"]))
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, n, args.batch_size):
        index = order[start:start + args.batch_size]
        if args.augment:
            batch = slice(start, start + args.batch_size)
            images = crop_and_flip(padded, index, offsets[:, batch], flips[batch])
        else:
            images = x[index]
        labels = y[index]
        step += 1
        for block in model.prunable:
            block.measure = args.score == "act" and step % ACT_EVERY == 0
        if before:
            before(training=True)
        with autocast(args, device):
            logits = model(normalise(images, data))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if after:
            after()
        totals += torch.stack([loss.detach() * len(index), (logits.detach().argmax(1) == labels).sum()])
        bar.update()
    for block in model.prunable:
        block.measure = False
    loss, accuracy = (totals / n).tolist()
    return loss, 100 * accuracy, step


def make_optimizer(model, args):
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    return torch.optim.SGD(model.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, fused=True)


def prune_now(model, optimizer, args, plan, epoch, noise, generators):
    """Runs the pruning (or noising) iterations of `epoch`; returns {layer: indices} of the filters that go now."""
    gone = {}
    for (layer, kept), state in zip(plan, noise):
        block = model.prunable[layer]
        live = block.mask.cpu() if args.noise == "none" else ~state["targeted"]
        k = int(live.sum()) - kept.get(epoch, len(live))
        if k <= 0:
            continue
        if args.noise != "none":
            end_noise(block, state, args)  # scores are taken of the network itself
        indices = select_filters(filter_scores(block, args.score), live, k, args.target, generators["target"])
        if args.noise != "none":
            start_noise(block, state, indices, args)
        else:
            prune_block(block, indices, args.prune_bn == "keep")
            forget_filters(optimizer, block, indices, args.prune_bn == "keep")
        gone[layer] = indices.tolist()
    return gone


def filters_due(model, args, plan, epoch, noise):
    """Whether any filter goes after this epoch; an iteration with nothing to remove is a no-op (A.4)."""
    for (layer, kept), state in zip(plan, noise):
        live = int(model.prunable[layer].mask.sum() if args.noise == "none" else (~state["targeted"]).sum())
        if kept.get(epoch, live) < live:
            return True
    return False


def train(args, bar=None):
    """Trains, prunes and logs one run as `args` (from parse_options) say; returns its summary (summarize_epochs)."""
    directory = run_directory(args)
    label = "/".join(directory.parts[-3:])
    if (directory / "done.json").exists():
        print(f"{directory}: finished already", flush=True)
        return None
    device = choose_device(args)
    lock = lock_directory(directory)
    arrays = load_data(args.dataset, args.data_dir)
    data = put_on_device(arrays, device, args.val_split)
    if args.augment:
        data["padded"] = F.pad(data["train"][0], (0, 0, *[CROP_PADDING] * 4))

    # One generator per source of randomness: runs with the same seed share initial weights, order and augmentation.
    torch.manual_seed(args.seed)
    model = build_model(args.model, len(arrays["classes"]), args.width).to(device)
    optimizer = make_optimizer(model, args)
    generators = {}
    for i, name in enumerate(("order", "augment", "target", "noise")):
        seed = int(np.random.SeedSequence((args.seed, i)).generate_state(1)[0])
        generators[name] = torch.Generator(device if name == "noise" else "cpu").manual_seed(seed)
    times = schedule(args)
    plan = pruning_plan(model, args, times)
    noise = [new_noise(model.prunable[layer]) for layer, _ in plan]
    noise_hooks = None
    if args.noise != "none":
        noised = [(model.prunable[layer], state) for (layer, _), state in zip(plan, noise)]
        noise_hooks = (lambda training: [noise_pass(b, s, args, generators["noise"], training) for b, s in noised],
                       lambda: [end_noise_if_due(b, s, args) for b, s in noised])

    config = describe_run(args, arrays, model, times, plan, device)
    del arrays
    first_epoch, step, lines = 0, 0, []
    checkpoint_path = directory / "checkpoint.pt"
    if checkpoint_path.exists():
        check_same_run(directory, config)
        first_epoch, step, lines = resume(checkpoint_path, model, optimizer, generators, noise, device)
        print(f"{label}: continues after epoch {first_epoch} of {times['epochs']}", flush=True)
    else:
        write_json(directory / "config.json", config)
        if args.scratch:
            prune_now(model, optimizer, args, plan, -1, noise, generators)
    write_atomically(directory / "epochs.jsonl", "".join(line + "\n" for line in lines).encode())
    records = [json.loads(line) for line in lines]

    batches = math.ceil(len(data["train"][0]) / args.batch_size)
    bar = tqdm(total=times["epochs"] * batches, initial=first_epoch * batches, desc=label, leave=True, mininterval=0.5,
               disable=not (sys.stderr.isatty() and sys.stdout.isatty()),
               bar_format="{desc} |{bar:20}| {percentage:3.0f}% {postfix} {remaining} left")
    started = time.monotonic()
    for epoch in range(first_epoch, times["epochs"]):
        clock = time.monotonic()
        lr = args.lr * 0.1 ** sum(epoch >= x for x in times["lrs"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, train_acc, step = train_epoch(model, data, optimizer, args, generators, noise_hooks, step, bar)
        if not math.isfinite(loss):
            raise UserError(f"{directory}: the loss is {loss} in epoch {epoch}: lower --lr (now {lr:g}); the checkpoint "
                            "of the epoch before is kept", 1)

        gone, due = {}, filters_due(model, args, plan, epoch, noise)
        test_acc = before = evaluate(model, data, "test", args, noise_hooks)
        if due:
            gone = prune_now(model, optimizer, args, plan, epoch, noise, generators)
        if due or noise_hooks:
            test_acc = evaluate(model, data, "test", args, noise_hooks)
        val_acc = evaluate(model, data, "val", args) if args.val_split else None

        record = {
            "epoch": epoch, "lr": lr, "train_loss": loss, "train_acc": train_acc, "test_acc_before": before,
            "test_acc": test_acc, "val_acc": val_acc,
            "stability": 100 * test_acc / before if gone and before else None,
            "removed": [len(gone.get(layer, ())) for layer, _ in plan],
            "live": [int(block.mask.sum()) for block in model.prunable], "filters": gone,
            "noised": [{"test": s["test"], "train": s["train"], "active": s["active"] is not None} for s in noise]
            if noise_hooks else None,
            "seconds": round(time.monotonic() - clock, 3)}
        records.append(record)
        lines.append(json.dumps(record))
        save_checkpoint(checkpoint_path, {
            "format": 1, "epoch": epoch + 1, "step": step, "model": model.state_dict(), "log": lines,
            "optimizer": optimizer.state_dict(), "noise": noise,
            "generators": {name: g.get_state() for name, g in generators.items()}})
        append_line(directory / "epochs.jsonl", lines[-1])  # after the checkpoint, which can rebuild it
        if epoch + 1 == times["save_epoch"]:
            save_checkpoint(directory / f"epoch{epoch + 1}.pt", {"format": 1, "epoch": epoch + 1,
                                                                 "model": model.state_dict()})
        report(label, record, records, times["epochs"], started, first_epoch, bar)
    bar.close()

    summary = summarize_epochs(records)
    write_json(directory / "done.json", summary)
    lock.close()
    print(f"{label}: best accuracy {summary['best_acc']:.2f}% (epoch {summary['best_epoch']}), last "
          f"{summary['last_acc']:.2f}%, mean stability {summary['mean_stability']:.2f}% over {summary['events']} pruning "
          "events", flush=True)
    return summary


def resume(path, model, optimizer, generators, noise, device):
    """Puts a run back to where its checkpoint was written; returns (next epoch, step, log lines)."""
    state = load_checkpoint(path)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for name, generator in generators.items():
            with contextlib.suppress(RuntimeError if generator.device.type != "cpu" else ()):
                generator.set_state(state["generators"][name])
        for layer_state, saved in zip(noise, state["noise"], strict=True):
            layer_state.update(saved)
            for key in ("active", "backup"):
                value = layer_state[key]
                layer_state[key] = [t.to(device) for t in value] if isinstance(value, list) else \
                    value if value is None else value.to(device)
        return state["epoch"], state["step"], state["log"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not fit this run or version ({str(error).splitlines()[0]}): delete it to train "
                        "afresh", 1) from None


def report(label, record, records, epochs, started, first_epoch, bar):
    """One epoch for whoever watches: the bar on a terminal, a plain line in a file."""
    done = record["epoch"] + 1
    stability = summarize_epochs(records)["mean_stability"]
    if not bar.disable:
        bar.set_postfix_str(f"epoch {done}/{epochs} test {record['test_acc']:.2f}% stability {stability:.2f}%")
        return
    minutes = (time.monotonic() - started) / (done - first_epoch) * (epochs - done) / 60
    event = f" -> {record['test_acc']:.2f}% ({sum(record['removed'])} filters)" if any(record["removed"]) else ""
    print(f"{label} epoch {done}/{epochs} lr {record['lr']:g} loss {record['train_loss']:.4f} train "
          f"{record['train_acc']:.2f}% test {record['test_acc_before']:.2f}%{event} stability {stability:.2f}% "
          f"{record['seconds']:.1f} s, {minutes:.0f} min left", flush=True)


# +--------------------------------------------------------------------------------------------------------------------+
# | Entry                                                                                                              |
# +--------------------------------------------------------------------------------------------------------------------+

def choose_device(args):
    """The torch device, with precision and determinism set; UserError where the machine lacks what was asked."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device here: use --device cpu, or check the driver")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.precision == "tf32" and device.type == "cpu":
        raise UserError("--precision tf32 needs a CUDA device: use fp32 on the CPU")
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return device


def keep_freed_memory():
    """Tells glibc to keep freed activations: it would give them back each step, and page faults cost a fifth of it."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no shrinking of the heap


def print_plan(path):
    """--plan: how many of the runs listed in a file are left, on stderr; their lines, each once, on stdout."""
    try:
        lines = [line.strip() for line in open(path) if line.strip()]
    except OSError as error:
        raise UserError(f"--plan {path}: {error.strerror}") from None
    finished = begun = epochs = 0
    left = {}
    for line in lines:
        args = parse_options(shlex.split(line))
        directory = run_directory(args)
        if directory in left:
            continue
        left[directory] = None
        if (directory / "done.json").exists():
            finished += 1
            continue
        done = 0
        if (directory / "epochs.jsonl").exists():
            done = (directory / "epochs.jsonl").read_bytes().count(b"\n")
        begun += done > 0
        epochs += schedule(args)["epochs"] - done
        left[directory] = line
    todo = [line for line in left.values() if line]
    print(f"{len(left)} runs: {finished} finished, {begun} half-done; to do now: {len(todo)} runs, {epochs:,} epochs",
          file=sys.stderr)
    print("\n".join(todo))


def main(argv=None):
    try:
        args = parse_options(sys.argv[1:] if argv is None else argv)
        if args.plan:
            print_plan(args.plan)
        else:
            keep_freed_memory()
            train(args)
        return 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.code
    except torch.OutOfMemoryError:
        print("train.py: the GPU's memory is full: lower --batch-size or wait for other programs; the same command "
              "continues this run", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command continues this run", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
