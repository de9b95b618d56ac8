#!/usr/bin/env python3
"""How long `analyze.py --figure all` takes on 200 finished runs of 325 epochs, and how much memory it needs.

    python bench/figures.py

The logs are generated, for this measure only: real configurations and files, accuracies out of a random generator.
Every run of every runs.sh target with three seeds, Figure 2's with more. Writes bench/results/<machine>-figures.json.
"""
import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
import step  # noqa: E402  (bench/step.py, for the machine's description)
from gst_ext import files  # noqa: E402
import train  # noqa: E402

LIMIT_SECONDS, LIMIT_GB = 60, 1.0
# getrusage would count what this process held when it forked; the high-water mark is the program's own.
PROGRAM = """import sys, analyze
code = analyze.main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)"""


def runs_of_all_targets(log_dir, count=200):
    """The options of `count` runs, {directory: args}, from what runs.sh prints."""
    targets, runs = {target: None for _, target, _ in analyze.EVERYTHING.values() if target}, {}
    for seeds, wanted in (("1-3", list(targets)), ("4-10", ["fig2"])):
        for target in wanted:
            lines = subprocess.run(["bash", "runs.sh", target, "--seeds", seeds, "--print"], cwd=ROOT, check=True,
                                   capture_output=True, text=True).stdout.splitlines()
            for line in lines:
                args = train.parse_options([*shlex.split(line)[2:], "--log-dir", str(log_dir)])
                runs.setdefault(train.run_directory(args), args)
    return dict(list(runs.items())[:count])


def write_run(directory, args, facts):
    """A finished run's files as train.py writes them, with random accuracies; 325 epochs, whatever was asked."""
    random = np.random.default_rng(args.seed)
    with torch.device("meta"):
        model = train.build_model(args.model, 10)
    times = train.schedule(args)
    plan = train.pruning_plan(model, args, times)
    run = types.SimpleNamespace(args=args, model=model, times=times, plan=plan, device=torch.device("cpu"))
    config = train.describe_run(run, facts)
    config["schedule"]["epochs"] = 325
    live, lines = [len(block.mask) for block in model.prunable], []
    for epoch in range(325):
        removed, gone = [0] * len(plan), {}
        for i, (layer, kept) in enumerate(plan):
            if kept.get(epoch, live[layer]) < live[layer]:
                removed[i] = live[layer] - kept[epoch]
                gone[layer], live[layer] = list(range(removed[i])), kept[epoch]
        before = 85 - 40 * 0.97**epoch + random.normal(0, 0.3)
        after = before - (abs(random.normal(0, 2)) if gone else 0)
        lines.append(json.dumps({
            "epoch": epoch, "lr": 0.001, "train_loss": 0.1, "train_acc": 99.0, "test_acc_before": before,
            "test_acc": after, "val_acc": None, "stability": 100 * after / before if gone else None, "removed": removed,
            "live": list(live), "filters": gone, "noised": [], "seconds": 1.0}))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "epochs.jsonl").write_text("".join(line + "\n" for line in lines))
    values = np.sort(random.exponential(5, 100))[::-1]
    flat = {"eigenvalues": list(values), "converged": [True] * 100, "trace_eigs": values.sum(), "trace": values.sum(),
            **{k: random.uniform() for k in ("tr_c", "tr_f", "tic", "tic_trace", "c_over_f", "epsilon_min")}}
    (directory / "flatness.json").write_text(json.dumps({
        "images": 512, "eig": "lanczos", "epoch": 315, **flat, "adaptive": flat,
        "control": {a: flat | {"adaptive": flat} for a in ("1", "0.5", "2")},
        "density": {"width": 0.1, "grid": np.linspace(-1, 30, 512).tolist(),
                    "density": random.uniform(0, 1, 512).tolist()},
        "line": {"epsilon": np.linspace(-0.4, 0.4, 81).tolist(), "loss": random.uniform(1, 2, (10, 81)).tolist()}}))
    if args.model == "vgg19":
        torch.manual_seed(0)
        weights = train.build_model("vgg19").state_dict()
        files.save_checkpoint(directory / "checkpoint.pt", {"epoch": 325, "model": weights})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", help="what the results are called (default: made of the processor's name and the "
                        "threads)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        arrays = train.load_data("digits")
        facts = files.described(arrays)
        np.savez(folder / "cifar10.npz", **arrays)  # Figure B1 looks at images
        runs = runs_of_all_targets(folder / "logs")
        vgg19 = train.parse_options(["--model", "vgg19", "--log-dir", str(folder / "logs")])
        for directory, options in {**runs, train.run_directory(vgg19): vgg19}.items():
            write_run(directory, options, facts)
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-c", PROGRAM, "--figure", "all", "--log-dir", folder / "logs",
                                 "--data-dir", folder, "--fig-dir", folder / "figures"], cwd=ROOT, capture_output=True,
                                text=True)
        seconds = time.monotonic() - start
        drawn = sorted(path.stem for path in (folder / "figures").glob("*.png"))
    files.require(result.returncode == 0 and not result.stderr, result.stderr or result.stdout)
    peak = int(result.stdout.split()[-2]) * 1024 / 1e9
    machine = step.describe_machine(torch.device("cpu"))
    answer = {"machine": machine, "what": "analyze.py --figure all on generated logs", "runs": len(runs), "epochs": 325,
              "figures": drawn, "seconds": round(seconds, 1), "limit_seconds": LIMIT_SECONDS, "peak_gb": round(peak, 3),
              "limit_gb": LIMIT_GB}
    files.write_json(step.results_path(machine, "figures", args.machine), answer)
    print(f"{len(drawn)} figures and tables from {len(runs)} runs: {seconds:.1f} s (at most {LIMIT_SECONDS}), "
          f"{peak:.2f} GB (at most {LIMIT_GB})")


if __name__ == "__main__":
    main()
