"""runs.sh: each target's commands are valid and the paper's; a target trains, goes on and draws."""
import functools
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {"fig2": 8, "fig3": 21, "fig4": 9, "fig5": 8, "fig6": 6, "figB2": 8, "tabC1": 6, "figC3": 3,
        "figD2": 6, "tabF1": 4, "depth": 10}
# An interpreter that notes its calls; {} gives --plan's list back as what is left.
SPY = 'echo "$OMP_NUM_THREADS: $@" >> called\n[ "$2" != --plan ] || exec {} "$3"; '
STUDY = "[left]\n--model vgg11 --target none\n--model vgg11 --target S --r 4\n"


def runs_sh(*options, cwd=ROOT, python=sys.executable, **environment):
    environment = os.environ | {"PYTHON": str(python), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(["bash", "runs.sh", *options], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=300)


def copy_project(folder, blocks):
    for path in (ROOT / "runs.sh", *ROOT.glob("*.py")):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "gst_ext", folder / "gst_ext")
    (folder / "experiments.txt").write_text((ROOT / "experiments.txt").read_text() + blocks)


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def spied(tmp_path):
    """Runs runs.sh with SPY on five cores; returns the result and SPY's notes."""
    for name in ("runs.sh", "experiments.txt", "requirements.txt", "requirements-tests.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()

    def call(*options, plan="cat", more="", python=tmp_path / "the python", **programs):
        program(tmp_path / "the python", SPY.format(plan) + more)
        for name, text in (programs | {"getconf": "echo 5"}).items():
            program(tmp_path / "bin" / name, text)
        (tmp_path / "called").write_text("")
        path = f"{tmp_path}/bin:{os.environ['PATH']}"
        result = runs_sh(*options, cwd=tmp_path, python=python, PATH=path, OMP_NUM_THREADS="")
        return result, (tmp_path / "called").read_text().splitlines()
    return call


@functools.cache
def commands(*options):
    result = runs_sh(options[0], "--print", *options[1:])
    assert result.returncode == 0, result.stderr
    lines = [line.split("python train.py ")[1] for line in result.stdout.splitlines()]
    return [train.parse_options(shlex.split(line)) for line in lines]


def paths(runs):
    return {train.run_path(options) for options in runs}


@pytest.mark.parametrize("target", RUNS)
def test_every_target_is_a_list_of_valid_distinct_runs(target):
    runs, seeds = commands(target), 3 if target == "tabF1" else 10
    assert len(paths(runs)) == len(runs) == RUNS[target] * seeds
    assert {options.seed for options in runs} == set(range(1, seeds + 1))
    quick, small = commands(target, "--quick"), commands(target, "--preset", "small")
    assert len(paths(quick)) == len(quick) == RUNS[target] * 2
    assert len(paths(small)) == len(small) == len(runs)
    assert {(options.dataset, options.width) for options in quick} == {("digits", 0.25)}
    longest = max(train.scaled_schedule(options)["epochs"] for options in quick)
    assert longest <= (36 if target == "fig3" else 18)
    assert {o.dataset for o in small} == {"cifar100" if target == "tabF1" else "cifar10"}
    for options in quick + small:
        assert train.run_name(options)[1].removeprefix("sgd-").startswith(options.preset)
        times = train.scaled_schedule(options)  # it prunes, and trains on after the last event
        assert not times["e"] or min(times["s"]) < max(times["e"]) < times["epochs"] - 1


def test_figures_without_runs_train_a_small_vgg19_or_nothing():
    assert commands("figB1") == commands("figD1", "--quick") == []
    quick, = commands("figB1", "--quick")
    assert (quick.model, quick.target, quick.dataset, quick.seed) == ("vgg19", "none", "digits", 1)


def test_seeds_presets_and_given_options():
    preset = ("--preset", "quick", "--seeds", "1-2")
    assert commands("fig4", "--quick") == commands("fig4", *preset)
    assert {options.seed for options in commands("figC3", "--seeds", "2-4,9")} == {2, 3, 4, 9}
    changed = commands("tabF1", "--quick", "--", "--lr", "0.5", "--dataset", "my set.npz")
    assert {(options.lr, options.dataset) for options in changed} == {(0.5, "my set.npz")}


def test_runs_are_shared_and_are_the_appendix_s():
    first = {target: commands(target, "--seeds", "1") for target in RUNS}
    shared = {"fig6": 4, "tabC1": 3, "figB2": 2, "fig3": 3, "figD2": 2}
    assert {k: len(paths(first["fig2"]) & paths(first[k])) for k in shared} == shared
    noise = {f"{kind}-{k}" for kind in ("zero", "gauss") for k in (1, 50, 1105)}
    assert {train.run_name(o)[0] for o in first["fig5"]} == {"none", "L-r40-bnkeep"} | noise
    last, sgd = first["tabF1"][-1], first["figC3"][1]
    assert (last.s, last.e, last.r, last.epochs) == ([2500] * 4, [3250] * 4, 750, 4000)
    assert (sgd.s, sgd.e, sgd.p, sgd.r) == ([24] * 16, [100] * 16, [.06] * 16, 1)


@pytest.mark.parametrize("line", [
    "nope", "fig2 --seeds x", "fig2 --seeds 1,3-2", "fig2 --jobs 0", "fig2 --nope", "fig2 --seeds",
    "fig2 --preset large", "fig2 --devices 0,,1",
    "fig2 --group 2", "fig2 --devices 0 --jobs 2", "status --jobs 2", "fig2 --slurm --group 0",
    "fig2 --seeds 1 --seeds 2", "fig2 --slurm --slurm", "fig2 --quick --preset small",
    "fig2 -- --seed 7", "fig2 -- --lr 0.1 --seeds=1-2", "status -- --preset small", "fig2"])
def test_a_wrong_call_is_one_line_and_exit_code_2(line):
    result = runs_sh(*shlex.split(line), python="/nowhere")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("runs.sh: ")
    assert ("PYTHON=/nowhere" in result.stderr) == (line == "fig2")


@pytest.mark.parametrize("text", ["[two words]", "[fig2]", "-model vgg11", "seed: 3"])
def test_a_wrong_line_of_experiments_is_named(spied, tmp_path, text):
    (tmp_path / "experiments.txt").write_text(f"[fig2]\n--target none\n{text}\n")
    result, _ = spied("fig2", "--print")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"line 3: {text}" in result.stderr


def test_setup_installs_what_a_figure_needs_and_test_the_rest(spied, tmp_path):
    python3 = '[ "$2" != venv ] || { mkdir -p .venv/bin; cp "the python" .venv/bin/python; }'
    (tmp_path / "setup.py").touch()
    calls = ["\n".join(spied(command, python="", python3=python3)[1])
             for command in ("setup", "setup", "test", "test")]
    assert "-r requirements.txt" in calls[0] and "setup.py build_ext" in calls[0]
    assert "-tests" not in calls[0] and calls[1] == "", "nothing is done twice"
    assert "-r requirements-tests.txt" in calls[2] and "-r requirements.txt" not in calls[2]
    assert "pip" not in calls[3] and "pytest" in calls[3]


def tiny_study(dataset):
    return ("left", "--seeds", "1", "--jobs", "2", "--", "--dataset", str(dataset), "--width",
            "0.05", "--scale-epochs", "0.005")


def test_an_own_block_trains_goes_on_and_is_drawn(tmp_path, tiny):
    copy_project(tmp_path, STUDY)
    first = runs_sh(*tiny_study(tiny), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "2 runs: 0 finished, 0 half-done; to do now: 2 runs, 4 epochs" in first.stderr
    logs = sorted(tmp_path.glob("logs/*/*/*/seed1/epochs.jsonl"))
    assert len(logs) == 2 and len(list(tmp_path.glob("figures/*stability*.pdf"))) == 1
    before = {path: path.read_bytes() for path in logs}
    done = logs[0].parent / "done.json"
    done.unlink()  # as if killed after its last epoch
    status = runs_sh("status", "--seeds", "1", *tiny_study(tiny)[5:], cwd=tmp_path)
    assert status.returncode == 0, status.stderr
    table = {words[0]: words[1:6] for words in map(str.split, status.stdout.splitlines()) if words}
    assert table["left"] == ["2", "1", "0", "0", "1"]
    assert all(table[name][0] == str(n) for name, n in RUNS.items())
    second = runs_sh(*tiny_study(tiny), cwd=tmp_path)
    assert second.returncode == 0 and "to do now: 1 runs, 0 epochs" in second.stderr, second.stderr
    assert done.exists() and before == {path: path.read_bytes() for path in logs}


def test_a_failed_run_is_reported_and_trained_again_only_on_demand(tmp_path, tiny):
    copy_project(tmp_path, STUDY.replace("S --r 4", "none --lr 900000"))
    first = runs_sh(*tiny_study(tiny), cwd=tmp_path)
    assert first.returncode != 0 and "to do now: 0 runs" in first.stderr
    assert "(--retry-failed trains them again)" in first.stderr, "the line says what is true here"
    done, = tmp_path.glob("logs/*/*/*/seed1/done.json")
    failed, = tmp_path.glob("logs/*/*/*/seed1/failed.txt")
    assert done.parent != failed.parent
    program(tmp_path / "bin" / "sbatch", "")
    again = runs_sh("left", "--retry-failed", "--slurm", "--print", *tiny_study(tiny)[1:],
                    cwd=tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert "--array 1-1%2 " in again.stdout and "--lr 900000" in again.stdout


@pytest.mark.parametrize("options, plan, gpus, threads, flatness", [
    ("--quick", "cat", [""] * 4, "1", "--eigs 10 --images 64"), ("", "cat", [""], "", ""),
    ("--preset small", "cat", [""] * 4, "1", "--eigs 30 --images 64"),
    ("--devices 2,GPU-5,7", "cat", ["2", "7", "GPU-5"], "1", ""),
    ("--jobs 2", "head -n 1", [""], "2", "")])  # one run is left, and gets no more threads
def test_workers_and_drawing(spied, tmp_path, options, plan, gpus, threads, flatness):
    note = '[ "$2" != --runs ] || sed "s/^/$CUDA_VISIBLE_DEVICES:/" "$3" >> runs'
    result, called = spied("fig6", *options.split(), "--seeds", "1", plan=plan, more=note)
    assert result.returncode == 0, result.stderr
    trained = [line for line in called if "train.py --runs" in line]
    assert len(trained) == len(gpus) and {line.split(":")[0] for line in trained} == {threads}
    runs = [line.split(":") for line in (tmp_path / "runs").read_text().splitlines()]
    assert {gpu for gpu, _ in runs} == set(gpus)
    assert len(runs) == len({run for _, run in runs}) == (6 if plan == "cat" else 1)
    assert "analyze.py --figure 6 " in called[-1] and called[-1].endswith(flatness)


def test_places_with_spaces_reach_drawing(spied):
    result, called = spied("figD1", "--", "--log-dir", "my logs", "--data-dir=my data",
                           more='printf "<%s>" "$@" >> called')
    assert result.returncode == 0, result.stderr
    assert called[-1].endswith("<--figure><D1><--log-dir><my logs><--data-dir><my data>")


def test_tasks_of_slurm(spied, tmp_path):
    """On a GPU they get more runs; what Slurm does not take leaves no folder behind."""
    fig2, gpu = ("fig2", "--slurm"), "--gres=gpu:1 --mem 8G"
    for options, tasks in (((), 8), ((gpu,), 1), ((gpu, "--group", "3"), 3)):
        result, _ = spied(*fig2, *options, "--print", "--seeds", "1", sbatch="")
        assert f"--requeue --open-mode append --job-name fig2 --array 1-{tasks} " in result.stdout
        assert result.stdout.count("--gres=gpu:1") == 2 * bool(options), "drawing gets them, too"
    few = "echo 'MaxArraySize = 5'"  # the largest number is one less
    for seeds, scontrol, least in (("1-126", "exit 1", 2), ("1-3", few, 6)):
        result, _ = spied(*fig2, "--seeds", seeds, sbatch="", scontrol=scontrol)
        assert result.returncode == 2 and f"--group {least}" in result.stderr
        assert result.stderr.count("\n") == 1 and not (tmp_path / "logs").exists()
    result, _ = spied(*fig2, "--seeds", "1", sbatch="exit 3", scontrol="")
    assert result.returncode == 1 and not list(tmp_path.glob("logs/slurm/*"))
    result, _ = spied(*fig2, "--seeds", "1-125", sbatch="echo 7", scontrol="")
    assert result.returncode == 0 and len(list(tmp_path.glob("logs/slurm/*/list.*"))) == 1000
