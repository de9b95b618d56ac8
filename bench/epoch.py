#!/usr/bin/env python3
"""Times epochs of train.py on a GPU: with and without the extension's kernels, alone and at once.

    bash runs.sh bench                    # after the steps, where there is a GPU
    python bench/epoch.py --models vgg11 --rounds 3 --seconds 500
    python bench/epoch.py --device cpu --width 0.05 --images 200 --rounds 1     # does it run?

An epoch trains on 50,000 and tests on 10,000 random images of 32x32, without pruning. A variant is
a number of train.py processes with different seeds, started together:

    eager, no graphs   one process with --backend eager --no-cuda-graphs
    eager              one process with --backend eager: plain PyTorch in CUDA graphs
    ext                one process with --backend ext: the extension's kernels in CUDA graphs
    ext, 4 at once     four of them, which share the GPU (and, where it runs, CUDA's MPS)

The time of an epoch is the median that train.py writes into its log, without the first epochs, in
which graphs are captured, divided by the number of processes. A round measures every variant once,
in an order that rotates; ratios are taken within a round. Results go to
bench/results/<machine>-epoch.json after each measurement; the same command continues from there.
With --seconds no measurement begins that would probably end later than that.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch

import step

VARIANTS = {"eager, no graphs": (1, "--backend eager --no-cuda-graphs"),
            "eager": (1, "--backend eager"), "ext": (1, "--backend ext"),
            "ext, 4 at once": (4, "--backend ext")}  # processes, options
WARM_UP = 4  # epochs: an epoch's last, smaller batch is captured in the fourth


def write_images(path, n):
    """Writes a data set of n random training images and a fifth as many test images."""
    random = np.random.default_rng(0)
    data = {"classes": np.array([f"class{k}" for k in range(10)])}
    for split, size in (("train", n), ("test", n // 5)):
        data[f"{split}_x"] = random.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        data[f"{split}_y"] = np.arange(size) % 10
    np.savez(path, **data)


def measure(model, variant, settings, images, timeout):
    """Trains with one variant.

    Returns:
        {"seconds": of an epoch, for each process} or {"failed": the last line of a process}; None
        if it took longer than `timeout` seconds.
    """
    n, options = VARIANTS[variant]
    environment = dict(os.environ)
    if n > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // n)))
    epochs = WARM_UP + settings["epochs"]
    command = [sys.executable, step.ROOT / "train.py", *options.split(), "--model", model,
               "--dataset", images, "--epochs", epochs, "--lrs", epochs, "--save-epoch", 0]
    for name in ("width", "batch_size", "precision", "device"):
        command += [f"--{name.replace('_', '-')}", settings[name]]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [pathlib.Path(folder, f"output{k}") for k in range(n)]
        processes = []
        try:
            for k, output in enumerate(outputs):
                more = ["--seed", k, "--log-dir", pathlib.Path(folder, "logs")]
                with open(output, "w") as file:
                    processes.append(subprocess.Popen([*map(str, command + more)], env=environment,
                                                      stdout=file, stderr=file))
            end = time.monotonic() + timeout
            codes = [process.wait(max(0, end - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            return None
        finally:
            for process in processes:
                process.kill()
                process.wait()
        for code, output in zip(codes, outputs):
            if code:
                return {"failed": (output.read_text().splitlines() or [f"code {code}"])[-1]}
        logs = sorted(pathlib.Path(folder).glob("logs/**/epochs.jsonl"))
        seconds = [[json.loads(line)["seconds"] for line in log.read_text().splitlines()]
                   for log in logs]
    return {"seconds": [statistics.median(values[WARM_UP:]) for values in seconds]}


def print_table(measurements):
    """Prints seconds per epoch and run for each network and variant, with ratios to "eager"."""
    times = {}  # by model and variant: {round: seconds}
    for row in measurements:
        key = row["model"], row["variant"]
        if "failed" in row:
            print(f"{key[0]}, {key[1]} failed: {row['failed']}")
        else:
            processes = len(row["seconds"])
            times.setdefault(key, {})[row["round"]] = np.mean(row["seconds"]) / processes
    print(f"{'':28} {'seconds per epoch and run':>26} {'to eager':>21}")
    for (model, variant), rounds in times.items():
        base = times.get((model, "eager"), {})
        ratios = [rounds[k] / base[k] for k in rounds if k in base]
        print(f"{model:10} {variant:17} {step.quartiles(list(rounds.values())):>26} "
              f"{step.quartiles(ratios) if ratios else '-':>21}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=step.networks.PRUNABLE_BLOCKS, default=["vgg11", "resnet18"])
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--rounds", type=int, default=3, help="(default: 3)")
    add("--epochs", type=int, default=4, help="timed in each measurement (default: 4)")
    add("--seconds", type=float, default=float("inf"), help="for all measurements (default: any)")
    add("--images", type=int, default=50_000, help="for training (default: 50000)")
    add("--width", type=float, default=1.0, help="(default: 1)")
    add("--batch-size", type=int, default=128, help="(default: 128)")
    add("--precision", choices=("fp32", "tf32", "bf16"), help="(default: bf16; on a CPU fp32)")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    add("--machine", help="begins the name of the results (default: the card's name)")
    add("--out", metavar="FILE", help="(default: bench/results/<machine>-epoch.json)")
    cli = parser.parse_args()
    start = time.monotonic()
    if cli.device == "cuda" and not torch.cuda.is_available():
        print("epoch.py: no GPU, so no epoch is timed (--device cpu times epochs all the same)")
        return 0
    cli.precision = cli.precision or ("fp32" if cli.device == "cpu" else "bf16")
    machine = step.describe_machine(torch.device(cli.device))
    path = pathlib.Path(cli.out or step.results_path(machine, "epoch", cli.machine))
    settings = {name: getattr(cli, name) for name in ("epochs", "images", "width", "batch_size",
                                                      "precision", "device")}
    results = {"machine": machine, "settings": settings, "measurements": []}
    if path.exists():
        results = json.loads(path.read_text())
        if results.get("settings") != settings:
            sys.exit(f"epoch.py: {path} has other settings: move it away, or give another --out")
    rows = results["measurements"]
    done = {(row["model"], row["variant"], row["round"]) for row in rows}
    jobs = [(model, variant, k) for k in range(cli.rounds) for model in cli.models
            for variant in step.rotated(cli.variants, k)]
    longest = 0
    with tempfile.TemporaryDirectory() as folder:
        images = pathlib.Path(folder, "images.npz")
        write_images(images, cli.images)
        for model, variant, k in jobs:
            if (model, variant, k) in done:
                continue
            left, before = cli.seconds - (time.monotonic() - start), time.monotonic()
            answer = None
            if longest < left:
                answer = measure(model, variant, settings, images, min(left, 1e6))
            if answer is None:
                print("epoch.py: the time is over; the same command continues")
                break
            longest = max(longest, time.monotonic() - before)
            rows.append({"model": model, "variant": variant, "round": k} | answer)
            step.rundir.write_json(path, results)
    print_table(rows)
    print(path)
    return 0 if len(rows) >= len(jobs) else 3


if __name__ == "__main__":
    sys.exit(main())
