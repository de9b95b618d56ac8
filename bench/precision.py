#!/usr/bin/env python3
"""Whether bfloat16 and TF32 give what float32 gives: accuracy and stability of the same runs, seed by seed.

    python bench/precision.py --machine h100                          # vgg11, Figure 2's four methods, ten seeds
    python bench/precision.py --seeds 1-5 -- --scale-epochs 0.25      # what follows -- goes to every run
    python bench/precision.py --device cpu --seeds 1-2 --methods none S-r4 -- --dataset digits --width 0.05 \\
        --epochs 350 --lrs 350 --scale-epochs 0.0375                  # does it run

Trains what logs/ lacks, in one process (train.py --runs), and continues if interrupted. For each method, the accuracies
and the stability of each precision are taken away from float32's under the same seed: mean difference, its 95%
interval by Student's t, a paired t-test. They count as equal in a measure when the whole interval lies within that
measure's margin. "effects" are what the paper claims, each method's difference to no pruning, in each precision, and
how much they change with it. Writes bench/results/<machine>-precision.json.
"""
import argparse
import pathlib
import shlex
import subprocess
import sys
import tempfile

import numpy as np
import scipy.stats
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import epoch  # noqa: E402  (bench/epoch.py, for Figure 2's methods)
import step  # noqa: E402  (bench/step.py, for the machine's description)

sys.path.insert(0, str(step.ROOT))
import analyze  # noqa: E402
from gst_ext import files  # noqa: E402
import train  # noqa: E402

# In points of %. Runs that differ only in their seed lie 0.2 to 0.3 apart (one deviation; C.2), and so little must not
# count; Figure 2's methods lie 0.4 apart in accuracy and 0.5 in stability where they are closest to what is claimed.
MARGINS = {"best_acc": 0.3, "last_acc": 0.3, "mean_stability": 0.3}


def paired(differences, margin):
    """What is known of the mean of a difference, of one number a seed: its 95% interval by Student's t, the paired
    t-test's p, and whether the interval lies within ± margin ("equal"), excludes 0 ("different"), or neither."""
    d, n = np.asarray(differences, float), len(differences)
    found = {"n": n, "mean": float(d.mean()), "sd": None, "ci95": None, "p": None, "margin": margin,
             "verdict": "undecided", "values": [round(float(v), 4) for v in d]}
    if n < 2:
        return found
    spread = d.std(ddof=1)
    half = scipy.stats.t.ppf(0.975, n - 1) * spread / np.sqrt(n)
    low, high = float(d.mean() - half), float(d.mean() + half)
    verdict = "equal" if -margin <= low and high <= margin else "different" if low > 0 or high < 0 else "undecided"
    return found | {"sd": float(spread), "ci95": [low, high], "verdict": verdict,
                    "p": float(scipy.stats.ttest_1samp(d, 0).pvalue) if spread > 0 else None}


def minus(a, b, measure):
    """a's measure less b's, seed by seed; both are {seed: summary}."""
    return [a[seed][measure] - b[seed][measure] for seed in sorted(a.keys() & b.keys())]


def compare(summaries):
    """The comparisons of {(precision, method): {seed: summary}}, with fp32 as what the others are held to."""
    precisions, methods = (list(dict.fromkeys(key[i] for key in summaries)) for i in (0, 1))
    found = {"runs": [], "differences": [], "effects": [], "correlations": []}
    for (precision, method), runs in summaries.items():
        found["runs"].append({"precision": precision, "method": method, "seeds": sorted(runs)} | {
            measure: analyze.measured([runs[seed][measure] for seed in sorted(runs)]) for measure in MARGINS})
    for precision in precisions:
        for method in methods:
            for measure, margin in MARGINS.items():
                row = {"precision": precision, "method": method, "measure": measure}
                mine, theirs = summaries[precision, method], summaries["fp32", method]
                if precision != "fp32" and (measure, method) != ("mean_stability", "none"):  # 100% by definition
                    found["differences"].append(row | paired(minus(mine, theirs, measure), margin))
                if method != "none" and "none" in methods:
                    effect = minus(mine, summaries[precision, "none"], measure)
                    change = np.subtract(effect, minus(theirs, summaries["fp32", "none"], measure))
                    found["effects"].append(row | {"effect": paired(effect, margin)} | (
                        {} if precision == "fp32" else {"change": paired(change, margin)}))
        pruned = [run for (p, method), runs in summaries.items() if p == precision and method != "none"
                  for run in runs.values()]
        found["correlations"].append({"precision": precision} | analyze.correlations(
            *([run[measure] for run in pruned] for measure in ("mean_stability", "best_acc"))))
    return found


def print_comparison(found):
    print(f"{'':12} {'':8} {'':16} {'difference to fp32':>20} {'95% interval':>20} {'p':>7} {'margin':>7}")
    for row in found["differences"]:
        low, high = row["ci95"] or (np.nan, np.nan)
        p = "-" if row["p"] is None else f"{row['p']:.3f}"
        print(f"{row['precision']:12} {row['method']:8} {row['measure']:16} {row['mean']:20.3f} "
              f"{f'{low:.3f} to {high:.3f}':>20} {p:>7} {row['margin']:7} {row['verdict']}")
    for row in found["correlations"]:
        print(f"{row['precision']}: accuracy and stability of {row['n']} pruned runs, "
              f"Pearson {row['pearson']}, Kendall {row['kendall']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=train.PRUNABLE_BLOCKS, default="vgg11", help="(default: vgg11)")
    add("--methods", nargs="+", choices=epoch.METHODS, default=list(epoch.METHODS))
    add("--precisions", nargs="+", choices=("fp32", "tf32", "bf16"), help="fp32 and others (default: the device's)")
    add("--seeds", type=files.seed_list, default=list(range(1, 11)), help="(default: 1-10)")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    add("--log-dir", default="logs", help="(default: logs)")
    add("--machine", help="what the results are called (default: made of the GPU's name)")
    add("--out", metavar="FILE", help="(default: bench/results/<machine>-precision.json)")
    add("more", nargs="*", metavar="-- OPTION", help="more options for every train.py run")
    cli = parser.parse_args()
    files.require(cli.device == "cpu" or torch.cuda.is_available(),
                  "torch sees no CUDA device here: --device cpu compares fp32 and bf16 on a CPU")
    precisions = cli.precisions or (["fp32", "tf32", "bf16"] if cli.device == "cuda" else ["fp32", "bf16"])
    files.require("fp32" in precisions, "--precisions needs fp32, which the others are compared with")

    lines = {(precision, method, seed): shlex.join([
        f"--model={cli.model}", f"--device={cli.device}", f"--precision={precision}", f"--log-dir={cli.log_dir}",
        *epoch.METHODS[method], *cli.more, f"--seed={seed}"])
        for seed in cli.seeds for precision in precisions for method in cli.methods}
    directories = {key: train.run_directory(train.parse_options(shlex.split(line))) for key, line in lines.items()}
    with tempfile.TemporaryDirectory() as folder:
        runs = pathlib.Path(folder, "precision")
        runs.write_text("".join(line + "\n" for line in lines.values()))
        code = subprocess.run([sys.executable, step.ROOT / "train.py", "--runs", runs]).returncode
    files.require(code == 0, "some runs are not finished; start the same command again to continue them", code)

    summaries = {}
    for (precision, method, seed), directory in directories.items():
        summaries.setdefault((precision, method), {})[seed] = analyze.summarize(directory)
    found = compare(summaries)
    config = next(iter(next(iter(summaries.values())).values()))["config"]
    machine = step.describe_machine(torch.device(cli.device))
    path = pathlib.Path(cli.out or step.results_path(machine, "precision", cli.machine))
    files.write_json(path, {"what": __doc__.splitlines()[0], "units": "points of %", "machine": machine,
                            "options": cli.more, "schedule": config["schedule"], "data": config["data"], **found})
    print_comparison(found)
    print(path)


def run():
    try:
        main()
    except files.UserError as error:
        sys.exit(f"precision.py: {error}")


if __name__ == "__main__":
    run()
