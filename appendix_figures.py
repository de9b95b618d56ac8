"""What only the paper's appendix needs: flatness of a run's weights (E), Figures B1, D1, E1, E2, E4
and the Hessian's density, and Tables C1 and F1. Then the table and figure of docs/depth.md.

Groups are the runs of a figure by method, {method: [run]}; a run is a dict from analyze.summarize.
"""
import contextlib
import copy
import io
import itertools
import json
import math
import pathlib
import tempfile
import time
import zlib

import numpy as np
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import train
from gst_ext import export, flatness, ops, plots
from gst_ext.datasets import BUILT_IN
from gst_ext.errors import UserError, check, first_line, print_line
from gst_ext.networks import OWN_NETWORKS, VGG, Block, ResNet, build_model, set_backend
from gst_ext.plots import BLUE, GREEN, ORANGE, PINK, RED, SKY, matplotlib
from gst_ext.rundir import environment, load_checkpoint, read_config, write_json
from gst_ext.statistics import (
    format_mean, format_test, holm, mean_ci, nan_to_none, paired_test, summary_stats, t_test)

MEASURES = {  # of flatness
    "trace_eigs": "Tr(H), leading eigenvalues", "tr_f": "Tr(H)", "tr_c": "Tr(C)",
    "tic": "TIC proxy", "c_over_f": "Tr(C)/Tr(H)",
    "epsilon_min": "|ε| at a loss rise of 0.1", "top": "λ₁, the leading eigenvalue"}
FORMS = ("", "adaptive_")
SUMMARY = {  # of tables: {field: (head, digits)}
    "best_acc": ("best accuracy", 2), "last_acc": ("last accuracy", 2),
    "mean_stability": ("mean stability", 3)}
MOVED = 0.05  # a panel mentions larger relative changes by rescaling
# Parts of methods' names: Table C.1's 59%, and the methods of Table F.1.
HIGH = "-p0.25,0.8,0.25,0.95"
INIT, SMALLEST, LARGEST = (f"{method}-p0,0,0,0.7" for method in (
    "scratch-S-ebn-signed", "S-r750-ebn-signed-s2500x4-e3250x4",
    "L-r750-ebn-signed-s2500x4-e3250x4"))
PAPER = {  # {(output, model): {method as train.run_name names it: what the appendix reports, in %}}
    ("2", "resnet18"): {
        "S-r4": {"best_acc": 87.65, "best_acc_sd": 0.26, "stability": 99.957},
        "S-r40": {"best_acc": 87.72, "best_acc_sd": 0.18, "stability": 99.470},
        "L-r40": {"best_acc": 88.03, "best_acc_sd": 0.26, "stability": 98.904}},
    ("B2", "vgg11"): {
        "S-r4": {"stability": 99.98}, "S-r40": {"stability": 99.81},
        "L-r40": {"stability": 97.67}, "pearson": [-0.88, 1.2e-10], "kendall": [-0.64, 8.4e-07]},
    ("B2", "resnet18"): {
        "S-r4": {"stability": 99.96}, "S-r40": {"stability": 98.14},
        "L-r40": {"stability": 96.66}, "pearson": [-0.65, 5e-05], "kendall": [-0.43, 0.00061]},
    ("C3", "resnet18"): {
        "none": {"best_acc": 94.35}, "S-r1-s24x16": {"best_acc": 94.41, "stability": 99.93},
        "S-r1-s24x16-p0.06x16": {"best_acc": 94.25, "stability": 99.96}},
    ("table C1", "resnet18"): {  # (total pruning, accuracy, its sd, stability, its sd)
        "S-r4": (46, 87.65, 0.26, 99.957, 0.006), "S-r4" + HIGH: (59, 87.52, 0.11, 99.935, 0.012),
        "S-r40": (46, 87.72, 0.18, 99.470, 0.203),
        "S-r40" + HIGH: (59, 87.95, 0.18, 98.912, 0.303),
        "L-r40": (46, 88.03, 0.26, 98.904, 0.229),
        "L-r40" + HIGH: (59, 87.48, 0.37, 98.143, 0.434)},
    ("table F1", "resnet18"): {
        "none": (0, 73.28, 0.12, 100, None), INIT: (15, 73.11, 0.13, 100, None),
        SMALLEST: (15, 73.22, 0.09, 91.94, 4.10), LARGEST: (15, 73.41, 0.08, 86.98, 6.87)},
}


# +-- Flatness (E) of a run's checkpoint, kept in the run's directory -----------------------------+

def load_network(directory, data_dir="data", device="cpu", checkpoint=None):
    """Loads a run's network and its data.

    Args:
        checkpoint: A file in the directory; by default epoch<save_epoch>.pt if there is one, else
            the last checkpoint of a finished run.

    Returns:
        The network in eval mode, train.prepare_data's tensors with the names of the "classes",
        and {"checkpoint", "crc32", "epoch"} of the weights.
    """
    directory = pathlib.Path(directory)
    check((directory / "config.json").exists(), f"{directory} is no run: name a directory "
          "with config.json, such as logs/cifar10/vgg11/L-r40/seed1")
    config = read_config(directory)
    try:
        options = train.DEFAULTS | config["options"]
        name, crc32, dataset = options["model"], config["data"]["crc32"], options["dataset"]
        epoch = config["schedule"]["save_epoch"]
        own = {"crc32": None, "file": None} | (config.get("own_model") or {})
    except (KeyError, TypeError):
        raise UserError(f"{directory}/config.json is damaged") from None
    known = name in OWN_NETWORKS and train.OWN_MODELS[name]["crc32"] == own["crc32"]
    check(known or not own["file"], f"{directory} has a network of your own: add --model "
          f"{own['file']}:{name}, the file as it was when the run was trained")
    if not checkpoint:
        checkpoint = f"epoch{epoch}.pt"
        if not epoch or not (directory / checkpoint).exists():
            check((directory / "done.json").exists(), f"{directory} is not finished"
                  + f", and has no {checkpoint}" * bool(epoch) + ": continue the run first")
            checkpoint = "checkpoint.pt"
    if dataset not in BUILT_IN and not pathlib.Path(dataset).exists():
        dataset = config.get("data_path", dataset)  # a path relative to another folder
    (arrays, info), path = train.load_arrays(dataset, data_dir), directory / checkpoint
    check(info["crc32"] == crc32, f"{directory} was trained on other data than {dataset} is now: "
          "put its own back, or see --data-dir")
    try:
        state = load_checkpoint(path, mmap=True)
        model = build_model(name, len(arrays["classes"]), options["width"])
        model.load_state_dict(state["model"], assign=True)
        source = {"checkpoint": checkpoint, "crc32": zlib.crc32(np.memmap(path)),
                  "epoch": int(state["epoch"])}
    except Exception as error:  # zip, pickle and torch raise their own kinds for a damaged file
        raise UserError(f"{path} is missing or damaged ({first_line(error)}): train the run "
                        "again") from None
    data = train.prepare_data(arrays, device, **{
        k: options[k] for k in train.DATA_OPTIONS if k != "augment"})
    return model.to(device).eval(), data | {"classes": arrays["classes"].tolist()}, source


def flatness_path(directory, split):
    return pathlib.Path(directory, "flatness.json" if split == "test" else f"flatness-{split}.json")


def live_part(model):
    """Returns a network without what is pruned, whose Hessian is H without rows that are 0.

    Returns:
        export.compact's network, or the model itself if it is of another kind or keeps a pruned
        filter's batch norm, and the places (n,), int64, of its parameters among the model's.
    """
    n = sum(p.numel() for p in model.parameters())
    places = torch.arange(n, dtype=torch.float64, device=model.linear.weight.device)
    if type(model) not in (VGG, ResNet) or not all(
            torch.equal(block.mask, block.bn_mask) for block in model.prunable):
        return model, places.long()
    numbered = copy.deepcopy(model).double()
    nn.utils.vector_to_parameters(places, numbered.parameters())
    return export.compact(model), flatness.flat(export.compact(numbered).parameters()).long()


def measure_flatness(directory, split, images, num_eigs, eigensolver, memory_gb, control, data_dir):
    """Measures a run's checkpoint on the first images of a split, in float32, and returns what it
    writes to flatness_path (docs/flatness.md), unless the file holds this measurement already."""
    path, seconds, device = flatness_path(directory, split), {}, train.setup_device()
    label = "/".join(path.absolute().parts[-4:-1])
    model, data, source = load_network(directory, data_dir, device)
    settings = {"version": 4, **source, "mode": "eval", "split": split, "images": images,
                "dtype": "float32", "seed": 0, "eig": eigensolver, "eigs": num_eigs}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # damaged: measure again
        old = json.loads(path.read_text())
        if {k: old.get(k) for k in settings} == settings and (not control or old.get("control")):
            print_line(f"{path}: measured already")
            return old
    x, y = (tensor[:images] for tensor in data[split])
    check(len(x) == images, f"--images {images}, but there are {len(x)} {split} images: give fewer")
    x = train.normalise(x, data)
    ops.keep_freed_memory()
    bar = tqdm(desc=label, unit=" Hessian-vector products", disable=None)

    @contextlib.contextmanager
    def stage(name):
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 3)
        bar.write(f"{label} {name}: {seconds[name]:.1f} s")

    live, places = live_part(model)
    fast = set_backend(copy.deepcopy(model), "ext") if ops.available else model
    num_parameters = sum(p.numel() for p in model.parameters())

    def line_loss(direction):  # by the extension, if it is built, which is faster
        whole = direction.new_zeros(num_parameters).index_copy_(0, places, direction)
        return flatness.loss_along(fast, x, y, whole)

    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(128)])
    loss = float(F.cross_entropy(logits, y))
    check(math.isfinite(loss), f"{directory}: the loss of {source['checkpoint']} is {loss}")
    arguments = {"eigensolver": eigensolver, "memory_gb": memory_gb, "on_product": bar.update}
    try:
        with bar:
            result = flatness.measure(live, x, y, num_eigs, stage=stage, line_loss=line_loss,
                                      **arguments)
            if control:
                with stage("control"):
                    result["control"] = flatness.rescaling_control(live, x, y, **arguments)
    except ValueError as error:
        raise UserError(f"{directory}: {error}") from None
    machine = environment(device, "eager", __file__)
    result = settings | result | {
        "loss": loss, "accuracy": 100 * float((logits.argmax(1) == y).double().mean()),
        "seconds": seconds, "memory_gb": memory_gb,
        "parameters": len(places),
        **{k: machine[k] for k in ("device", "threads", "git")},
        "versions": machine["versions"] | {"scipy": scipy.__version__}}
    write_json(path, result)
    print_line(f"{label}: λ1 {max(result['eigenvalues'], key=abs, default=math.nan):.4g}, "
               f"{sum(result['converged'])} of {num_eigs} pairs converged, "
               f"Tr(H) {result['tr_f']:.4g}, Tr(C) {result['tr_c']:.4g}")
    return result


FLATNESS_SETTINGS = "version", "images", "eig", "epoch", "eigs"  # equal where runs are pooled
PAIRS_USED = {"trace_eigs": math.inf, "tic": math.inf, "epsilon_min": flatness.DIRECTIONS,
              "top": 1}


def measure_of(flat, name):
    """Returns a measure of flatness.json's dict, or None: "top" is the leading eigenvalue,
    "adaptive_..." the adaptive form."""
    if name.startswith("adaptive_"):
        return measure_of(flat.get("adaptive", {}), name.removeprefix("adaptive_"))
    return next(iter(flat.get("eigenvalues", ())), None) if name == "top" else flat.get(name)


def num_pairs_asked(flat):
    """Returns how many eigenpairs were asked for, at most one for each parameter."""
    return min(flat.get("eigs", len(flat["converged"])), flat.get("parameters", math.inf))


def share_converged(flat, name):
    """Returns the share of converged pairs among the eigenpairs asked for that a measure is made
    of, 1 if it is made of none."""
    kind = name.removeprefix("adaptive_")
    if kind not in PAIRS_USED:
        return 1.0
    used = min(num_pairs_asked(flat), PAIRS_USED[kind])
    return sum(measure_of(flat, name.replace(kind, "converged"))[:used]) / max(1, used)


def moved_by_rescaling(flat, *names):
    """Returns the largest relative change of these measures in the rescaling control, or None."""
    control = flat.get("control", {})
    changes = [abs(value / own - 1) for name in names for a in control
               for own, value in [(measure_of(control["1"], name), measure_of(control[a], name))]
               if own and value is not None]
    return max(changes, default=None)


def describe_flatness(found, asked):
    """Describes several networks' flatness in a title's words; `asked` is the command's --eigs."""
    first, k = found[0], min(len(flat["eigenvalues"]) for flat in found)
    share = sum(sum(flat["converged"]) for flat in found) / max(1, sum(map(num_pairs_asked, found)))
    method = " by the power method" * (first.get("eig") == "power")
    return (f"{k} eigenpairs{method}" + f" ({asked} asked)" * (asked != k) + f", {100 * share:.3g}%"
            f" converged, on {first['images']} {first.get('split', 'test')} images")


def read_flatness(directory, split, measure, images=None):
    """Returns what a run's flatness adds to its dict, or {"problem": why it is not drawn}; a run
    without a file is measured by measure(directory). Any number of images will do for None."""
    path = flatness_path(directory, split)
    try:
        flat = json.loads(path.read_text()) if path.exists() else measure(directory)
        weights = path.with_name(str(flat.get("checkpoint")))
        check(not weights.is_file() or zlib.crc32(np.memmap(weights)) == flat.get("crc32"),
              f"{path.name} is of other weights than {weights.name}: measure it again")
        check(images in (None, flat.get("images")), f"{path.name} is of {flat.get('images')} "
              f"images, not {images}: measure it again, or leave --images out")
        check(any(flat["converged"]),
              f"none of the eigenpairs in {path.name} converged: measure it again")
        return {"flat": flat, "converged": float(np.mean(flat["converged"])), **{
            form + name: measure_of(flat, form + name)
            for name in MEASURES for form in FORMS}}
    except UserError as error:
        return {"problem": str(error)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return {"problem": f"{path.name} is damaged ({type(error).__name__}): delete it"}


def flatness_notes(axis, points, x, y):
    """Marks runs whose eigenpairs have not all converged; returns how far rescaling the network
    moves x or y in each run, and notes for the axis."""
    measured, notes = [run for run in points if "flat" in run], []
    doubtful = [(run[x], run[y]) for run in measured if any(
        share_converged(run["flat"], name) < 1 for name in (x, y))]
    if doubtful:
        axis.plot(*zip(*doubtful), "o", color="white", ms=1.5, mew=0)
        notes.append("white dot: some pairs not converged")
    moved = [moved_by_rescaling(run["flat"], x, y) for run in measured]
    largest = max(filter(None, moved), default=0)
    if largest > MOVED:
        notes.append(f"† rescaling moves it by {100 * largest:.0f}%")
    return moved, notes


def eigenvalues(models, first_ten):
    """Draws the first ten eigenvalues of the Hessian (E1), or the sizes of all computed (E2)."""
    groups, numbers = models["vgg11"], {}
    figure, (axis,) = plots.subplots(1, height=3.6, width=5.0)
    for i, (method, runs) in enumerate(groups.items()):
        count = min(10 if first_ten else math.inf,
                    *(len(run["flat"]["eigenvalues"]) for run in runs))
        values, converged = (np.array([run["flat"][name][:count] for run in runs])
                             for name in ("eigenvalues", "converged"))
        x = np.arange(1, count + 1) + first_ten * 0.12 * (i - (len(groups) - 1) / 2)
        numbers[method] = {
            **plots.plot_means(
                axis, x, mean_ci(values if first_ten else np.abs(values)), runs[0]["style"],
                len(runs), first_ten, label=runs[0]["label"], **{"ls": ""} if first_ten else {}),
            "n": len(runs), "negative": (values < 0).sum(0).tolist(),  # in how many runs
            "converged": converged.mean(0).tolist()}
    axis.set(xlabel="Eigenvalue, ordered by magnitude",
             ylabel="Eigenvalue" if first_ten else "|Eigenvalue|",
             yscale="linear" if first_ten else "log")
    plots.legend_below(axis, columns=2)
    return figure, {"vgg11": {"eigenvalues": numbers}}


def loss_along_eigenvectors(models):
    """Draws Figure E4: a panel for each method, a line for each eigenvector, means over runs."""
    groups, colours, numbers = models["vgg11"], matplotlib.colormaps["viridis"], {}
    figure, axes = plots.subplots(len(groups), 3, 2.3, 6.75 / min(3, len(groups)), sharex=True,
                                  sharey=True)
    for axis, (method, runs) in zip(axes, groups.items()):
        epsilon = runs[0]["flat"]["line"]["epsilon"]
        losses = np.mean(np.array([run["flat"]["line"]["loss"] for run in runs], float), 0)
        for i, loss in enumerate(losses):
            axis.plot(epsilon, loss, color=colours(i / 10), lw=0.9)
        split = runs[0]["flat"].get("split", "test").title()
        axis.set(title=f"{runs[0]['label']}, n = {len(runs)}", yscale="log", xlabel="ε",
                 ylabel=f"{split} loss")
        axis.label_outer()
        numbers[method] = {"n": len(runs), "epsilon": epsilon,
                           "loss": [nan_to_none(loss) for loss in losses]}
    norm = matplotlib.colors.BoundaryNorm(np.arange(0.5, 11), 256)
    figure.colorbar(matplotlib.cm.ScalarMappable(norm, colours), ax=figure.axes,
                    label="Eigenvector, by magnitude", ticks=range(1, 11), shrink=0.8)
    return figure, {"vgg11": {"lines": numbers}}


def spectra(models):
    """Draws the density of the Hessian's eigenvalues, means over runs on one grid."""
    groups, numbers = models["vgg11"], {}
    figure, (axis,) = plots.subplots(1, height=3.6, width=5.0)
    every = [run["flat"].get("density") for runs in groups.values() for run in runs]
    check(all(every), "a flatness.json without density: delete it to measure again")
    low, high = min(d["grid"][0] for d in every), max(d["grid"][-1] for d in every)
    step = min(d["width"] for d in every) / 2
    grid = np.linspace(low, high, max(400, math.ceil((high - low) / step)))
    for method, runs in groups.items():
        densities = [run["flat"]["density"] for run in runs]
        values = [np.interp(grid, d["grid"], d["density"], 0, 0) for d in densities]
        numbers[method] = {
            "n": len(runs), "lambda": nan_to_none(grid), "width": [d["width"] for d in densities],
            **plots.plot_means(axis, grid, mean_ci(values), runs[0]["style"], len(runs),
                               label=runs[0]["label"])}
    top = 3 * max(max(d["density"]) for d in every)
    axis.set(xlabel="Eigenvalue of the Hessian", ylabel="Density", yscale="log", ylim=(1e-8, top))
    plots.legend_below(axis, columns=2)
    return figure, {"vgg11": {"density": numbers}}


# +-- Figure B1: activations of a network before and after training -------------------------------+

@torch.no_grad()
def normalised_activations(model, layers, images):
    """Returns the convolution outputs of each layer, a Block or nn.Conv2d, as batch norm normalises
    them in training: flat arrays, without feature maps that are constant."""
    result = []

    def append(layer, inputs, output):
        y = layer.conv(inputs[0]) if isinstance(layer, Block) else output
        deviation, mean = torch.std_mean(y, (0, 2, 3), correction=0, keepdim=True)
        y = ((y - mean) / deviation)[:, deviation.flatten() > 1e-12]
        result.append(y.flatten().numpy())

    hooks = [layer.register_forward_hook(append) for layer in layers]
    model.train()(images)
    for hook in hooks:
        hook.remove()
    return result


def imagenet_networks(data_dir):
    """Returns run_networks for torchvision's ImageNet weights, on 32 enlarged CIFAR-10 images."""
    import torchvision
    try:
        trained = torchvision.models.vgg19_bn(weights="IMAGENET1K_V1")
    except Exception as error:
        raise UserError(
            "there is no finished VGG19 run, and torchvision's weights cannot be loaded "
            f"({first_line(error)}): train one with 'bash runs.sh figB1 --quick'") from None
    torch.manual_seed(0)
    x = torch.from_numpy(train.load_arrays("cifar10", data_dir)[0]["test_x"][:32])
    x = F.interpolate(x.permute(0, 3, 1, 2).float() / 255, 224, mode="bilinear")
    x = torchvision.transforms.functional.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    untrained = torchvision.models.vgg19_bn(weights=None)
    return (untrained, trained), nn.Conv2d, x, "torchvision's ImageNet weights"


def run_networks(run, data_dir):
    """Returns a run's (untrained, trained) networks, the type of their layers, images, a title."""
    trained, data, _ = load_network(run["dir"], data_dir, checkpoint="checkpoint.pt")
    torch.manual_seed(run["seed"])  # the initial weights, as train.make_generators does
    untrained = build_model("vgg19", trained.linear.out_features, run["options"].width)
    images = train.normalise(data["test"][0][:32], data)
    return (untrained, trained), Block, images, run["dir"]


def activation_histograms(models, data_dir):
    """Draws Figure B1 of a finished VGG19 run, or else of ImageNet's weights."""
    networks, kind, images, source = (run_networks(models["vgg19"]["none"][0], data_dir) if models
                                      else imagenet_networks(data_dir))
    figure, axes = plots.subplots(16, 2, 1.0, sharex=True)
    grid, layers = np.linspace(-4, 4, 81), []
    for column, when in enumerate(("before training", "after training")):
        last = [m for m in networks[column].modules() if isinstance(m, kind)][-8:]
        activations = normalised_activations(networks[column], last, images)
        for number, (axis, values) in enumerate(zip(axes[column::2], activations), 9):
            if len(values) > 10**5:  # the distance's sampling error is below 0.005
                values = np.random.default_rng(0).choice(values, 10**5, replace=False)
            distance = float(scipy.stats.kstest(values, "norm", method="asymp").statistic)
            axis.stairs(np.histogram(values, grid, density=True)[0], grid, fill=True, color=BLUE,
                        alpha=0.7)
            axis.plot(grid, scipy.stats.norm.pdf(grid), color=ORANGE, lw=1)
            axis.text(0.98, 0.9, f"conv {number}\nKS {distance:.3f}", ha="right", va="top",
                      fontsize=7, transform=axis.transAxes)
            layers.append({"when": when, "convolution": number, "ks": distance, "n": len(values)})
        axes[column].set_title(when)
        axes[column - 2].set_xlabel("Normalised activation")
    figure.supylabel("Density", fontsize=8)
    return figure, {"vgg19": {"run": source, "images": len(images), "layers": layers}}


# +-- Figure D1: one weight through pruning and noise ---------------------------------------------+

def weight_path(kind):
    """Trains VGG11 on digits for two epochs, after the first of which the largest quarter of the
    last layer's filters is changed (kind: "prune", "zero" or "gauss"); returns the value of a
    weight of these in the forward pass of every training batch."""
    weights, blocks = [], []

    def append(block, inputs):
        if isinstance(block, Block) and block.training:
            blocks.append(block)
            if len(blocks) > 7 and block is blocks[7]:  # VGG11's last convolution
                weights.append(block.conv.weight.detach()[:, 0, 1, 1].clone())

    hook = nn.modules.module.register_module_forward_pre_hook(append)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = train.parse_options((
            "--dataset digits --width 0.0625 --target L --s 0 --e 0 --r 1 --p 0.25 --epochs 2 "
            "--lrs 2 --batch-size 25 --device cpu --no-cuda-graphs"
            + f" --noise {kind} --noise-batches 15" * (kind != "prune")).split())
        options.log_dir = folder
        try:
            train.train(options)
        finally:
            hook.remove()
        log = (train.run_path(options) / "epochs.jsonl").read_text().splitlines()
    index = next(iter(json.loads(log[0])["filters"].values()))[0]
    return [float(values[index]) for values in weights]


def one_weight(models):
    """Draws Figure D1: the three paths are the same up to the event."""
    figure, axes = plots.subplots(3, 3, 2.4, 2.25, sharey=True)
    numbers = {"run": "VGG11, width 0.0625, digits, seed 1, 2 epochs of 40 batches, noise for 15 "
                      "batches"}
    for axis, (kind, title, colour) in zip(axes, (
            ("prune", "Pruning", RED), ("zero", "Zeroing", SKY), ("gauss", "Gaussian", ORANGE))):
        values = weight_path(kind)
        steps, event = list(range(1, len(values) + 1)), len(values) // 2
        axis.plot(steps, values, ".-", ms=2.5, lw=0.8, color=colour)
        axis.axvline(event + 0.5, color="0.5", lw=0.8, ls=":")
        axis.annotate("event", (event + 0.5, 1), (-3, -8), xycoords=("data", "axes fraction"),
                      fontsize=7, color="0.4", textcoords="offset points", ha="right")
        axis.set(title=title, xlabel="Training batch")
        numbers[kind] = {"step": steps, "weight": values, "event_after_step": event}
    axes[0].set_ylabel("One weight, as the network uses it")
    return figure, {"vgg11": numbers}


# +-- Tables C1 and F1 ----------------------------------------------------------------------------+

def total_pruned(run):
    """Returns the percentage of all parameters that went with a run's filters: their weights, and
    the slices of following pruned convolutions that read them, as in the paper (C.2, F)."""
    options, config, live = run["options"], run["config"], run["live"]
    pruned, total = {layer["layer"] for layer in config["pruned_layers"]}, 0
    with torch.device("meta"):
        model = build_model(options.model, config["data"]["classes"], options.width)
    for i in pruned:
        weight = model.prunable[i].conv.weight
        rest = live[i] / len(weight) * (live[i - 1] / weight.shape[1] if i - 1 in pruned else 1)
        total += weight.numel() * (1 - rest)
    return 100 * total / config["parameters"]


def draw_tables(*tables):
    """Draws tables below each other; each is a list of dicts, their keys the head."""
    letters = max(sum(max(len(str(cell)) for cell in column) for column in zip(
        rows[0], *(row.values() for row in rows))) for rows in tables)
    figure, axes = plots.subplots(
        len(tables), 1, 0.6 + 0.22 * (1 + max(map(len, tables))), 0.5 + 0.075 * letters)
    for axis, rows in zip(axes, tables):
        axis.axis("off")
        drawn = axis.table([list(row.values()) for row in rows], colLabels=list(rows[0]),
                           loc="upper center", cellLoc="center")
        drawn.set_in_layout(False)
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(7)
        drawn.auto_set_column_width(list(range(len(rows[0]))))
        for (row, _), cell in drawn.get_celld().items():
            cell.visible_edges = "B" if row == 0 else ""
    return figure


def means_table(models, paper, compared):
    """Draws a table of means and deviations, and of t-tests of the best accuracies.

    Args:
        paper: {method: what the paper has}, empty away from the paper's setting.
        compared: Whether the first of two methods is tested against the second, by their options.
    """
    groups, rows, t_tests, totals = models["resnet18"], [], {}, {}
    for method, runs in groups.items():
        totals[method], cells = summary_stats([total_pruned(run) for run in runs]), []
        for other, others in groups.items():
            if not compared(runs[0]["options"], others[0]["options"]):
                continue
            best, last = (t_test([run[name] for run in runs], [run[name] for run in others])
                          for name in ("best_acc", "last_acc"))
            t_tests[f"{method} against {other}"] = {**best, "by last_acc": last}
            if best["student"]:
                now, later = best["difference"], last["difference"]
                cells.append(f"{others[0]['label']}: {best['student'][1]:.2g}"
                             + f" ({now:+.2f}; last epoch {later:+.2f})" * (now * later < 0))
        row = {"method": runs[0]["label"], "pruned": f"{totals[method]['mean']:.0f}%",
               "n": len(runs)}
        row |= {f"{head} (%)": format_mean(summary_stats([run[name] for run in runs]), digits)
                for name, (head, digits) in SUMMARY.items()}
        row["p, two-tailed, against"] = "\n".join(cells) or "–"
        if paper:
            row["paper's"] = ("{1:.2f} ± {2}; {3:g}".format(*paper[method]) if method in paper
                              else "–")
        rows.append(row)
    return draw_tables(rows), {"resnet18": {"t_tests": t_tests, "total_pruned": totals}}


# +-- Depth of the drops or frequency of the events (docs/depth.md) -------------------------------+

COMPARED = ("last_acc", "best_acc", "mean_stability")
ALPHA = 0.05


def pruning_cells(groups):
    """Returns a list: {(r, target): {seed: run}} for each set of methods alike in all but these.

    The targets are ordered by depth: S, quantiles, R, L. Random ones go with every score.
    """
    cells = []
    for runs in groups.values():
        options = runs[0]["options"]
        if runs[0]["events"] and not options.scratch and options.noise == "none":
            same = str([options.s, options.e, options.p, options.prune_bn, options.optimizer])
            cells.append((same, options.score, (options.r, options.target), runs))
    cells.sort(key=lambda cell: ("SQRL".index(cell[2][1][0]), cell[2][1], cell[2][0]))
    sets = dict.fromkeys((same, score) for same, score, (_, target), _ in cells if target != "R")
    return [{key: {run["seed"]: run for run in runs} for same, score, key, runs in cells
             if same == wanted[0] and (score == wanted[1] or key[1] == "R")} for wanted in sets]


def compare_cells(cells, comparisons):
    """Tests differences of cells, paired by seed, with Holm's correction over the comparisons.

    Args:
        comparisons: [(name, where, cells to add up, cells to subtract)], keys of `cells`. Several
            are averaged seed by seed.

    Returns:
        A list of {"name", "where", "seeds", measure: paired_test and "p_holm"}.
    """
    found = []
    for name, where, plus, minus in comparisons:
        seeds = sorted(set.intersection(*(set(cells[key]) for key in plus + minus)))
        if seeds:
            found.append({"name": name, "where": where, "seeds": seeds, **{
                measure: paired_test(*([np.mean([cells[key][seed][measure] for key in side])
                                        for seed in seeds] for side in (plus, minus)))
                for measure in COMPARED}})
    for measure in COMPARED:
        for row, p in zip(found, holm([row[measure]["p"] for row in found])):
            row[measure]["p_holm"] = p
    return found


def depth_and_frequency(cells):
    """Compares targets at each r, and neighbouring r over the targets that both have.

    Returns:
        {"depth": {target: rows of compare_cells}, "frequency": rows, "answers": {kind: [where it is
        shown]}} by the rules of docs/depth.md, and a line on each answer.
    """
    periods = sorted({r for r, _ in cells})
    events = {key: {run["events"] for run in runs.values()} for key, runs in cells.items()}
    depth = {target: compare_cells(cells, [
        (f"Prune_{target} − Prune_S", f"r = {r}", [(r, target)], [(r, "S")]) for r in periods
        if (r, target) in cells and events[r, target] == events.get((r, "S"))])
        for target in dict.fromkeys(target for _, target in cells) if target != "S"}
    neighbours = [(often, rare, [t for r, t in cells if r == rare and (often, t) in cells])
                  for often, rare in zip(periods, periods[1:])]
    frequency = compare_cells(cells, [
        (f"r = {rare} − r = {often}", ", ".join(f"Prune_{t}" for t in targets),
         [(rare, t) for t in targets], [(often, t) for t in targets])
        for often, rare, targets in neighbours if targets])

    def significant(test):
        return test["p_holm"] is not None and test["p_holm"] < ALPHA

    deep, answers, lines = depth.get("L", []), {}, []
    asked = [row for row in deep if significant(row["mean_stability"])
             and row["mean_stability"]["mean"] < 0]
    for kind, rows, where in (("depth", asked, "where"), ("frequency", frequency, "name")):
        shown = [row for row in rows if significant(row["last_acc"])]
        answers[kind] = [row[where] for row in shown]
        parts = {"shown": [f"{row[where]} ({row['last_acc']['mean']:+.2f} points)"
                           for row in shown],
                 "not shown": [row[where] for row in rows if row not in shown],
                 "not asked, since Prune_L's drops are not shown to be deeper": [
                     row[where] for row in deep if kind == "depth" and row not in asked]}
        stated = [f"{part}: {', '.join(places)}" for part, places in parts.items() if places]
        lines.append(f"{kind}: {'; '.join(stated) or 'no runs to compare'}")
    return {"depth": depth, "frequency": frequency, "answers": answers}, lines


def depth_rows(cells, prefix=""):
    """Returns two lists of dicts for draw_tables: accuracies by r and target, the head of which
    `prefix` begins, and the tests. Then what depth_and_frequency returns."""
    results, lines = depth_and_frequency(cells)
    by_r = []
    for r in sorted({r for r, _ in cells}):
        row = {f"{prefix}last accuracy (mean stability; n)": f"r = {r}"}
        for target in dict.fromkeys(target for _, target in cells):
            runs = cells.get((r, target), {}).values()
            means = [summary_stats([run[name] for run in runs])["mean"]
                     for name in ("last_acc", "mean_stability") if runs]
            row[f"Prune_{target}"] = "{:.2f} ({:.3f}; {})".format(
                *means, len(runs)) if runs else "–"
        by_r.append(row)
    tests = []
    for found in itertools.chain(*results["depth"].values(), results["frequency"]):
        row = {"difference, paired by seed": found["name"], "at": found["where"],
               "n": len(found["seeds"])}
        for name in COMPARED:
            (head, digits), test = SUMMARY[name], found[name]
            row[head] = format_test(test["mean"], test["ci95"], test["p_holm"], digits)
        tests.append(row)
    return by_r, tests, results, lines


def depth_table(models):
    """Draws accuracy by r and target, and the tests of depth and of frequency."""
    tables, numbers = [], {}
    for model, groups in models.items():
        numbers[model] = {"designs": [], "answers": []}
        for cells in pruning_cells(groups):
            by_r, tests, results, lines = depth_rows(cells, f"{model}: ")
            tables += [rows for rows in (by_r, tests) if rows]
            numbers[model]["designs"].append({"cells": by_r, **results})
            numbers[model]["answers"] += lines
    nothing = [{"no pruned runs yet that differ in --target or --r only": "–"}]
    return draw_tables(*tables or [nothing]), numbers


def depth_figure(models):
    """Draws last accuracy against the mean drop at an event, a line for each r."""
    figure, axes = plots.subplots(len(models))
    numbers = {model: {"points": []} for model in models}
    for axis, (model, groups) in zip(axes, models.items()):
        looks = itertools.product(("-", "--", ":"), (SKY, BLUE, GREEN, ORANGE, RED, PINK))
        curves = [(cells, r) for cells in pruning_cells(groups)
                  for r in sorted({r for r, _ in cells})]
        for (cells, r), (line, colour) in zip(curves, looks):
            same = {target: list(runs.values()) for (period, target), runs in cells.items()
                    if period == r}
            points = []
            for target, runs in same.items():
                drop = 100 - np.mean([run["mean_stability"] for run in runs])
                accuracy = mean_ci([run["last_acc"] for run in runs])
                points.append((drop, target, len(runs), *accuracy))
            x, targets, n, *bounds = zip(*sorted(points))
            label = next(iter(same.values()))[0]["label"].partition(", ")[2]
            plots.plot_means(axis, x, np.array(bounds), (colour, line, "o"), n, bars=True,
                             label=label)
            for drop, target, n, accuracy, *_ in points:
                axis.annotate(target, (drop, accuracy), (3, 3), fontsize=7,
                              textcoords="offset points")
                numbers[model]["points"].append(
                    {"r": r, "target": target, "n": n, "drop": drop, "last_acc": accuracy})
        if "none" in groups:
            axis.axhline(np.mean([run["last_acc"] for run in groups["none"]]), color="0.4", lw=0.8,
                         ls=":", label="no pruning (mean)")
        axis.set(xlabel="Mean drop at an event (%)", ylabel="Last test accuracy (%)", title=model)
        plots.legend_below(axis, columns=2)
    return figure, numbers
