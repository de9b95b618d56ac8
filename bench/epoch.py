#!/usr/bin/env python3
"""What an epoch costs, training and evaluation, alone and with many runs at once: train.py against plain PyTorch.

    bash runs.sh bench                      # after the step benchmark, where there is a GPU
    python bench/epoch.py --models vgg11 --precisions bf16 --rounds 3 --machine h100
    python bench/epoch.py --variants "eager masked" ours "ours x8"
    python bench/epoch.py --device cpu --width 0.05 --images 200 --rounds 2 --variants ours "ours x2"      # does it run

An epoch trains on 50,000 and evaluates on 10,000 images of 32x32: CIFAR-10 where data/ has it, else random ones. The
variants are
  eager masked    train.py's loop in plain PyTorch, masks multiplied in, images on the device, no graphs
  ... DataLoader  the same network in the usual script: PIL images, ToTensor, Normalize, worker processes, pinned
                  memory, .item() after each batch
  compile         train.py's loop around torch.compile(model); "compile + graphs": with mode="reduce-overhead"
  ours            train.py's runs, logs and checkpoints included, unpruned; "ours x8": eight taking turns as under
                  --seeds. "ours S r4": Figure 2's Prune_S, r 4, where filters go after each epoch that is timed.
                  "ours scratch": what Figure 2 leaves of the network, pruned before the first step
  ... m8          the two latter with live filters rounded up to a multiple of 8, not of train.MULTIPLE; m16, m32, m64
Every variant is a process of its own; in each round each is asked in turn, in rotating order, while the others idle,
and ratios are taken within a round. Times are from CUDA events (a clock on a CPU), of whole epochs after warm-up and
capture. Writes bench/results/<machine>-epoch.json anew after every single measurement.
"""
import argparse
import contextlib
import os
import pathlib
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import step  # noqa: E402  (bench/step.py)
from gst_ext import files, graphs, runs  # noqa: E402
from gst_ext.runs import keep_freed_memory  # noqa: E402
import train  # noqa: E402

MASKED, LOADER, COMPILE, PRUNING = "eager masked", "eager masked, DataLoader", "compile", "ours S r4"
MULTIPLES = {f"{variant} m{k}": k for variant in (PRUNING, "ours scratch") for k in (8, 16, 32, 64)}
AT_ONCE = (2, 4, 8, 16)
OURS = {"ours": 1, **{f"ours x{k}": k for k in AT_ONCE}}  # variant: runs at once
PRUNINGS = {PRUNING: 1, f"{PRUNING} x8": 8}
VARIANTS = (MASKED, LOADER, COMPILE, "compile + graphs", *OURS, *PRUNINGS)
METHODS = {"none": ["--target=none"], "S-r4": ["--target=S", "--r=4"], "S-r40": ["--target=S", "--r=40"],
           "L-r40": ["--target=L", "--r=40"]}  # Figure 2's
SCRATCH = ["--target=S", "--scratch", "--score=l2"]
SEEDS = 10
WARM_UP = graphs.WARM_UP + 3  # epochs: the last, smaller batch comes once an epoch; "S r4" prunes after epoch 3
IMAGES = 50_000
LOADER_WORKERS = min(4, os.cpu_count())
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
TARGETS = [  # model, variant, seconds per epoch and run at most, in bf16
    ("vgg11", "ours", 0.25), ("vgg11", "ours x8", 0.10), ("resnet18", "ours", 0.6), ("resnet18", "ours x8", 0.4)]
SPEEDUPS = {LOADER: 8, COMPILE: 1.3}  # of "ours" over these at least, in bf16

# +--------------------------------------------------------------------------------------------------------------------+
# | A worker: one variant in one process, asked and answering as bench/step.py's                                       |
# +--------------------------------------------------------------------------------------------------------------------+


def options_of(job, *more):
    """train.py's options for a job, and more of them."""
    given = [f"--{name.replace('_', '-')}={job[name]}"
             for name in ("model", "width", "batch_size", "device", "precision", "dataset", "data_dir")]
    return train.parse_options([*given, f"--log-dir={job['folder']}/{job['variant']}", *more])


def seconds_of(epoch, device, n):
    """The seconds that each of n calls of epoch takes on average, whatever streams they work on."""
    step.sync(device)
    if device.type == "cpu":
        clock = time.perf_counter()
        for _ in range(n):
            epoch()
        return (time.perf_counter() - clock) / n
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(n):
        epoch()
    torch.cuda.synchronize()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / n


def runs_at_once(variant):
    return (OURS | PRUNINGS).get(variant, 1)


def ours(job, device):
    """An epoch of each of so many runs, as gst_ext.runs lets them take turns, and the list of seconds of captures.
    """
    variant = job["variant"]
    method = SCRATCH if "scratch" in variant else METHODS["S-r4" if variant.startswith(PRUNING) else "none"]
    if variant in MULTIPLES:
        train.MULTIPLE[device.type] = MULTIPLES[variant]
    keep_freed_memory()
    sys.stdout = open(os.devnull, "w")  # the runs' own reports
    record, captures, shared = graphs.record, [], {}

    def timed_record(*arguments, **more):
        clock = time.perf_counter()
        replay = record(*arguments, **more)
        captures.append(time.perf_counter() - clock)
        return replay

    graphs.record = timed_record
    going = []
    for seed in range(runs_at_once(variant)):
        options = options_of(job, *method, f"--seed={seed}")
        going.append((runs.training(options, shared, train), graphs.stream_of(device)))

    def epoch():
        for run, stream in going:
            with stream:
                next(run)
    return epoch, captures


def in_memory(job, device):
    """An epoch of train.py's own loop in plain PyTorch, compiled or not, with no graph of ours."""
    options = options_of(job)
    arrays = train.load_data(options.dataset, options.data_dir)
    data, generators = train.put_on_device(arrays, device), train.make_generators(options, device)
    model = train.build_model(options.model, len(arrays["classes"]), options.width).to(device)
    optimizer = train.make_optimizer(model, options)
    if job["variant"] != MASKED:
        # the last batch of an epoch is smaller: a shape of its own compiles better than a size that may be anything
        model = torch.compile(model, dynamic=False, mode=None if job["variant"] == COMPILE else "reduce-overhead")

    def epoch():
        totals, _ = train.train_epoch(model, data, optimizer, options, generators, 0)
        torch.cat([totals, train.evaluate(model, data, "test", options)[0]]).tolist()
    return epoch, []


class Images(torch.utils.data.Dataset):
    """As torchvision's CIFAR10: arrays become PIL images, one by one, and those what transform makes of them."""

    def __init__(self, x, y, transform):
        self.x, self.y, self.transform = x, y.tolist(), transform

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.x[i])), self.y[i]


def usual_script(job, device):
    """An epoch as most scripts for CIFAR-10 write it, on the eager masked network."""
    from torchvision import transforms
    options = options_of(job)
    arrays = train.load_data(options.dataset, options.data_dir)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.4914, 0.4822, 0.4465),
                                                                                (0.2470, 0.2435, 0.2616))])
    loaders = {split: torch.utils.data.DataLoader(
        Images(arrays[f"{split}_x"], arrays[f"{split}_y"], transform), options.batch_size, shuffle=split == "train",
        num_workers=LOADER_WORKERS, pin_memory=device.type == "cuda") for split in ("train", "test")}
    torch.manual_seed(options.seed)
    model = train.build_model(options.model, len(arrays["classes"]), options.width).to(device)
    optimizer = train.make_optimizer(model, options)

    def count(split):
        loss_sum = correct = 0
        for images, labels in loaders[split]:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
                logits = model(images).float()
            loss = F.cross_entropy(logits, labels)
            if model.training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
        return loss_sum, correct

    def epoch():
        model.train()
        count("train")
        model.eval()
        with torch.no_grad():
            count("test")
    return epoch, []


def new_worker(job):
    """A function that answers n with the seconds of an epoch (of every run), from n of them; 0 warms up."""
    device = runs.choose_device(options_of(job))
    variant = job["variant"]
    epoch, captures = (usual_script if variant == LOADER else ours if variant.startswith("ours") else in_memory)(
        job, device)
    warm_up = WARM_UP if variant.startswith("ours") else 2

    def answer(n):
        captures.clear()
        first = 0 if n else seconds_of(epoch, device, 1)
        seconds = seconds_of(epoch, device, n or warm_up - 1)
        peak = torch.cuda.max_memory_reserved() / 2**20 if device.type == "cuda" else step.memory_mib(device, peak=True)
        return {"first_epoch": first, "seconds": seconds, "captures": len(captures), "capture_seconds": sum(captures),
                "peak_mib": peak}
    return answer


# +--------------------------------------------------------------------------------------------------------------------+
# | The benchmark                                                                                                      |
# +--------------------------------------------------------------------------------------------------------------------+

def write_data(cli, path):
    """The images of the benchmark, as a .npz; returns what they are."""
    source, random = pathlib.Path(cli.data_dir, "cifar10.npz"), np.random.default_rng(0)
    real = source.exists() and cli.images <= IMAGES
    if real:
        data = train.load_data("cifar10", cli.data_dir)
    else:
        data = {"classes": np.array([str(k) for k in range(10)])}
        for split, n in (("train", cli.images), ("test", cli.images // 5)):
            data[f"{split}_x"] = random.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
            data[f"{split}_y"] = np.arange(n) % 10
    for split, n in (("train", cli.images), ("test", cli.images // 5)):
        data |= {f"{split}_{k}": data[f"{split}_{k}"][:n] for k in "xy"}
    np.savez(path, **data)
    return "CIFAR-10" if real else "random"


def epoch_flops(job, cli):
    """Of training and evaluation, with no filter pruned: what a network has to compute, whoever computes it."""
    model = train.build_model(job["model"], 10, job["width"])
    return step.useful_flops(model, cli.images) + sum(step.forward_flops(model, cli.images // 5))


def row_of(results, model, precision, variant):
    return next((row for row in results["epochs"]
                 if (model, precision, variant) == (row["model"], row["precision"], row["variant"])), {})


def ratio(results, model, precision, variant, to):
    """variant's time per epoch and run over that of `to`, round by round; None where one of them is missing."""
    a, b = (row_of(results, model, precision, name) for name in (variant, to))
    n = min(len(a.get("rounds", ())), len(b.get("rounds", ())))
    return step.spread(np.divide(a["rounds"][:n], a["runs"]) / np.divide(b["rounds"][:n], b["runs"])) if n else None


def new_row(job, variant):
    return {"model": job["model"], "precision": job["precision"], "variant": variant, "runs": runs_at_once(variant),
            "rounds": []}


def add_answer(row, answer, epochs, peaks, flops):
    """Takes an answer, of warm-up or of a round's timed epochs, into its row. rounds and seconds are those of an epoch
    of every run, amortised those of one of them; peaks and flops are the rounds' matrix peaks and an epoch's work."""
    if "failed" in answer:
        row["failed"] = answer["failed"]
        return
    row["peak_mib"] = round(answer["peak_mib"], 1)
    row["mib_per_run"] = round(answer["peak_mib"] / row["runs"], 1)
    if answer["first_epoch"]:
        row |= {"first_epoch_seconds": round(answer["first_epoch"], 4), "captures": answer["captures"],
                "capture_seconds": round(answer["capture_seconds"], 4)}
        return
    row["rounds"].append(round(answer["seconds"], 5))
    row["seconds"], row["amortised"] = step.spread(row["rounds"], 5), step.spread(
        np.divide(row["rounds"], row["runs"]), 5)
    if row["variant"] in PRUNINGS or row["variant"] in MULTIPLES:
        row["captures_per_epoch"] = round(answer["captures"] / row["runs"] / epochs, 2)
    else:
        n = len(row["rounds"])
        rates = flops * row["runs"] / np.array(row["rounds"]) / 1e9
        row["share_of_peak"] = round(float(np.median(rates / peaks[:n])), 4)


def events_of(options):
    """How many pruning events a run has: epochs after which at least one layer may lose filters."""
    with torch.device("meta"):
        model = train.build_model(options.model, 10, options.width)
    return len({epoch for _, kept in train.pruning_plan(model, options, train.schedule(options)) for epoch in kept})


def run_seconds(options, epoch, event):
    """A run's seconds, from those of an unpruned epoch and those that an event adds."""
    return train.schedule(options)["epochs"] * epoch + events_of(options) * event


def event_seconds(results, model, precision, runs):
    """What an event adds to an epoch, per run: new shapes, and the second evaluation; None where not measured."""
    pruning, plain = (next((row["amortised"]["median"] for row in results["epochs"] if row["variant"] in variants and
                            (row["model"], row["precision"], row["runs"]) == (model, precision, runs) and
                            row["rounds"]), None) for variants in (PRUNINGS, OURS))
    return None if None in (pruning, plain) else max(0.0, pruning - plain)


def estimates(results):
    """Hours of a whole run alone, and of Figure 2 with the number at once that is fastest. Every epoch counts as an
    unpruned one, and every event as one of Prune_S, r 4, early on: pruned networks are faster, so that less is likely.
    """
    found = []
    for model, precision in dict.fromkeys((row["model"], row["precision"]) for row in results["epochs"]):
        rows = [row for row in results["epochs"] if (row["model"], row["precision"]) == (model, precision) and
                row["variant"] in OURS and row["rounds"]]
        if not rows:
            continue
        best = min(rows, key=lambda row: row["amortised"]["median"])
        alone = next((row["seconds"]["median"] for row in rows if row["runs"] == 1), None)
        events = [event_seconds(results, model, precision, runs) for runs in ((8, 1) if best["runs"] > 1 else (1, 8))]
        event = next((seconds for seconds in events if seconds is not None), None)
        lines = {method: train.parse_options([f"--model={model}", *more]) for method, more in METHODS.items()}
        found.append({
            "model": model, "precision": precision, "epoch_seconds_alone": alone, "at_once": best["runs"],
            "epoch_seconds_at_once": best["amortised"]["median"], "event_seconds_at_once": event,
            "events": {method: events_of(options) for method, options in lines.items()},
            "unpruned_run_hours_alone": alone and round(run_seconds(lines["none"], alone, 0) / 3600, 4),
            "figure2_hours": None if event is None else round(SEEDS / 3600 * sum(
                run_seconds(options, best["amortised"]["median"], event) for options in lines.values()), 4)})
    return found


def targets(results):
    """The targets: what, the value at most or at least, the value measured and whether it is met; None for both where
    it was not measured, or not at the size that the target is for."""
    found = []
    full = results["full_size"]

    def add(what, bound, target, measured):
        found.append({"what": what, bound: target, "measured": measured if full else None, "met": None if measured is
                      None or not full else measured <= target if bound == "at_most" else measured >= target})

    for model, variant, seconds in TARGETS:
        row = row_of(results, model, "bf16", variant)
        add(f"{model}, bf16: seconds per epoch and run, {variant}", "at_most", seconds,
            row.get("amortised", {}).get("median"))
    for model in dict.fromkeys(model for model, *_ in TARGETS):
        for other, speedup in SPEEDUPS.items():
            slower = ratio(results, model, "bf16", other, "ours")
            add(f"{model}, bf16: times as fast as {other}, ours alone", "at_least", speedup,
                slower and slower["median"])
    return found


def measure(job, cli, device, results, path):
    """Adds all rounds of one network in one precision to results, and writes them after every answer."""
    runs.choose_device(options_of(job | {"variant": ""}))  # sets the precision of the matrix peak
    flops, peaks = epoch_flops(job, cli), []
    peak = {"model": job["model"], "precision": job["precision"]}
    results["matrix_peak"].append(peak)
    rows = {variant: new_row(job, variant) for variant in cli.variants}
    results["epochs"] += rows.values()
    with contextlib.ExitStack() as stack:  # which ends the processes by closing their stdin
        workers = {variant: stack.enter_context(step.start_worker(job | {"variant": variant}, __file__))
                   for variant in cli.variants}
        for i in range(-1, cli.rounds):  # the first only warms up
            if i >= 0:
                peaks.append(step.matrix_peak(device, DTYPES[job["precision"]]))
                peak["gflops"] = step.spread(peaks, 1)
            for variant in np.roll(cli.variants, -i).tolist() if i >= 0 else cli.variants:
                row = rows[variant]
                if "failed" not in row:
                    answer = step.ask(workers[variant], cli.epochs if i >= 0 else 0)
                    add_answer(row, answer, cli.epochs, peaks, flops)
                    for other in rows.values():
                        other["ratio"] = ratio(results, job["model"], job["precision"], other["variant"], MASKED)
                    results["targets"], results["estimates"] = targets(results), estimates(results)
                    files.write_json(path, results)


def print_rows(results, model, precision):
    gflops = next(p["gflops"]["median"] for p in results["matrix_peak"]
                  if (p["model"], p["precision"]) == (model, precision))
    print(f"\n{model} {precision}, matrix peak {gflops:.0f} GFLOP/s\n{'':26} {'s per epoch and run':>25} "
          f"{'to eager masked':>16} {'of peak':>8} {'MiB a run':>9} {'first epoch':>11} {'captures, s':>12}")
    for row in results["epochs"]:
        if (row["model"], row["precision"]) == (model, precision):
            if "failed" in row:
                print(f"{row['variant']:26} failed: {row['failed']}")
                continue
            share = f"{row['share_of_peak']:8.1%}" if "share_of_peak" in row else f"{'-':>8}"
            to_masked = f"{row['ratio']['median']:16.3f}" if row["ratio"] else f"{'-':>16}"
            time_ = "{median:.4f} ({q1:.4f}-{q3:.4f})".format(**row["amortised"])
            print(f"{row['variant']:26} {time_:>25} {to_masked} {share} {row['mib_per_run']:9.0f} "
                  f"{row['first_epoch_seconds']:11.2f} {row['capture_seconds']:12.2f}")
    sys.stdout.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=train.PRUNABLE_BLOCKS, default=["vgg11", "resnet18"])
    add("--precisions", nargs="+", choices=DTYPES, default=["bf16", "tf32", "fp32"])
    add("--variants", nargs="+", choices=(*VARIANTS, *MULTIPLES), default=list(VARIANTS))
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--epochs", type=int, default=2, help="timed epochs of each variant in each round (default: 2)")
    add("--images", type=int, default=IMAGES, help="training images; a fifth as many test images (default: 50000)")
    add("--width", type=float, default=1.0, help="(default: 1)")
    add("--batch-size", type=int, default=128, help="of the training steps (default: 128)")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    add("--data-dir", default="data", help="where cifar10.npz may lie (default: data)")
    add("--machine", help="what the results are called (default: made of the GPU's name)")
    add("--out", metavar="FILE", help="(default: bench/results/<machine>-epoch.json)")
    add("--worker", type=step.json.loads, help=argparse.SUPPRESS)
    cli = parser.parse_args()
    if cli.worker:
        return step.work(cli.worker, new_worker)

    device = torch.device(cli.device)
    files.require(cli.device == "cpu" or torch.cuda.is_available(),
                  "torch sees no CUDA device here, and these are a GPU's times: --device cpu measures a CPU's")
    machine = step.describe_machine(device)
    path = pathlib.Path(cli.out or step.results_path(machine, "epoch", cli.machine))
    results = {"machine": machine, "full_size": (cli.device, cli.images, cli.width, cli.batch_size) == (
               "cuda", IMAGES, 1, 128), "settings": {k: v for k, v in vars(cli).items() if k not in ("worker", "out")},
               "backend": "ext" if step.ops.available else "eager", "loader_workers": LOADER_WORKERS,
               "warm_up_epochs": WARM_UP, "epochs": [], "matrix_peak": [], "estimates": [], "targets": []}
    with tempfile.TemporaryDirectory() as folder:
        dataset = pathlib.Path(folder, "images.npz")
        results["data"] = write_data(cli, dataset)
        for precision in cli.precisions:
            for model in cli.models:
                job = {"model": model, "precision": precision, "dataset": str(dataset)}
                job |= {name: getattr(cli, name) for name in ("width", "batch_size", "device", "data_dir")}
                with tempfile.TemporaryDirectory() as job["folder"]:  # runs leave checkpoints
                    measure(job, cli, device, results, path)
                print_rows(results, model, precision)
    for row in results["estimates"]:
        print("{model} {precision}: {epoch_seconds_at_once:.4f} s an epoch, {at_once} at once; Figure 2's 40 runs: "
              "{figure2_hours} hours".format(**row))
    for row in results["targets"]:
        bound = "at_most" if "at_most" in row else "at_least"
        measured = "-" if row["measured"] is None else f"{row['measured']:.3f}"
        print(f"{ {True: 'met', False: 'missed', None: 'open'}[row['met']]:6} {measured:>8}, {bound.replace('_', ' ')} "
              f"{row[bound]:<5} {row['what']}")
    print(path)


def run():
    try:
        main()
    except files.UserError as error:
        sys.exit(f"epoch.py: {error}")


if __name__ == "__main__":
    run()
