#!/usr/bin/env python3
"""Real CIFAR-10 on a CPU: Figure 2's vgg11 at width 0.25 in 26 of 325 epochs, two seeds; the accuracy-stability table.

    python bench/cifar10_cpu.py [--jobs 2]        # 8 runs, about 75 minutes on 2 cores; continues if interrupted

Trains what logs/ lacks, then writes bench/results/cifar10-cpu.json and prints its table.
"""
import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
from gst_ext import files  # noqa: E402
import train  # noqa: E402

METHODS = {"none": ["--target", "none"], "S-r4": ["--target", "S", "--r", "4"], "S-r40": ["--target", "S", "--r", "40"],
           "L-r40": ["--target", "L", "--r", "40"]}
COMMON = ["--model", "vgg11", "--width", "0.25", "--scale-epochs", "0.08"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, a thread each (default: 2)")
    parser.add_argument("--log-dir", default="logs", help="(default: logs)")
    jobs = parser.parse_args()
    runs = {(method, seed): [*COMMON, *options, "--seed", str(seed), "--log-dir", jobs.log_dir]
            for seed in (1, 2) for method, options in METHODS.items()}
    lines = [shlex.join(options) + "\n" for options in runs.values()]
    with tempfile.TemporaryDirectory() as folder:
        trainers = []
        for job in range(jobs.jobs):
            part = pathlib.Path(folder, str(job))
            part.write_text("".join(lines[job::jobs.jobs]))
            trainers.append(subprocess.Popen([sys.executable, ROOT / "train.py", "--runs", part],
                                             env={**os.environ, "OMP_NUM_THREADS": "1"}))
        if any([trainer.wait() for trainer in trainers]):
            sys.exit("cifar10_cpu.py: some runs failed; start the same command again to continue them")

    table, config = {}, None
    for method in METHODS:
        directories = [train.run_directory(train.parse_options(runs[method, seed])) for seed in (1, 2)]
        summaries = [analyze.summarize(directory) for directory in directories]
        config = summaries[0]["config"]
        table[method] = {"iterative_rate": config["iterative_rate"], "events": summaries[0]["events"], **{
            name: analyze.measured([s[name] for s in summaries])
            for name in ("best_acc", "last_acc", "gap", "mean_stability")}}
        print(f"{method:6} best {table[method]['best_acc']['values']} last {table[method]['last_acc']['values']} "
              f"stability {table[method]['mean_stability']['values']}")
    files.write_json(ROOT / "bench" / "results" / "cifar10-cpu.json", {
        "what": __doc__.splitlines()[0], "units": "accuracies, gap and stability in %",
        "options": " ".join(COMMON), "correlation_best_acc_stability": analyze.correlations(
            *([v for m in METHODS if m != "none" for v in table[m][k]["values"]]
              for k in ("mean_stability", "best_acc"))),
        **{k: config[k] for k in ("schedule", "data", "threads", "machine", "versions")},
        "methods": table})


if __name__ == "__main__":
    main()
