"""The benchmarks in tiny sizes: every variant is timed, and what is done is not done again."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

BENCH = pathlib.Path(__file__).resolve().parent.parent / "bench"
TINY = ("--device", "cpu", "--models", "vgg11", "--width", "0.05", "--batch-size", "16")


def bench(script, *options, **environment):
    interpreter = "bash" if script.endswith(".sh") else sys.executable
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([interpreter, BENCH / script, *map(str, options)], env=environment,
                          capture_output=True, text=True, timeout=300)


def test_steps_are_timed_for_every_variant(tmp_path):
    out = tmp_path / "step.json"
    result = bench("step.py", *TINY, "--rounds", 1, "--steps", 1, "--points", "pruned",
                   "--variants", "plain", "ext", "--out", out)
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["steps"]
    assert [row["variant"] for row in rows] == ["plain", "ext"]
    for row in rows:
        (step_ms,), (test_ms,) = row["step_ms"], row["test_ms"]
        assert step_ms > 0 and test_ms > 0 and f"\n{row['variant']} " in result.stdout


def test_epochs_are_timed_in_processes_and_continued(tmp_path):
    out = tmp_path / "epoch.json"
    command = ("epoch.py", *TINY, "--images", 60, "--rounds", 1, "--epochs", 1, "--out", out)
    first = bench(*command, "--variants", "ext")
    assert first.returncode == 0, first.stdout + first.stderr
    row, = json.loads(out.read_text())["measurements"]
    assert (row["variant"], row["round"]) == ("ext", 0)
    assert min(row["seconds"]) > 0
    again = bench(*command, "--variants", "ext", "ext, 4 at once", "--seconds", 0)
    assert again.returncode == 3 and "continues" in again.stdout, "nothing is begun too late"
    assert json.loads(out.read_text())["measurements"] == [row], "nor done twice"
    other = bench(*command, "--width", 0.1)
    assert other.returncode == 1 and other.stderr.count("\n") == 1 and str(out) in other.stderr


def test_gpu_sh_goes_on_after_a_failed_part_and_skips_what_is_done(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" != - ] || { echo fake; exit; }\n'
                      'echo "called: $*"\n[ "$2" != pytest ]\n')
    python.chmod(0o755)
    command = ("gpu.sh", 600, "--device", "cpu", "--results", tmp_path / "results")
    first = bench(*command, PYTHON=str(python))
    log = (tmp_path / "results" / "fake-gpu.log").read_text()
    assert first.returncode == 1 and log in first.stdout
    assert f"--out {tmp_path}/results/fake-epoch.json" in log
    ends = [line for line in log.splitlines() if line.endswith((": done", " code 1"))]
    assert ends == ["== build: done", "== tests: stopped with code 1", "== epochs: done"]
    second = bench(*command, PYTHON=str(python))
    assert second.stdout.count("called: ") == 1 and "pytest" in second.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command, code", [(("epoch.py",), 0), (("gpu.sh",), 2)])
def test_what_needs_a_gpu_says_so_in_a_line(command, code):
    result = bench(*command)
    line, = (result.stdout + result.stderr).splitlines()
    assert result.returncode == code and "--device cpu" in line
