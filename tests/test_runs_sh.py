"""runs.sh: every target's commands are valid and the paper's, and a target runs, skips what is done, and draws."""
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from gst_ext import files
import train
from conftest import without_seconds

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = {"fig2": 8, "fig3": 21, "fig4": 9, "fig5": 8, "fig6": 6, "figB2": 8, "tabC1": 6, "figC3": 3, "figD2": 6,
        "tabF1": 4}


def runs_sh(*options, cwd=ROOT, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "runs.sh", *options], cwd=cwd, env=environment, capture_output=True, text=True)


def copy_project(folder):
    for name in ("runs.sh", "train.py", "analyze.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "gst_ext", folder / "gst_ext")


def commands(*options):
    result = runs_sh(options[0], "--print", *options[1:])
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert all(line[:2] == ["python", "train.py"] for line in lines)
    return [train.parse_options(line[2:]) for line in lines]


@pytest.mark.parametrize("target", RUNS)
def test_every_target_is_a_list_of_valid_distinct_runs(target):
    runs = commands(target)
    seeds = 3 if target == "tabF1" else 10
    assert len(runs) == RUNS[target] * seeds
    assert len({train.run_directory(args) for args in runs}) == len(runs)
    assert {args.seed for args in runs} == set(range(1, seeds + 1))
    quick = commands(target, "--quick")
    assert len({train.run_directory(args) for args in quick}) == len(quick) == RUNS[target] * 2
    assert {(args.dataset, args.width) for args in quick} == {("digits", 0.25)}
    assert max(train.schedule(args)["epochs"] for args in quick) <= 16
    small = commands(target, "--preset", "small")
    assert len({train.run_directory(args) for args in small}) == len(small) == len(runs)
    assert {args.dataset for args in small} == {"cifar100" if target == "tabF1" else "cifar10"}
    for preset, listed in (("quick", quick), ("small", small)):
        assert all(train.run_name(args)[1].removeprefix("sgd-").startswith(preset) for args in listed)
        for args in listed:  # they prune, and train on once it is over
            times = train.schedule(args)
            assert not times["e"] or max(times["e"]) < times["epochs"] - 1 and min(times["s"]) < max(times["e"])


def test_figures_without_runs_of_their_own_train_nothing_but_a_small_vgg19():
    assert commands("figB1") == commands("figD1") == commands("figD1", "--quick") == []
    quick, = commands("figB1", "--quick")
    assert (quick.model, quick.target, quick.dataset, quick.seed) == ("vgg19", "none", "digits", 1)


def test_quick_is_the_preset_with_two_seeds():
    assert commands("fig4", "--quick") == commands("fig4", "--preset", "quick", "--seeds", "1-2")
    assert len(commands("fig4", "--preset", "quick")) == 9 * 10
    assert commands("tabF1", "--quick", "--seeds", "3") == commands("tabF1", "--preset", "quick", "--seeds", "3")
    assert all(args.lr == 0.5 for args in commands("fig2", "--quick", "--", "--lr", "0.5"))


def test_runs_shared_by_two_experiments_have_one_directory():
    directories = {target: {train.run_directory(args) for args in commands(target, "--seeds", "1")} for target in RUNS}
    assert len(directories["fig2"] & directories["fig6"]) == 4  # none, S r4, S r40, L r40 of vgg11
    assert len(directories["fig2"] & directories["tabC1"]) == 3 and len(directories["fig2"] & directories["figB2"]) == 2
    assert len(directories["fig2"] & directories["fig3"]) == 3 and len(directories["fig2"] & directories["figD2"]) == 2


def test_figure_runs_have_the_appendix_settings():
    rates = {train.run_name(args)[0]: args for args in commands("fig2", "--seeds", "1") if args.model == "resnet18"}
    stable = rates["S-r4"]
    assert (stable.s, stable.e, stable.p) == ([7, 8, 9, 10], [150, 150, 170, 275], [.25, .4, .25, .95])
    fifth = {train.run_name(args)[0] for args in commands("fig5", "--seeds", "1")}
    assert fifth == {"none", "L-r40-bnkeep", "zero-1", "zero-50", "zero-1105", "gauss-1", "gauss-50", "gauss-1105"}
    last = commands("tabF1", "--seeds", "1")[-1]
    assert (last.target, last.s, last.e, last.r, last.p, last.score, last.lr, last.epochs, last.lrs, last.augment) == (
        "L", [2500] * 4, [3250] * 4, 750, [0, 0, 0, .7], "ebn-signed", 1e-4, 4000, [2000], True)
    stable = commands("figC3", "--seeds", "1")[1]
    assert (stable.s, stable.e, stable.p, stable.r, stable.optimizer) == ([24] * 16, [100] * 16, [.06] * 16, 1, "sgd")


@pytest.mark.parametrize("options", [("nope",), ("fig2", "--seeds", "x"), ("fig2", "--jobs", "0"), ("fig2", "--nope"),
                                     ("fig2", "--seeds"), ("fig2", "--preset", "large"), ("fig2", "--preset"),
                                     ("fig2", "--devices", "0,,1"), ("fig2", "--group", "2"),
                                     ("fig2", "--devices", "0", "--jobs", "2"), ("status", "--jobs", "2"),
                                     ("fig2", "--slurm", "--group", "0")])
def test_a_wrong_call_is_one_line_and_exit_code_2(options):
    result = runs_sh(*options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stderr.startswith("runs.sh: ")


def test_a_target_trains_continues_skips_and_draws(tmp_path, tiny):
    copy_project(tmp_path)
    options = ("fig2", "--seeds", "1", "--jobs", "2", "--", "--dataset", str(tiny), "--width", "0.05",
               "--scale-epochs", "0.005", "--batch-size", "8")
    first = runs_sh(*options, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "8 runs: 0 finished, 0 half-done; to do now: 8 runs, 16 epochs" in first.stderr
    logs = sorted(tmp_path.glob("logs/*/*/*/seed1/epochs.jsonl"))
    assert len(logs) == 8 and len(list(tmp_path.glob("figures/fig2-*.pdf"))) == 1
    before = {path: path.read_bytes() for path in logs}
    (logs[0].parent / "done.json").unlink()  # as if killed after its last epoch
    second = runs_sh(*options, cwd=tmp_path)
    assert second.returncode == 0 and "7 finished, 1 half-done; to do now: 1 runs, 0 epochs" in second.stderr
    assert (logs[0].parent / "done.json").exists() and before == {path: path.read_bytes() for path in logs}


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path, tiny):
    copy_project(tmp_path)
    options = ("figC3", "--seeds", "1", "--jobs", "2", "--", "--dataset", str(tiny), "--width", "0.05",
               "--scale-epochs", "0.005")
    bad = tmp_path / "logs" / tiny.name / "resnet18" / "none-sgd-w0.05-x0.005" / "seed1"
    bad.mkdir(parents=True)
    (bad / "checkpoint.pt").write_bytes(b"cut")
    result = runs_sh(*options, cwd=tmp_path)
    assert result.returncode == 1 and "1 of 2 runs failed" in result.stderr + result.stdout
    assert len(list(tmp_path.glob("logs/*/*/*/seed1/done.json"))) == 2 and not (bad / "done.json").exists()
    assert (bad / "checkpoint.pt").read_bytes() == b"cut"


def test_runs_listed_in_a_file_are_what_each_would_be_alone(tmp_path, options, directory):
    methods = [("--target", "R", "--seed", "3", "--s", "1", "--e", "3", "--p", ".5", "--r", "1"), ("--target", "none")]
    listed = tmp_path / "listed"
    listed.write_text("".join(shlex.join(options(*method, logs="together")) + "\n" for method in methods))
    assert train.main(["--runs", str(listed)]) == 0
    for method in methods:
        assert train.main(options(*method, logs="alone")) == 0
        assert without_seconds(directory(*method, logs="together")) == without_seconds(directory(*method, logs="alone"))


SMALL = ("--seeds", "1", "--", "--width", "0.05", "--scale-epochs", "0.005", "--dataset")


def test_devices_get_a_process_each_and_all_runs_between_them(tmp_path, tiny):
    copy_project(tmp_path)
    spy = tmp_path / "python"  # notes what it should train, and trains nothing
    spy.write_text(f'#!/bin/sh\n[ "$2" != --plan ] || exec {sys.executable} "$@"\n'
                   '[ "$2" != --runs ] || cat "$3" > "runs-on-$CUDA_VISIBLE_DEVICES"\n')
    spy.chmod(0o755)
    result = runs_sh("fig2", "--devices", "2,GPU-5,7", *SMALL, str(tiny), cwd=tmp_path, python=spy)
    assert result.returncode == 0, result.stderr
    lists = {path.name: path.read_text().splitlines() for path in tmp_path.glob("runs-on-*")}
    assert set(lists) == {"runs-on-2", "runs-on-GPU-5", "runs-on-7"} and sorted(map(len, lists.values())) == [2, 3, 3]
    assert len(set(sum(lists.values(), []))) == 8


@pytest.mark.parametrize("preset, flatness", [("--quick", "--eigs 10 --images 64"),
                                              ("--preset small", "--eigs 30 --images 64"), ("", "")])
def test_a_preset_trains_on_every_core_and_measures_less_flatness(tmp_path, tiny, preset, flatness):
    copy_project(tmp_path)
    spy = tmp_path / "python"
    spy.write_text(f'#!/bin/sh\n[ "$2" != --plan ] || exec {sys.executable} "$@"\necho "$@" >> called\n')
    spy.chmod(0o755)
    core = tmp_path / "bin" / "getconf"
    core.parent.mkdir()
    core.write_text("#!/bin/sh\necho 3\n")
    core.chmod(0o755)
    result = subprocess.run(["bash", "runs.sh", "fig6", *preset.split(), *SMALL, str(tiny)], cwd=tmp_path, text=True,
                            env={**os.environ, "PYTHON": str(spy), "PATH": f"{core.parent}:{os.environ['PATH']}"},
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    *trained, drawn = (tmp_path / "called").read_text().splitlines()
    assert len(trained) == (3 if preset else 1) and all("train.py --runs" in line for line in trained)
    assert drawn.startswith("analyze.py --figure 6 ") and drawn.endswith(f"--log-dir logs {flatness}".strip())


def test_status_looks_at_the_same_runs_as_a_target(tmp_path, tiny):
    copy_project(tmp_path)
    line = commands("figC3", *SMALL, str(tiny))[0]
    done = tmp_path / train.run_directory(line)
    failed = tmp_path / train.run_directory(commands("fig4", *SMALL, str(tiny))[1])
    for directory in (done, failed):
        directory.mkdir(parents=True)
    (done / "done.json").write_text("{}")
    facts = files.described(train.load_data(str(tiny)))
    (done / "config.json").write_text(json.dumps({"options": {}, "data": facts}))
    (failed / "failed.txt").write_text("the loss is nan\nand more")
    result = runs_sh("status", *SMALL, str(tiny), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = {words[0]: words[1:6] for words in map(str.split, result.stdout.splitlines()) if words[0] in RUNS}
    assert set(table) == set(RUNS)
    assert table["figC3"] == ["3", "1", "0", "0", "2"] and table["fig4"] == ["9", "1", "0", "1", "7"]
    assert table["fig2"] == ["8", "0", "0", "0", "8"]
    assert result.stdout.count("the loss is nan") == 1 and "and more" not in result.stdout
    for more, left in (((), 7), (("--retry-failed",), 8)):
        result = runs_sh("fig4", "--slurm", "--print", *more, *SMALL, str(tiny), cwd=tmp_path)
        assert f"to do now: {left} runs" in result.stderr and f"--array 1-{left} " in result.stdout, result


def test_tasks_of_a_gpu_get_more_runs_than_those_of_a_cpu(tmp_path, tiny):
    copy_project(tmp_path)
    for options, tasks in (((), 8), (("--gres=gpu:1 --mem 8G",), 1), (("--gres=gpu:1", "--group", "3"), 3)):
        result = runs_sh("fig2", "--slurm", *options, "--print", *SMALL, str(tiny), cwd=tmp_path)
        assert result.returncode == 0 and f"--array 1-{tasks} " in result.stdout, result
        assert result.stdout.count("--gres=gpu:1") == 2 * bool(options), "the job that draws gets them, too"
    assert not (tmp_path / "logs").exists()


def test_places_and_values_with_spaces_reach_training_and_drawing(tmp_path):
    copy_project(tmp_path)
    spy = tmp_path / "the python"
    spy.write_text(f'#!/bin/sh\n[ "$2" != --plan ] || exec {shlex.quote(sys.executable)} "$@"\n'
                   'printf "<%s>" "$@" >> called\n')
    spy.chmod(0o755)
    (tmp_path / "my data").mkdir()
    result = runs_sh("figD1", "--", "--log-dir", "my logs", "--data-dir=my data", cwd=tmp_path, python=spy)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "called").read_text() == (
        "<analyze.py><--figure><D1><--log-dir><my logs><--data-dir><my data>")
    listed = commands("fig2", "--seeds", "1", "--", "--dataset", "my set.npz")
    assert {args.dataset for args in listed} == {"my set.npz"}


@pytest.mark.parametrize("options, named", [(("--seeds", ""), "--seeds needs a value"), (("--quick",), "PYTHON=")])
def test_an_empty_value_and_a_missing_interpreter_are_one_line(options, named):
    result = runs_sh("fig2", *options, python="/nowhere/python")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and named in result.stderr
