"""The command line of train.py, the names of runs, lists of runs, and how a run continues."""
import collections
import errno
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import make_arrays, needs_gpu, read_lines, without_seconds
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from gst_ext import datasets, errors, ops, rundir
import train

PRUNE = ("--target", "S", "--s", 1, 2, "--e", 3, 3, "--p", 0.3, 0.5, "--r", 1)
NOISE = (*PRUNE, "--target", "L", "--noise-batches", 8, "--noise")
SHORT = ("--epochs", 1, "--lrs")


class Killed(BaseException):
    """Ends a run as kill -9 would: nothing in train.py handles it."""


def act_before(patch, module, name, action, call=1):
    """Makes the call-th call of module.name begin with action(*its arguments)."""
    function, calls = getattr(module, name), itertools.count(1)

    def replacement(*args, **kwargs):
        if next(calls) == call:
            action(*args)
        return function(*args, **kwargs)

    patch.setattr(module, name, replacement)


def fail(error):
    """Returns an action that raises the error."""
    def action(*_):
        raise error
    return action


def kill_before(patch, module, name, call):
    act_before(patch, module, name, fail(Killed), call)


def half_done(run, monkeypatch, *options, at=(train, "train_epoch", 3)):
    """Kills a run before a call, given as module, name and number: as it is, after two epochs."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, *at)
        run(*options)


def error_line(capsys):
    """Returns the one line on stderr, which is all that a mistake may print there."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: "), lines
    return lines[0]


def read_json(path):
    return json.loads(path.read_text())


def plain(state):
    """Returns a checkpoint's state with lists in place of tensors, to compare with ==."""
    return tree_map(lambda x: [str(x.dtype), x.tolist()] if torch.is_tensor(x) else x, state)


def result(path):
    """Returns what a run computed: its records, summary and last state, without times."""
    state, summary = rundir.load_checkpoint(path / "checkpoint.pt"), read_json(path / "done.json")
    return without_seconds(path), summary | {"seconds": None}, plain(state | {"log": None})


def contents(path):
    """Returns the bytes and times of a run's files."""
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()
            if p.is_file() and p.name not in (".lock", "failed.txt")}


# --- Names, defaults, help ---

def path_of(line):
    return train.run_path(train.parse_options(line.split()))


def test_names_are_readable():
    for line, name in (
            ("", "none"), ("--target S --r 4 --score l2 --lr 0.001", "S-r4"),
            ("--target L --noise zero --noise-batches 50", "zero-50"),
            ("--target S --scratch", "scratch-S"), ("--target L --prune-bn keep", "L-r40-bnkeep"),
            ("--model resnet18 --optimizer sgd", "none-sgd"),
            ("--target S --score ebn-signed --s 3 4 5 7", "S-r40-ebn-signed-s3,4,5,7"),
            ("--preset quick --target S", "S-r40-quick")):
        assert path_of(line).parts[-2] == name


@pytest.mark.parametrize("line, same", [
    ("--target none --score ebn --s 3 4 5 6 --r 2", ""), ("--target R --score act", "--target R"),
    ("--target R --noise zero --score ebn", "--target R --noise zero"),
    ("--target R --scratch --score ebn", "--target R --scratch"),
    ("--target S --scratch --r 4 --s 1 --e 2", "--target S --scratch"),
    ("--target L --noise zero --noise-batches 1", "--target L --noise zero")])
def test_an_option_that_a_run_does_not_use_is_no_part_of_it(line, same):
    options, plain = (train.parse_options(text.split()) for text in (line, same))
    assert train.run_path(options) == train.run_path(plain)
    assert train.experiment_options(options) == train.experiment_options(plain)
    assert options.score is None or options.target in "SL"


VARIATIONS = (
    "|--seed 2|--model vgg19|--model resnet18|--model resnet20|--width 0.5|--width 0.25|--lrs|"
    "--dataset cifar100|--dataset digits|--val-split 500|--augment|--optimizer sgd|--lr 0.01|"
    "--weight-decay 0.0001|--batch-size 64|--epochs 326|--lrs 150|--lrs 150 299|--precision bf16|"
    "--scale-epochs 0.5|--deterministic|--preset quick|--preset small|--train-images 500|"
    "--test-images 500|--label-noise 0.1|--lr 0.0012345678|--lr 0.0012345679|S|L|R|S --r 4|"
    "S --p 0.5 --s 3 --e 9|S --s 3 3 3 3|S --s 2 2 2 2|S --e 90 90 90 90|S --p 0.1x4|"
    "S --p 0.1 0.1 0.1 0.2|S --p 0.3333333x4|S --p 0.3333334x4|S --score l1|S --score act|"
    "S --score ebn|S --score ebn-signed|S --prune-bn keep|S --scratch|L --scratch|"
    "L --scratch --p 0.1x4|L --scratch --score l1|N|S --noise gauss|S --noise zero|R --noise zero|"
    "N --noise-batches 50|N --noise-batches 50 --noise-filters all|N --r 4|N --score l1|"
    "N --noise-batches 50 --noise-restore|N --noise-batches 50 --noise-filters all --noise-restore|"
    "N --test-batch-size 256|N --p 0.1x4|N --lr 0.01 --epochs 400")


def test_different_options_give_different_directories():
    lines = collections.defaultdict(list)
    for line in VARIATIONS.replace("N", "L --noise zero").split("|"):
        lines[path_of("--target " * (line[:1] in ("S", "L", "R")) + line)].append(line)
    assert [same for same in lines.values() if len(same) > 1] == [] and len(lines) > 60


def test_a_name_that_would_be_too_long_is_cut_and_has_a_checksum(tmp_path):
    names = []
    for last in (0.5, 0.6):
        fractions = [0.1 + i / 1000 for i in range(53)] + [last]
        options = train.parse_options(["--model", "resnet56", "--target", "S", "--log-dir",
                                       str(tmp_path), "--p", *map(str, fractions)])
        rundir.lock_directory(train.run_path(options)).close()
        assert train.experiment_options(options)["p"] == fractions
        names.append(train.run_path(options).parts[-2])
    assert len(set(names)) == 2 and names[0][:-8] == names[1][:-8], "only the checksum differs"
    assert all(re.fullmatch(r"S-r30-p0\.1,0\.101,.*-[0-9a-f]{8}", name) for name in names)


def test_names_of_data_stay_whole_and_within_the_log_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {name: path_of(f"--dataset {name}").parts[1] for name in (
        "cifar10", "digits", "digits.npz", "x/digits", "./cifar10", "x/CIFAR100/", "birds/cub.v1",
        "birds/cub.v2", "birds/cub", "birds/noise-0.2", "cub.npz")}
    assert len({*names.values()}) == len(names) and names["cub.npz"] == "cub.npz"
    assert names["cifar10"] == "cifar10" and names["birds/noise-0.2"] == "noise-0.2"
    assert names["x/CIFAR100/"].lower() not in datasets.BUILT_IN
    for name in ("..", ".", "../..", "x/..", "/", "//", "x/../..", ""):
        parts = train.run_path(train.parse_options(["--dataset", name])).parts
        assert parts[0] == "logs" and ".." not in parts and len(parts) == 5


@pytest.mark.parametrize("line, score", [
    ("--model vgg11", "l2"), ("--model resnet18", "act"), ("--model resnet20", "l1"),
    ("--model resnet18 --optimizer sgd", "l1"), ("--model resnet56", "l1")])
def test_defaults_are_the_papers(line, score):
    options = train.parse_options(f"{line} --target S".split())
    expected = {"adam": dict(lr=0.001, weight_decay=0, epochs=325, lrs=[150, 300], augment=False),
                "sgd": dict(lr=0.1, weight_decay=1e-4, epochs=165, lrs=[83, 125], augment=True)}
    name = "sgd" if score == "l1" else "adam"  # A.3, B.1; Figures 4 and C.3
    expected = expected[name] | dict(score=score, batch_size=128, test_batch_size=128)
    assert expected.items() <= vars(options).items()
    made = train.make_optimizer(torch.nn.Linear(1, 1), name, options.lr, options.weight_decay)
    assert type(made).__name__.lower() == options.optimizer == name
    assert made.defaults.get("momentum", 0.9) == 0.9 and not made.defaults.get("nesterov")


def test_help_goes_to_stdout_and_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out, err = capsys.readouterr()
    assert not stop.value.code and not err
    assert all(f"--{name.replace('_', '-')}" in out for name in vars(train.parse_options([])))


# --- Mistakes: one line on stderr, exit code 2, nothing written ---

MISTAKES = """--model vgg12|--target M|--score l3|--noise pink|--optimizer lion|--device tpu|--x|--r
--seed x|--seed -1|--seed 4294967296|--width 0|--width nan|--lr 0|--lr inf|--lr 1e7|--epochs 0|--r 0
--batch-size 0|--test-batch-size 0|--val-split -1|--val-split 96|--lrs -3|--train-images 97
--test-images 65|--label-noise 1.5|--label-noise nan|--scale-epochs 0|--scale-epochs nan|--scratch
--weight-decay -1|--target S --s 1 2 --e 3 --p 0.5|--target S --s 1 --e 3 --p 0.5 0.5|--r 4
--target S --s 1 --e 3 --p 1.2|--target S --s 1 --e 3 --p -0.2|--target S --s 1 --e 3 --p nan
--target S --s 1 --e 3 --p 1|--target S --s 0x19 --e 3x19 --p 0.5x19|--noise zero|--noise-batches 3
--target S --s 0 --e 5 --p 0.5 = --e|--target S --p 0.5x0|--target S --p 0.5xx|--noise-filters all
--target S --s 3 --e 1 --p 0.5 = ends at 1|--target S --s -1 --e 1 --p 0.5 = -1|--noise-restore
P --noise zero --noise-batches 0|P --noise gauss --noise-restore|P --noise zero --scratch
P --noise zero --prune-bn keep|--prune-bn keep|--save-epoch 6|--precision tf32|--dataset nowhere
--dataset nowhere.npz = nowhere.npz|--score l1 = --score does nothing without --target|--seeds x
--runs list --seed 2|--status list --width=0.5|--plan list --target S|--runs list --seeds 1-2
--seeds 1-2 --seed 9|--seeds 1-2 --seed=9|--retry-failed|--seeds 3-1|--seeds 1-2,4-3|--seeds ,
--seeds 1-|--seeds -3|--seeds 1--2|--seeds 1,,2|--seeds 1-2-3|--seeds 1-99999999"""


@pytest.mark.parametrize("mistake", re.split(r"[|\n]", MISTAKES))
def test_a_mistake_is_one_line_that_names_it(run, tiny, capsys, mistake):
    options, _, named = mistake.replace("P ", "--target S --s 0 --e 3 --p 0.5 ").partition(" = ")
    assert run(*options.split()) == 2
    assert (named or re.findall(r"--[\w-]+", options)[-1]) in error_line(capsys)
    assert not list(tiny.parent.glob("logs/**/*.json*"))


def test_cuda_is_refused_where_there_is_none(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("--device", "cuda") == 2
    assert "--device cuda" in error_line(capsys)


@pytest.mark.parametrize("content", [None, b"--model vgg12\n", b"--dataset 'open quote\n",
                                     b"\xff\xfe\x00\n"])
@pytest.mark.parametrize("option", ("--plan", "--runs", "--status"))
def test_a_bad_list_is_one_line(tmp_path, capsys, option, content):
    if content is not None:
        (tmp_path / "list").write_bytes(content)
    assert train.main([option, str(tmp_path / "list")]) == 2
    error_line(capsys)


@pytest.mark.parametrize("line", ("--plan a --runs b", "--status a --plan b",
                                  "--runs a --retry-failed"))
def test_options_of_lists_that_exclude_each_other_are_refused(capsys, line):
    assert train.main(line.split()) == 2
    message = error_line(capsys)
    assert all(option in message for option in re.findall(r"--[\w-]+", line))


@pytest.mark.parametrize("line, named", [
    ("", ""), ("--lrs", ""), ("--epochs 350 --lrs 350 --scale-epochs 0.0375", ""),
    ("--scale-epochs 0.5 --epochs 100 --lrs 0 50", ""), ("--epochs 300", "--lrs 150,300"),
    ("--epochs 3 --lrs 2 4", "--lrs 2,4"), ("--scale-epochs 0.01 --lrs 40 300", "0,3 of 3"),
    ("--scale-epochs 0.004", "150,300 of 325 epochs 1x2 of 1")])
def test_falls_of_the_learning_rate_that_are_lost_are_named(line, named):
    options = train.parse_options(line.split())
    lines = train.lr_schedule_warnings(options, train.scaled_schedule(options))
    assert bool(lines) == bool(named) and named in " ".join(lines)


# --- A stopped run continues, and ends with the bits of one that was not stopped ---

RESUMED = {  # 96 images in batches of 16: six steps an epoch, so act's tenth batches straddle them
    "act": ("--score", "act", *PRUNE),
    "random": (*PRUNE, "--target", "R"),
    "adam": ("--augment", *PRUNE, "--score", "ebn", "--optimizer", "adam", "--val-split", 10),
    "sgd": ("--optimizer", "sgd", "--lr", 0.05, *PRUNE),
    "vgg": ("--model", "vgg11", "--width", 0.05, *PRUNE),
    "gauss": (*NOISE, "gauss"),
    "restore": (*NOISE, "zero", "--noise-restore", "--noise-filters", "all"),
    "scratch": ("--target", "L", "--scratch", "--p", 0.5),
}
FIRST_KILL = dict(zip(RESUMED, [  # os.replace ends a write of config.json, log, epoch 1, epoch2.pt
    (rundir, "save_checkpoint", 1), (rundir, "append_line", 2), (os, "replace", 1),
    (os, "replace", 4), (rundir, "append_line", 1), (rundir, "save_checkpoint", 3),
    (os, "replace", 2), (train, "epoch_metrics", 2)]))


@pytest.mark.parametrize("machine", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_killed_run_ends_as_if_it_had_not_been(run, directory, monkeypatch, kind, machine):
    options = ("--batch-size", 16, "--test-batch-size", 32, *RESUMED[kind], "--save-epoch", 2)
    if machine == "cuda":
        monkeypatch.setitem(train.CHECKPOINT_SECONDS, "cuda", 0)
        options += ("--device", "cuda", "--deterministic")
    assert run(*options, logs="whole") == 0
    path, whole = directory(*options), directory(*options, logs="whole")
    # The last kill is before done.json; then nothing is left to train.
    for at in (FIRST_KILL[kind], (train, "train_epoch", 3), (rundir, "write_json", 2)):
        half_done(run, monkeypatch, *options, at=at)
        assert rundir.run_status(path) == "waiting", "the lock went with its owner"
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert run(*options) == 0
    assert result(path) == result(whole)
    weights = [rundir.load_checkpoint(p / "epoch2.pt")["model"] for p in (path, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_save_epoch_keeps_the_weights_of_that_epoch_and_may_be_asked_for_later(
        run, directory, monkeypatch):
    seen = []

    def spy(model, *_):
        seen.extend(tensor.clone() for tensor in model.state_dict().values())

    half_done(run, monkeypatch)
    act_before(monkeypatch, train, "evaluate", spy, 2)
    assert run("--save-epoch", 4) == 0
    state = rundir.load_checkpoint(directory() / "epoch4.pt")
    assert state["epoch"] == 4 and all(map(torch.equal, seen, state["model"].values()))


@pytest.mark.parametrize("damage", ("cut", "missing"))
def test_the_log_is_repaired_from_the_checkpoint(run, directory, monkeypatch, capsys, damage):
    def break_log():
        content = log.read_bytes()
        log.write_bytes(content[:-20]) if damage == "cut" else log.unlink()
        capsys.readouterr()
        return content

    assert run(*PRUNE, logs="whole") == 0
    half_done(run, monkeypatch, *PRUNE)
    log = directory(*PRUNE) / "epochs.jsonl"
    content = break_log()
    half_done(run, monkeypatch, *PRUNE, at=(train, "train_epoch", 1))
    assert log.read_bytes() == content, "at once, not only at the end"
    break_log()
    assert run(*PRUNE) == 0
    assert result(directory(*PRUNE)) == result(directory(*PRUNE, logs="whole"))
    content = break_log()  # of a run that is finished
    assert run(*PRUNE) == 0
    assert "epochs.jsonl was cut; it is written again" in capsys.readouterr().out
    assert log.read_bytes() == content
    break_log()
    (directory(*PRUNE) / "checkpoint.pt").unlink()
    before = contents(directory(*PRUNE))
    assert run(*PRUNE) == 2 and run(*PRUNE, "--seeds", "1-1") == 1
    assert f"{directory(*PRUNE)}: epochs.jsonl was cut" in capsys.readouterr().err
    assert contents(directory(*PRUNE)) == before
    assert not (directory(*PRUNE) / "failed.txt").exists(), "it is finished"


def test_a_half_done_run_without_its_checkpoint_says_that_it_starts_again(
        run, directory, monkeypatch, capsys):
    half_done(run, monkeypatch)
    (directory() / "checkpoint.pt").unlink()
    assert run() == 0
    message = "2 epochs are logged, but checkpoint.pt is missing: the run starts again"
    assert message in capsys.readouterr().out and len(read_lines(directory())) == 5


def test_a_finished_run_is_left_alone_and_a_run_says_what_it_lacks(
        run, directory, monkeypatch, capsys):
    half_done(run, monkeypatch)
    half_done(run, monkeypatch, "--save-epoch", 3, at=(train, "train_epoch", 1))
    assert "epoch3.pt" not in capsys.readouterr().out, "that is still to come"
    assert run("--save-epoch", 2) == 0
    out = capsys.readouterr().out
    assert "trained without epoch2.pt: move it" in out and "continues after epoch 2 of 5" in out
    before = contents(directory())
    assert {*before} == {"config.json", "epochs.jsonl", "checkpoint.pt", "done.json"}
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail("trained again"))
    for more, lacks in (((), ""), (("--save-epoch", 2), "epoch2.pt"),
                        (("--tensorboard",), "tensorboard")):
        assert run(*more) == 0
        *said, finished = capsys.readouterr().out.splitlines()
        assert finished == f"{directory()}: finished already"
        assert [f"trained without {lacks}: " in line for line in said] == [True] * bool(lacks)
    assert contents(directory()) == before


def test_a_run_keeps_the_number_of_threads_it_began_with(
        run, listed, directory, monkeypatch, capsys):
    threads = []
    monkeypatch.setattr(train, "THREADS", 1)
    assert run(*PRUNE, logs="whole") == 0
    half_done(run, monkeypatch, *PRUNE)
    monkeypatch.setattr(train, "THREADS", 2)  # as in a process that may use two
    for call in range(1, 5):
        act_before(monkeypatch, train, "train_epoch",
                   lambda *_: threads.append(torch.get_num_threads()), call)
    capsys.readouterr()
    try:
        assert train.main(["--runs", listed(PRUNE, (*SHORT, "--seed", 2))]) == 0
    finally:
        torch.set_num_threads(1)
    assert threads == [1, 1, 1, 2], "the second run is a new one"
    out, err = capsys.readouterr()
    assert "another" not in out and not err
    assert result(directory(*PRUNE)) == result(directory(*PRUNE, logs="whole"))
    for more, number in ((PRUNE, 1), ((*SHORT, "--seed", 2), 2)):
        assert read_json(directory(*more) / "config.json")["threads"] == number


def test_a_run_that_continues_elsewhere_says_so_and_records_it(
        run, directory, monkeypatch, capsys):
    half_done(run, monkeypatch, "--backend", "eager")
    config = read_json(directory() / "config.json")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another set")
    capsys.readouterr()
    assert run("--backend", "eager") == 0
    line, = (line for line in capsys.readouterr().out.splitlines() if "another" in line)
    assert "instruction_set" in line and "backend" not in line
    changes = {"instruction_set": [config["instruction_set"], "another set"]}
    assert read_json(directory() / "config.json") == config | {"continued": [changes]}


def test_config_says_what_was_run(run, directory, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")  # a machine without git
    more = (*PRUNE, "--epochs", 4, "--lrs", 2, "--target", "R", "--val-split", 8)
    assert run(*more) == 0
    config = read_json(directory(*more) / "config.json")
    assert config["options"]["p"] == [0.3, 0.5] and config["options"]["seed"] == 1
    assert config["options"]["score"] is None and config["git"] is None
    assert config["schedule"]["epochs"] == 4 and config["iterative_rate"] == 25  # 50% in two events
    assert [layer["filters"] for layer in config["pruned_layers"]] == [8, 8]
    assert [config["data"][split] for split in ("train", "val", "test")] == [88, 8, 64]
    assert config["versions"]["torch"] == torch.__version__ and config["threads"] == train.THREADS
    assert config["instruction_set"] == torch.backends.cpu.get_cpu_capability()


def test_the_learning_rate_is_divided_by_ten_at_each_of_lrs(run, directory, monkeypatch):
    used, options = [], ("--epochs", 6, "--lrs", 2, 3, 5, "--lr", 0.02)
    for call in range(1, 7):
        act_before(monkeypatch, train, "train_epoch", lambda model, data, optimizer, *_:
                   used.append(optimizer.param_groups[0]["lr"]), call)
    assert run(*options) == 0
    logged = [record["lr"] for record in read_lines(directory(*options))]
    assert logged == used == pytest.approx([0.02, 0.02, 2e-3, 2e-4, 2e-4, 2e-5], rel=1e-12)


def test_runs_of_one_seed_are_alike_until_they_prune(run, directory):
    def records(*more):
        more = ("--epochs", 2, "--lrs", 1, "--augment", "--batch-size", 8, *more)
        assert run(*more) == 0
        return read_lines(directory(*more))

    def first_epoch(lines):
        return lines[0]["train_loss"], lines[0]["train_acc"], lines[0]["test_acc_before"]

    baseline = records()
    late = ("--s", 0, "--e", 1, "--p", 0.5, "--r", 1)
    methods = [records("--target", *method, *late) for method in (
        "S", "L", "R", ("S", "--score", "act"), ("L", "--noise", "gauss", "--noise-batches", 2))]
    assert all(first_epoch(lines) == first_epoch(baseline) for lines in methods)
    assert all(sum(lines[0]["removed"]) for lines in methods), "they part after epoch 0"
    assert len({lines[1]["train_loss"] for lines in (baseline, *methods)}) > 3
    assert first_epoch(records("--seed", 2)) != first_epoch(baseline)


# --- Other data, other options, own scores ---

@pytest.fixture
def two_places(tmp_path, options):
    """Options of two data sets with one name; the second one's test labels are in reverse."""
    for place, step in (("a", 1), ("b", -1)):
        (tmp_path / place).mkdir()
        np.savez(tmp_path / place / "x.npz",
                 **{**make_arrays(), "test_y": make_arrays()["test_y"][::step]})
    return [options(*SHORT, "--dataset", tmp_path / place / "x.npz") for place in "ab"]


def test_a_finished_run_on_other_data_is_refused(two_places, tmp_path, capsys):
    first, second = two_places
    path = train.run_path(train.parse_options(first))
    assert train.main(first) == 0
    before = contents(path)
    (tmp_path / "list").write_text(shlex.join(second) + "\n")
    for argv, code in ((second, 2), (["--runs", str(tmp_path / "list")], 1),
                       (["--plan", str(tmp_path / "list")], 2)):
        capsys.readouterr()
        assert train.main(argv) == code
        out, err = capsys.readouterr()
        assert str(path) in err and "data set" in err and "finished already" not in out
    assert contents(path) == before and not (path / "failed.txt").exists()
    (tmp_path / "b" / "x.npz").write_bytes((tmp_path / "a" / "x.npz").read_bytes())
    assert train.main(second) == 0
    assert "finished already\n" in capsys.readouterr().out, "a copy elsewhere is the same data"
    arrays = make_arrays()
    np.savez(tmp_path / "b" / "x.npz", **arrays | {"classes": np.append(arrays["classes"], "e")})
    assert train.main(second) == 2


@pytest.mark.parametrize("change", ("data", "--save-epoch 1", "--tensorboard"))
def test_two_runs_that_would_share_a_directory_are_refused(two_places, tmp_path, capsys, change):
    first, second = two_places
    lines = [first, second if change == "data" else [*first, *change.split()]]
    (tmp_path / "list").write_text("".join(shlex.join(line) + "\n" for line in lines))
    for action in ("--runs", "--plan", "--status"):
        assert train.main([action, str(tmp_path / "list")]) == 2
        assert str(train.run_path(train.parse_options(first))) in error_line(capsys)
    assert len(train.unique_runs([first, first])) == 1


def test_a_finished_run_on_a_built_in_data_set_downloads_nothing(tmp_path, options, monkeypatch):
    argv = options(*SHORT, "--dataset", "cifar10", "--data-dir", tmp_path)
    np.savez(tmp_path / "cifar10.npz", **make_arrays())
    assert train.main(argv) == 0
    (tmp_path / "cifar10.npz").unlink()
    monkeypatch.setattr(datasets, "download_cifar", lambda *_: pytest.fail("downloaded"))
    assert train.main(argv) == 0
    np.savez(tmp_path / "cifar10.npz", **make_arrays(64))
    assert train.main(argv) == 2


@pytest.mark.parametrize("damage", (
    "cut", "missing", "list", "no data", "no source", "another data set", "another lr"))
def test_a_config_that_does_not_match_is_refused_in_one_line(
        run, directory, tiny, monkeypatch, capsys, damage):
    half_done(run, monkeypatch)
    path = directory() / "config.json"
    config = read_json(path)
    texts = {"no data": json.dumps(config | {"data": []}),
             "no source": json.dumps(config | {"own_model": "small"})}
    config["options"]["lr"] = 0.7
    texts |= {"cut": '{"options": ', "list": '["options"]', "another lr": json.dumps(config)}
    if damage == "another data set":
        np.savez(tiny, **{**make_arrays(), "train_y": make_arrays()["train_y"][::-1]})
    else:
        path.write_text(texts[damage]) if damage in texts else path.unlink()
    before = contents(directory())
    capsys.readouterr()
    assert run() == 2
    line = error_line(capsys)
    assert str(directory()) in line and ("another" not in damage or damage in line)
    assert contents(directory()) == before


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes own.py with a score of the given code; returns the option's value."""
    monkeypatch.setattr(train, "SCORES", dict(train.SCORES))

    def write(code, name="own"):
        (tmp_path / f"{name}.py").write_text(f"def own(block):\n    return {code}\n")
        return f"{tmp_path / name}.py:own"
    return write


def test_an_own_score_that_was_edited_is_refused(run, own, directory, monkeypatch, capsys):
    code = "block.conv.weight.flatten(1).std(1)"
    options = (*PRUNE, "--score", own(code))
    assert directory(*options).parts[-2].startswith("S-r1-own-")
    half_done(run, monkeypatch, *options)
    for done in (False, True):
        assert (directory(*options) / "done.json").exists() == done
        before = contents(directory(*options))
        own(f"-{code}")
        capsys.readouterr()
        assert run(*options) == 2
        assert "source of the score own" in error_line(capsys)
        assert contents(directory(*options)) == before
        own(code)
        assert run(*options) == 0


def test_an_own_score_that_reads_act_gets_its_moving_average(run, own, directory):
    own, act = ((*PRUNE, "--batch-size", 8, "--score", score)
                for score in (own("block.act.clone()"), "act"))
    assert run(*own) == run(*act) == 0
    assert directory(*own) != directory(*act)
    assert result(directory(*own)) == result(directory(*act))


def test_lists_know_own_scores_and_keep_those_of_two_files_apart(own, listed, capsys):
    runs = [(*SHORT, "--target", "S", "--scratch", "--p", 0.5, "--score", own(code, name))
            for code, name in (("block.conv.weight.flatten(1).std(1)", "a"),
                               ("block.conv.weight.flatten(1).sum(1)", "b"))]
    for action in ("--plan", "--status", "--runs"):
        assert train.main([action, listed(runs[0])]) == 0
    capsys.readouterr()
    for action in ("--plan", "--status", "--runs"):
        assert train.main([action, listed(*runs)]) == 2, "both are called own"
        assert "own" in error_line(capsys)


@pytest.mark.parametrize("code", [
    "block.conv.weight.flatten(1).sum(1).tolist()", "block.conv.weight.flatten(1)", "None",
    "block.conv.weight.sum((0, 2, 3))", "block.conv.weight[block.mask].flatten(1).sum(1)"])
def test_a_score_of_another_shape_is_one_line(run, own, capsys, code):
    # The first of the last six layers has 4 input channels and 8 filters.
    assert run("--target", "S", "--score", own(code), "--s", "0x6", "--e", "3x6", "--p", "0.5x6",
               "--r", 1) == 2
    assert re.search(r"score own gives .* return a tensor of shape \(8,\)", error_line(capsys))


def test_a_score_that_is_no_function_is_one_line(run, tmp_path, capsys):
    (tmp_path / "own.py").write_text("own = 3\n")
    for score in ("nowhere.py:own", f"{tmp_path}/own.py:other", f"{tmp_path}/own.py:own"):
        assert run(*SHORT, "--target", "S", "--scratch", "--p", 0.5, "--score", score) == 2
        assert "--score" in error_line(capsys)


# --- Lists of runs ---

LISTED = {  # what a run could leave behind for the next: networks, precisions, noise, threads
    "random": ("--seed", 3, "--target", "R", *PRUNE[2:]),
    "none": (),
    "bf16": ("--precision", "bf16", "--score", "act", "--batch-size", 16, *PRUNE, "--epochs", 7),
    "gauss": (*NOISE, "gauss"),
    "vgg": ("--model", "vgg11", "--width", 0.05, "--augment", "--val-split", 16, *PRUNE),
    "deterministic": ("--deterministic", *PRUNE),
}


@pytest.fixture
def listed(tmp_path, options):
    """Writes a list of runs, each given by its options, and returns its path."""
    def write(*runs):
        (tmp_path / "list").write_text("".join(shlex.join(options(*more)) + "\n" for more in runs))
        return str(tmp_path / "list")
    return write


@torch.no_grad()
def diverge(model, *_):
    list(model.parameters())[-1].fill_(math.nan)  # in place, since a CUDA graph reads this memory


@pytest.mark.parametrize("machine", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_each_run_of_a_list_is_what_it_would_be_alone_even_if_one_fails(
        run, listed, directory, monkeypatch, capsys, machine):
    more = ("--device", "cuda", "--deterministic") if machine == "cuda" else ()
    runs, alone = {name: (*options, *more) for name, options in LISTED.items()}, {}
    for name, options in runs.items():
        assert run(*options, logs="alone") == 0
        alone[name] = result(directory(*options, logs="alone"))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        act_before(patch, train, "train_epoch", diverge, 3)
        assert train.main(["--runs", listed(*runs.values())]) == 1
    error = capsys.readouterr().err
    assert error.count("lower --lr") == 1 and "1 of 6 runs failed" in error
    assert "failed: train.py --model resnet20" in error and "Traceback" not in error
    failed = directory(*runs["random"])
    assert rundir.run_status(failed) == "failed" and len(read_lines(failed)) == 2
    assert "lower --lr" in rundir.failure_reason(failed)
    state = rundir.load_checkpoint(failed / "checkpoint.pt")
    assert state["epoch"] == 2 and all(x.isfinite().all() for x in state["model"].values())
    for name in set(runs) - {"random"}:
        assert result(directory(*runs[name])) == alone[name], name
    assert train.main(["--runs", listed(*runs.values())]) == 0, "it continues where it stopped"
    assert result(failed) == alone["random"] and not (failed / "failed.txt").exists()
    assert capsys.readouterr().out.count("finished already") == 5


def test_seeds_are_runs_of_their_own_share_their_data_and_say_things_once(
        run, directory, capsys, monkeypatch):
    monkeypatch.setattr(errors, "WARNED", set())
    act_before(monkeypatch, train, "load_dataset", lambda *_: pytest.fail("loaded again"), 2)
    more = ("--epochs", 2, "--lrs", 1, 3)
    assert run(*more, "--seeds", "1,3-4") == 0
    assert "--lrs 1,3" in error_line(capsys)
    assert {path.name for path in directory(*more).parent.iterdir()} == {"seed1", "seed3", "seed4"}


def test_a_bug_in_one_run_is_reported_and_noted_and_the_others_are_trained(
        run, listed, directory, monkeypatch, capsys):
    runs = [(*SHORT, "--seed", seed) for seed in (1, 2, 3)]
    with monkeypatch.context() as patch:
        act_before(patch, train, "make_optimizer", fail(ZeroDivisionError("by zero")), 2)
        assert run(*SHORT, "--seeds", "1-3") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError" in err and "1 of 3 runs failed" in err
    assert [rundir.run_status(directory(*more)) for more in runs] == ["done", "failed", "done"]
    assert rundir.failure_reason(directory(*runs[1])) == "ZeroDivisionError: by zero"
    assert train.main(["--status", listed((*SHORT, "--seeds", "1-3"))]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:6] == ["list", "3", "2", "0", "1", "0"] and "ZeroDivision" in out[2]
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        assert train.main(["--status", listed((*SHORT, "--seeds", "1-3"))]) == 0
    bar, *counts = capsys.readouterr().out.splitlines()[1].split()[1:6]
    assert bar == "█████▎░░" and counts == ["3", "2", "0", "1"], "2/3 of 64 eighths are 42"
    for more, left in (((), 0), (("--retry-failed",), 1)):
        assert train.main(["--plan", listed(*runs), *more]) == 0
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == left
        assert ("1 runs that failed before are left alone" in err) == (not left)
    with rundir.lock_directory(directory(*runs[1])):
        assert train.main(["--plan", listed(*runs), "--retry-failed"]) == 0
    out, err = capsys.readouterr()
    assert not out and "1 runs are being trained by another process" in err
    assert run(*runs[1]) == 0
    assert not (directory(*runs[1]) / "failed.txt").exists()


def test_plan_counts_what_is_left_and_prints_each_line_once(
        run, options, tmp_path, capsys, monkeypatch):
    finished, half, to_do = ("--epochs", 2, "--lrs", 1), ("--seed", 2), ("--seed", 3, *PRUNE)
    assert run(*finished) == 0
    half_done(run, monkeypatch, *half)
    lines = [" ".join(options(*more)) for more in (half, finished, to_do, half, to_do)]
    plan = tmp_path / "plan"
    plan.write_text("\n\n".join(lines) + "\n  " + lines[0] + " --optimizer sgd\n")
    capsys.readouterr()
    assert train.main(["--plan", str(plan)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [lines[0], lines[2]]
    assert [int(n) for n in re.findall(r"\d+", err)] == [3, 1, 1, 2, (5 - 2) + 5], err
    assert run(*half) == run(*to_do) == 0
    capsys.readouterr()
    assert train.main(["--plan", str(plan)]) == 0
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1


# --- Locks, signals, pipes, disks, packages ---

def test_a_directory_in_use_is_one_line_and_no_failure_of_a_list(run, directory, capsys):
    with rundir.lock_directory(directory(*SHORT)):
        assert rundir.run_status(directory(*SHORT)) == "running"
        assert run(*SHORT) == 1
        line = error_line(capsys)
        assert str(directory(*SHORT)) in line and "in use by another process" in line
        assert not contents(directory(*SHORT))
        assert run(*SHORT, "--seeds", "1-2") == 0
    assert (directory(*SHORT, "--seed", 2) / "done.json").exists()
    assert run(*SHORT) == 0, "the lock went with its owner"


@pytest.mark.parametrize("code", (errno.ENOLCK, errno.EOPNOTSUPP))
def test_a_file_system_without_locks_is_one_line_and_runs_are_trained(
        run, directory, monkeypatch, capsys, code):
    monkeypatch.setattr(fcntl, "flock", fail(OSError(code, os.strerror(code))))
    half_done(run, monkeypatch)
    assert rundir.run_status(directory()) == "waiting", "else --plan would leave it out"
    assert run() == 0
    line, = capsys.readouterr().err.splitlines()
    assert "has no locks" in line


@pytest.mark.parametrize("argv", (None, ["--help"]), ids=("run", "help"))
def test_whoever_stops_reading_ends_the_printing_and_not_the_training(options, directory, argv):
    process = subprocess.Popen([sys.executable, train.__file__, *(argv or options(*PRUNE))],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not argv:
        assert process.stdout.readline()
    process.stdout.close()  # as `head -1` does
    assert process.stderr.read() == "" and process.wait() == 0
    assert argv or (directory(*PRUNE) / "done.json").exists()


@pytest.mark.parametrize("disk", ("full at a checkpoint", "full at a log line", "read-only"))
def test_a_disk_that_cannot_be_written_is_one_line_and_loses_nothing(
        run, directory, monkeypatch, capsys, disk):
    assert run(*PRUNE, logs="whole") == 0
    capsys.readouterr()
    code = errno.EROFS if disk == "read-only" else errno.ENOSPC
    error = OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:  # config.json, the log, and a checkpoint an epoch
        act_before(patch, os, "replace" if disk == "read-only" else "fsync", fail(error), 5)
        if "line" in disk:
            patch.undo()
            patch.setattr(rundir, "open", lambda path, mode="r": open(
                "/dev/full" if mode == "a" else path, mode), raising=False)
        assert run(*PRUNE) == 1
    line = error_line(capsys)
    assert os.strerror(code) in line and "the same command again" in line
    state = rundir.load_checkpoint(directory(*PRUNE) / "checkpoint.pt")
    assert state["epoch"] == (1 if "line" in disk else 2)
    assert not list(directory(*PRUNE).glob("*.partial"))
    assert run(*PRUNE) == 0
    assert result(directory(*PRUNE)) == result(directory(*PRUNE, logs="whole"))


def test_a_log_directory_below_a_file_is_one_line(run, tiny, capsys):
    assert run("--log-dir", tiny / "logs") == 1
    assert str(tiny) in error_line(capsys)


def test_a_huge_learning_rate_is_one_line_and_a_finite_log(run, directory, capsys):
    assert run("--lr", 9e5) == 1
    assert "lower --lr" in error_line(capsys)
    assert all(np.isfinite(record["test_loss"]) for record in read_lines(directory("--lr", 9e5)))


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt(), 130),
                                         (errors.UserError("a failure", 1), 1), (Killed(), None)])
@pytest.mark.parametrize("more", [("--batch-size", 16, *RESUMED["act"]), RESUMED["restore"]],
                         ids=("act", "restore"))
def test_a_checkpoint_is_written_when_it_is_due_and_when_the_run_stops(
        run, directory, monkeypatch, error, code, more):
    assert run(*more, logs="whole") == 0
    written, save = [], rundir.save_checkpoint

    def spy(path, state):
        written.append(state["epoch"])
        save(path, state)

    monkeypatch.setitem(train.CHECKPOINT_SECONDS, "cpu", 1e9)
    monkeypatch.setattr(rundir, "save_checkpoint", spy)
    with monkeypatch.context() as patch:
        if code:
            act_before(patch, train, "train_epoch", fail(error), 4)
            assert run(*more) == code
        else:  # nothing of the context's end runs in a process that is killed
            patch.setattr(rundir.RunDirectory, "__exit__", lambda self, *_: self.resources.close())
            half_done(run, monkeypatch, *more, at=(train, "train_epoch", 4))
    assert written == ([1, 3] if code else [1]) and len(read_lines(directory(*more))) == 3
    assert run(*more) == 0
    assert written == ([1, 3, 4, 5] if code else [1, 2, 5])
    assert result(directory(*more)) == result(directory(*more, logs="whole"))


def test_tensorboard_shows_the_epochs_of_a_continued_run_once(run, directory, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard, then this test runs")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    half_done(run, monkeypatch, *PRUNE, "--tensorboard")
    assert run(*PRUNE, "--tensorboard") == 0
    events = EventAccumulator(str(directory(*PRUNE) / "tensorboard"))
    events.Reload()
    records = read_lines(directory(*PRUNE))
    for name in ("train_loss", "test_acc", "stability"):
        expected = [(r["epoch"], r[name]) for r in records if r[name] is not None]
        shown = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)]
        assert shown == expected
    live = [e.value for e in events.Scalars("live_filters")]
    assert live == [sum(record["live"]) for record in records]


def test_tensorboard_that_is_not_installed_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("--tensorboard") == 2
    assert "pip install tensorboard" in error_line(capsys)


# --- No needless work ---

class ReadBacks(TorchDispatchMode):
    """Lists operations that make a GPU wait: values, or sizes that depend on them, for the CPU."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES or name in ("index", "index_put", "index_put_") and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def read_backs(monkeypatch):
    """A ReadBacks that also sees the methods which, on a CPU tensor, dispatch nothing."""
    mode = ReadBacks()
    for name in ("tolist", "cpu", "numpy", "__array__"):
        def counted(tensor, *args, function=getattr(torch.Tensor, name), name=name, **kwargs):
            mode.seen.append(name)
            with _disable_current_modes():  # its own inner calls are the same wait
                return function(tensor, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, counted)
    return mode


def test_the_read_back_counter_sees_every_way_to_wait(read_backs):
    x = torch.arange(3.0)
    waits = [x.sum().item, lambda: bool(x[0] > 1), x.tolist, x.cpu, x.numpy, x.nonzero,
             lambda: x[x > 1], lambda: x.__setitem__(x > 1, 0)]
    for i, wait in enumerate(waits, 1):
        with read_backs:
            wait()
        assert len(read_backs.seen) == i, f"wait {i}: {read_backs.seen}"


@pytest.mark.parametrize("kind", ("act", "adam", "vgg", "gauss", "restore"))
def test_no_batch_waits_for_the_device(run, monkeypatch, read_backs, kind):
    # Folding is for a CPU only, where nothing waits.
    monkeypatch.setattr(ops, "may_fold", lambda *_: False, raising=False)
    waits = []
    for name in ("train_epoch", "evaluate"):
        def watched(*args, function=getattr(train, name), **kwargs):
            read_backs.seen.clear()
            with read_backs:
                value = function(*args, **kwargs)
            waits.append(list(read_backs.seen))
            return value
        monkeypatch.setattr(train, name, watched)
    assert run(*RESUMED[kind], "--batch-size", 10) == 0
    assert len(waits) > 10 and not any(waits), waits


@pytest.mark.parametrize("more, splits", [
    ((), ["test"] * 5), (("--val-split", 10), ["test", "val"] * 5),
    ((*NOISE, "zero"), ["test"] * 10),
    (PRUNE, ["test"] * 7),  # 8 filters: 8, 7, 6 and 6, 4 after epochs 1, 2, 3 and 2, 3; two events
    (("--target", "S", "--s", 1, "--e", 4, "--p", 0.2, "--r", 1), ["test"] * 6),  # 8, 8, 8, 7
    (("--target", "S", "--s", 1, "--e", 4, "--p", 0, "--r", 1), ["test"] * 5)])
def test_the_test_set_is_evaluated_again_where_filters_are_pruned_only(
        run, monkeypatch, more, splits):
    calls = []
    for call in range(1, 20):
        act_before(monkeypatch, train, "evaluate", lambda _, __, split: calls.append(split), call)
    assert run(*more) == 0
    assert calls == splits
