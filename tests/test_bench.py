"""The benchmarks: dry runs with tiny sizes, what results must hold whatever the times are, and their arithmetic."""
import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import epoch  # noqa: E402
import precision  # noqa: E402
import train  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def bench(*command, **more):
    interpreter = ["bash"] if command[0].endswith(".sh") else [sys.executable]
    return subprocess.run([*interpreter, ROOT / "bench" / command[0], *map(str, command[1:])], capture_output=True,
                          text=True, env=ENVIRONMENT | more)


def test_an_epoch_is_timed_for_every_variant_and_shared_out_among_its_runs(tmp_path):
    variants = [epoch.MASKED, epoch.LOADER, "ours", "ours x2", epoch.PRUNING, "ours scratch m8"]
    out = tmp_path / "epoch.json"
    done = bench("epoch.py", "--device", "cpu", "--models", "vgg11", "--precisions", "fp32", "--width", "0.05",
                 "--images", "60", "--batch-size", "32", "--rounds", "2", "--epochs", "1", "--data-dir", tmp_path,
                 "--out", out, "--variants", *variants)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert results["data"] == "random" and not results["full_size"]
    rows = {row["variant"]: row for row in results["epochs"]}
    assert list(rows) == variants and not any("failed" in row for row in rows.values())
    assert [row["runs"] for row in rows.values()] == [1, 1, 1, 2, 1, 1]
    for variant, row in rows.items():
        assert len(row["rounds"]) == 2 and min(row["rounds"]) > 0
        assert row["seconds"]["median"] == pytest.approx(np.mean(row["rounds"]), abs=2e-5)
        assert row["amortised"]["median"] == pytest.approx(row["seconds"]["median"] / row["runs"], abs=2e-5)
        assert row["mib_per_run"] == pytest.approx(row["peak_mib"] / row["runs"], abs=0.1)
        assert ("share_of_peak" in row) == (variant in variants[:4])  # the others' networks shrink
        assert (row["captures"], row["capture_seconds"]) == (0, 0)  # a CPU has no graphs
    assert rows[epoch.MASKED]["ratio"]["median"] == 1
    halves = np.divide(rows["ours x2"]["rounds"], 2) / rows[epoch.MASKED]["rounds"]
    assert rows["ours x2"]["ratio"]["median"] == pytest.approx(np.median(halves), abs=1e-3)
    assert len(results["targets"]) == 8 and all(row["met"] is None for row in results["targets"])
    estimate, = results["estimates"]
    assert estimate["events"]["none"] == 0 and estimate["figure2_hours"] >= (
        40 * 325 * estimate["epoch_seconds_at_once"] / 3600 - 1e-3)


def test_steps_and_bn_act_are_timed_for_every_variant(tmp_path):
    out = tmp_path / "step.json"
    done = bench("step.py", "--device", "cpu", "--models", "vgg11", "--width", "0.05", "--batch-size", "16", "--rounds",
                 "1", "--steps", "1", "--batches", "1", "--points", "end", "--variants", "eager masked", "ext",
                 "--out", out)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    for rows in (results["steps"], results["evaluation"]):
        assert [row["variant"] for row in rows] == ["eager masked", "ext"]
        assert all(len(row["rounds"]) == 1 and row["rounds"][0] > 0 for row in rows)
    shapes = [(row["channels"], row["size"]) for row in results["bn_act"]]
    assert shapes == [(3, 32), (6, 16), (13, 8), (26, 4), (26, 2)]
    assert not any("failed" in row for row in results["bn_act"])


def test_epochs_are_a_gpus_unless_a_cpu_is_asked_for(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("epoch.py", "--out", tmp_path / "none.json")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--device cpu" in done.stderr
    assert not (tmp_path / "none.json").exists()


def full_results(seconds):
    rows = [{"model": model, "precision": "bf16", "variant": variant, "runs": epoch.OURS.get(variant, 1),
             "rounds": [s], "seconds": {"median": s}, "amortised": {"median": s / epoch.OURS.get(variant, 1)}}
            for model in ("vgg11", "resnet18") for variant, s in seconds.items()]
    return {"full_size": True, "epochs": rows}


def test_targets_are_met_on_the_right_side_of_their_bounds():
    fast = epoch.targets(full_results({epoch.LOADER: 2.0, epoch.COMPILE: 0.325, "ours": 0.25, "ours x8": 0.8}))
    assert len(fast) == 8 and all(row["met"] for row in fast)
    assert [row["measured"] for row in fast[4:6]] == [8, pytest.approx(1.3)]
    slow = epoch.targets(full_results({epoch.LOADER: 4.8, epoch.COMPILE: 0.7, "ours": 0.61, "ours x8": 3.3}))
    assert not any(row["met"] for row in slow)
    part = epoch.targets(full_results({"ours": 0.3}))
    assert [row["met"] for row in part] == [False, None, True, None, None, None, None, None]


def test_figure_2_is_estimated_from_its_epochs_and_events():
    results = full_results({"ours": 0.5, "ours x8": 0.8, f"{epoch.PRUNING} x8": 0})
    for row in results["epochs"]:
        if row["variant"] in epoch.PRUNINGS:
            row |= {"runs": 8, "amortised": {"median": 0.3}}
    vgg, _ = epoch.estimates(results)
    # A.4: r 4, layers from 3, 4, 5, 6 to 150 and 275: each epoch of 3 to 150, and every fourth from 154 to 274
    assert vgg["events"] == {"none": 0, "S-r4": 148 + 31, "S-r40": 4 * 3 + 7, "L-r40": 4 * 3 + 7}
    assert (vgg["at_once"], vgg["epoch_seconds_at_once"]) == (8, 0.1)
    assert vgg["event_seconds_at_once"] == pytest.approx(0.2)
    assert vgg["figure2_hours"] == pytest.approx(10 * (4 * 325 * 0.1 + (179 + 19 + 19) * 0.2) / 3600, abs=1e-4)
    assert vgg["unpruned_run_hours_alone"] == pytest.approx(325 * 0.5 / 3600, abs=1e-4)


def test_a_paired_difference_is_equal_different_or_undecided_by_its_interval():
    d = [0.1, -0.05, 0.02, 0.0]
    found = precision.paired(d, 0.3)
    reference = scipy.stats.ttest_1samp(d, 0)
    assert found["ci95"] == pytest.approx(list(reference.confidence_interval(0.95))) and found["verdict"] == "equal"
    assert found["p"] == pytest.approx(reference.pvalue)
    assert precision.paired([1.0, 1.1, 0.9], 0.3)["verdict"] == "different"
    assert precision.paired([1.0, -1.1, 0.9], 0.3)["verdict"] == "undecided"
    assert precision.paired([1.0], 0.3)["verdict"] == "undecided" and precision.paired([1.0], 0.3)["ci95"] is None
    assert precision.paired([0.0, 0.0], 0.3)["p"] is None


def test_precisions_are_compared_seed_by_seed(tmp_path, tiny):
    out = tmp_path / "precision.json"
    command = ("precision.py", "--device", "cpu", "--seeds", "1-2", "--methods", "none", "L-r40", "--log-dir",
               tmp_path / "logs", "--out", out, "--", "--dataset", tiny, "--width", "0.05", "--scale-epochs", "0.01")
    done = bench(*command)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    values = {(row["precision"], row["method"]): row["best_acc"]["values"] for row in found["runs"]}
    assert set(values) == {(p, m) for p in ("fp32", "bf16") for m in ("none", "L-r40")}
    assert {(row["precision"], row["method"], row["measure"]) for row in found["differences"]} == {
        ("bf16", method, measure) for method in ("none", "L-r40") for measure in precision.MARGINS
    } - {("bf16", "none", "mean_stability")}
    row = next(row for row in found["differences"] if (row["method"], row["measure"]) == ("L-r40", "best_acc"))
    assert row["values"] == pytest.approx(np.subtract(values["bf16", "L-r40"], values["fp32", "L-r40"]), abs=1e-3)
    effects = {row["precision"]: row for row in found["effects"] if row["measure"] == "best_acc"}
    for p in ("fp32", "bf16"):
        assert effects[p]["effect"]["values"] == pytest.approx(
            np.subtract(values[p, "L-r40"], values[p, "none"]), abs=1e-3)
    assert effects["bf16"]["change"]["mean"] == pytest.approx(
        effects["bf16"]["effect"]["mean"] - effects["fp32"]["effect"]["mean"], abs=1e-3)
    assert "change" not in effects["fp32"]


def test_reproduce_plans_goes_on_and_draws(tmp_path, tiny):
    more = ["--device", "cpu", "--precision", "fp32", "--dataset", tiny, "--width", "0.05", "--scale-epochs", "0.01"]
    places = {"LOGS": str(tmp_path / "logs"), "FIGURES": str(tmp_path / "figures")}
    first = bench("reproduce.sh", "0", "3", *more, **places)  # a slice too short to train
    assert first.returncode == 0 and "the same command goes on" in first.stdout, first.stderr
    plan = json.loads((tmp_path / "logs" / "reproduce" / "plan.json").read_text())
    lines = (tmp_path / "logs" / "reproduce" / "runs").read_text().splitlines()
    runs = [train.parse_options(shlex.split(line)) for line in lines]
    assert plan["runs"] == len(runs) == 4 * plan["seeds"] and plan["minutes"] == 3 and 3 <= plan["seeds"] <= 10
    assert [(args.model, train.run_name(args)[0]) for args in runs[:4]] == [("vgg11", m) for m in epoch.METHODS]
    assert [args.seed for args in runs] == [seed for seed in range(1, plan["seeds"] + 1) for _ in range(4)]
    second = bench("reproduce.sh", "3", *more, **places)
    assert second.returncode == 0 and "goes on" not in second.stdout, second.stderr
    assert (tmp_path / "logs" / "reproduce" / "runs").read_text().splitlines() == lines
    assert all((train.run_directory(args) / "done.json").exists() for args in runs)
    assert len(list((tmp_path / "figures").glob("fig2-*.pdf"))) == 1


def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" != - ] || { echo fake; exit; }\necho "called: $*"\n[ "$2" != pytest ]\n')
    python.chmod(0o755)
    done = bench("gpu.sh", "--device", "cpu", "--results", tmp_path / "results", PYTHON=str(python))
    said = (tmp_path / "results" / "fake-gpu.log").read_text()
    assert done.returncode == 1 and said in done.stdout
    parts = [line for line in said.splitlines() if line.startswith("== ") and "after" in line]
    names = ["build", "tests", "epochs", "steps", "at-once"]
    assert [line.split(":")[0] for line in parts] == [f"== {name}" for name in names]
    assert ["done" in line for line in parts] == [name != "tests" for name in names]
    for out in ("epoch", "step", "at-once"):
        assert f"--out {tmp_path}/results/fake-{out}.json" in said


def test_what_only_a_gpu_can_say_needs_one():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("gpu.sh")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--device cpu" in done.stderr
