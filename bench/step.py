#!/usr/bin/env python3
"""Times a training step and a test batch: the extension against plain PyTorch.

    bash runs.sh bench                  # vgg11 and resnet18 at full width, some minutes on 2 cores
    python bench/step.py --models vgg11 --rounds 3 --variants plain ext
    python bench/step.py --width 0.1 --batch-size 16 --rounds 1 --steps 1    # does it run?

A step is forward, cross entropy, backward and fused Adam on random 32x32 images; a test
batch is train.evaluate on 128 images. Nothing is captured as a CUDA graph (bench/epoch.py is).
The networks are unpruned, or pruned as Figure 2's Prune_S leaves them. Variants:

    plain     the unpruned network in PyTorch alone, without masks
    eager     train.py --backend eager: masks are multiplied in, freed memory is kept
    compile   torch.compile of eager
    ext       train.py --backend ext
    eager-bf16, ext-bf16    the same with --precision bf16

Each measurement is a process of its own. A round measures every variant once, in an order that
rotates from round to round; ratios are to the first variant, within a round. Results go to
bench/results/<machine>-step.json after each network.
"""
import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gst_ext import networks, ops, rundir  # noqa: E402
from gst_ext.graphs import Graphs  # noqa: E402
import train  # noqa: E402

VARIANTS = ("plain", "eager", "compile", "ext", "eager-bf16", "ext-bf16")
POINTS = ("unpruned", "pruned")
TEST_BATCH = 128


def plain_forward(self, x, shortcut=None):
    """Block.forward without masks."""
    a = self.bn(self.conv(x))
    a = F.relu(a if shortcut is None else a + shortcut, inplace=True)
    return F.max_pool2d(a, 2) if self.pool else a


def build_network(job, options, device):
    """Builds the network of a measurement (see `measure`)."""
    torch.manual_seed(0)
    model = networks.build_model(job["model"], 10, job["width"]).to(device)
    model.round_to = train.ROUND_TO[device.type]
    if job["variant"] == "plain":
        networks.Block.forward = plain_forward
    elif job["point"] == "pruned":
        schedule = train.pruning_schedule(model, options, train.scaled_schedule(options))
        for layer, k in train.num_filters_to_prune(model, schedule, -1).items():
            block = model.prunable[layer]
            scores = train.filter_scores(block, "l2")
            train.prune_filters(block, train.select_filters(scores, block.mask, k, "S"))
    networks.set_backend(model, "ext" if job["variant"].startswith("ext") else "eager")
    return torch.compile(model) if job["variant"] == "compile" else model


def timed(function, device, n):
    """Returns the median milliseconds of n calls, after two calls that are not timed.

    The second number is the median of the time that all threads of the process computed."""
    seconds = []
    for _ in range(n + 2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter(), time.process_time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return [round(1000 * statistics.median(column), 4) for column in zip(*seconds[2:])]


def measure(job):
    """Times one variant in this process.

    Args:
        job: A dict of model, variant, point, width, batch_size, steps and device.

    Returns:
        {"step_ms": of a training step, "test_ms": of a test batch, "step_cpu_ms" and "test_cpu_ms"
        in process time, "peak_mib": the most resident memory in MiB}.
    """
    if job["variant"] != "plain":
        ops.keep_freed_memory()
    precision = "bf16" if job["variant"].endswith("bf16") else "fp32"
    options = train.parse_options(["--model", job["model"], "--target=S", "--scratch",
                                   "--score=l2", "--device", job["device"]])
    device = train.setup_device(options.device)
    model = build_network(job, options, device)
    optimizer = train.make_optimizer(model, "adam", options.lr, 0)
    images = torch.randn(job["batch_size"], 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (job["batch_size"],), device=device)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images).float()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    pixels = torch.randint(256, (TEST_BATCH, 32, 32, 3), dtype=torch.uint8, device=device)
    data = {"test": (pixels, torch.randint(10, (TEST_BATCH,), device=device)),
            "mean": torch.full((3,), 127.5, device=device),
            "std": torch.full((3,), 73.6, device=device)}

    def test():
        train.evaluate(model, data, "test", TEST_BATCH, precision, Graphs(False))

    model.train()
    step_ms, step_cpu_ms = timed(step, device, job["steps"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    test_ms, test_cpu_ms = timed(test, device, job["steps"])
    return {"step_ms": step_ms, "step_cpu_ms": step_cpu_ms, "test_ms": test_ms,
            "test_cpu_ms": test_cpu_ms, "peak_mib": peak}


def measure_in_process(job):
    """Runs measure(job) in a new process; returns {"failed": last line} if that fails."""
    result = subprocess.run([sys.executable, __file__, "--measure", json.dumps(job)],
                            capture_output=True, text=True)
    if result.returncode:
        return {"failed": (result.stderr.splitlines() or ["no message"])[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def rotated(items, k):
    """Returns the items, beginning with the k-th, so that each comes first in some round."""
    k %= len(items)
    return [*items[k:], *items[:k]]


def quartiles(values):
    """Formats values as "median (quartile-quartile)"."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def describe_machine(device):
    cpu = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"],
                         capture_output=True, text=True)
    return {"cpu": cpu[1].strip() if cpu else "cpu", "threads": torch.get_num_threads(),
            "torch": torch.__version__, "git": git.stdout.strip() or None,
            "load_before": round(os.getloadavg()[0], 2),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}


def results_path(machine, what, name=None):
    """Returns bench/results/<name>-<what>.json; the default name is made of describe_machine's."""
    default = machine["gpu"] or f"{machine['cpu']} {machine['threads']} threads"
    name = name or re.sub("[^a-z0-9]+", "-", default.lower()).strip("-")
    return ROOT / "bench" / "results" / f"{name}-{what}.json"


def print_rows(rows):
    """Prints the rows of one network at one point, with ratios to the first variant."""
    first = next((row for row in rows if "failed" not in row), None)
    print(f"\n{rows[0]['model']}, {rows[0]['point']}\n{'':10} {'step, ms':>26} {'ratio':>21} "
          f"{'of process time':>21} {'test batch, ms':>26} {'ratio':>21}")
    for row in rows:
        if "failed" in row:
            print(f"{row['variant']:10} failed: {row['failed']}", flush=True)
            continue
        ratio = {kind: f"{quartiles(np.divide(row[kind], first[kind])):>21}"
                 for kind in ("step_ms", "step_cpu_ms", "test_ms")}
        print(f"{row['variant']:10} {quartiles(row['step_ms']):>26} {ratio['step_ms']} "
              f"{ratio['step_cpu_ms']} {quartiles(row['test_ms']):>26} {ratio['test_ms']}",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=networks.PRUNABLE_BLOCKS, default=["vgg11", "resnet18"])
    add("--points", nargs="+", choices=POINTS, default=list(POINTS))
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--steps", type=int, default=5, help="timed in each measurement (default: 5)")
    add("--batch-size", type=int, default=128, help="of a training step (default: 128)")
    add("--width", type=float, default=1.0, help="(default: 1)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--machine", help="begins the name of the results (default: the processor's name)")
    add("--out", metavar="FILE", help="(default: bench/results/<machine>-step.json)")
    add("--measure", type=json.loads, help=argparse.SUPPRESS)
    cli = parser.parse_args()
    if cli.measure:
        print(json.dumps(measure(cli.measure)))
        return
    machine = describe_machine(torch.device(cli.device))
    path = pathlib.Path(cli.out or results_path(machine, "step", cli.machine))
    settings = {k: getattr(cli, k) for k in ("rounds", "steps", "batch_size", "width", "device")}
    results = {"machine": machine, "settings": settings, "steps": []}
    for model in cli.models:
        for point in cli.points:
            rows = {variant: {"model": model, "point": point, "variant": variant}
                    for variant in cli.variants}
            for k in range(cli.rounds):
                for variant in rotated(cli.variants, k):
                    row = rows[variant]
                    if "failed" not in row:
                        job = settings | {"model": model, "point": point, "variant": variant}
                        answer = measure_in_process(job)
                        for key, value in answer.items():
                            row[key] = value if key == "failed" else [*row.get(key, []), value]
            results["steps"] += rows.values()
            print_rows(list(rows.values()))
            rundir.write_json(path, results)
    print(path)


if __name__ == "__main__":
    main()
