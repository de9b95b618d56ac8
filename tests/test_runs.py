"""Runs as users start them: names, plans, exact resume after any crash, one-line errors, and no needless waiting."""
import ast
import builtins
import collections
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, make_arrays, needs_gpu, read_lines, without_seconds
from test_pruning import training_setup
from torch.utils._python_dispatch import TorchDispatchMode

from gst_ext import files, ops, runs
import train

PRUNE = ("--target", "S", "--s", 1, 2, "--e", 3, 3, "--p", 0.3, 0.5, "--r", 1)


def error_line(capsys):
    """The one line on stderr, which is all that a mistake may print there."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("train.py: "), lines
    return lines[0]


def files_of(path):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir() if p.is_file()}


# +-- Pairing by seed -------------------------------------------------------------------------------------------------+

def test_runs_of_one_seed_are_alike_until_they_prune_and_those_of_two_are_not(run, directory, monkeypatch):
    crop_and_flip, images = train.crop_and_flip, []

    def spy(padded, *which):
        images[-1].extend(tensor.tolist() for tensor in which)
        return crop_and_flip(padded, *which)

    def records(*more):
        images.append([])
        more = ("--epochs", 2, "--lrs", 1, "--augment", "--batch-size", 8, *more)
        assert run(*more) == 0
        return read_lines(directory(*more))

    monkeypatch.setattr(train, "crop_and_flip", spy)

    def first_epoch(lines):
        return lines[0]["train_loss"], lines[0]["train_acc"], lines[0]["test_acc_before"]

    late = ("--s", 0, "--e", 1, "--p", 0.5, "--r", 1)
    baseline = records("--target", "none")
    methods = [records("--target", t, *late) for t in "SLR"]
    methods += [records("--target", "S", "--score", score, *late) for score in ("act", "ebn")]
    methods += [records("--target", "L", "--noise", "gauss", "--noise-batches", 2, *late)]
    assert all(first_epoch(lines) == first_epoch(baseline) for lines in methods)
    assert all(sum(lines[0]["removed"]) for lines in methods), "they part after epoch 0"
    assert len({lines[1]["train_loss"] for lines in (baseline, *methods)}) > 3
    records("--target", "R", "--scratch", "--p", 0.5, *late[:4])
    assert len(images[0]) == 2 * 12 * 3 and all(others == images[0] for others in images), "order, crops and flips"
    assert first_epoch(records("--target", "none", "--seed", 2)) != first_epoch(baseline)
    assert images[-1] != images[0]


# +-- Crash and resume ------------------------------------------------------------------------------------------------+

RESUMED = {  # 96 images in batches of 16: six steps an epoch, so the act score's tenth batches straddle epochs
    "act": ("--score", "act", *PRUNE),
    "random": (*PRUNE, "--target", "R"),
    "augmented": ("--augment", *PRUNE, "--score", "ebn", "--optimizer", "adam", "--val-split", 10),
    "sgd": ("--optimizer", "sgd", "--lr", 0.05, *PRUNE),
    "vgg": ("--model", "vgg11", "--width", 0.05, *PRUNE),
    "gauss": (*PRUNE, "--target", "L", "--noise", "gauss", "--noise-batches", 8),
    "restore": (*PRUNE, "--target", "L", "--noise", "zero", "--noise-batches", 8, "--noise-restore", "--noise-filters",
                "all"),
}


class Killed(BaseException):
    """Ends a run as kill -9 would: nothing in train.py catches it."""


def kill_before(monkeypatch, module, name, call):
    """Kills the run as it enters its `call`-th call of <module>.<name>."""
    function, calls = getattr(module, name), []

    def deadly(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, deadly)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_killed_run_ends_as_if_it_had_not_been(run, directory, monkeypatch, kind):
    options = ("--batch-size", 16, "--test-batch-size", 32, *RESUMED[kind])
    assert run(*options, logs="whole") == 0
    whole = without_seconds(directory(*options, logs="whole"))
    for module, point, call, left in ((files, "save_checkpoint", 1, 0), (files, "append_line", 1, 0),
                                      (train, "train_epoch", 2, 2), (files, "append_line", 2, 3)):
        with monkeypatch.context() as patch:
            kill_before(patch, module, point, call)
            with pytest.raises(Killed):
                run(*options)
        assert without_seconds(directory(*options)) == whole[:left]
        assert not (directory(*options) / "done.json").exists()
    assert run(*options) == 0
    assert without_seconds(directory(*options)) == whole and len(whole) == 5
    states = [torch.load(directory(*options, logs=logs) / "checkpoint.pt", weights_only=True)["model"]
              for logs in ("whole", "logs")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    summaries = [json.loads((directory(*options, logs=logs) / "done.json").read_text()) for logs in ("whole", "logs")]
    assert [{k: v for k, v in s.items() if k != "seconds"} for s in summaries][0] == \
           {k: v for k, v in summaries[1].items() if k != "seconds"}


@needs_gpu
@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_killed_on_cuda_ends_as_if_it_had_not_been(run, directory, monkeypatch, kind):
    monkeypatch.setitem(runs.CHECKPOINT_EVERY, "cuda", 0)
    options = ("--batch-size", 16, "--test-batch-size", 32, "--device", "cuda", "--deterministic", *RESUMED[kind])
    assert run(*options, logs="whole") == 0
    with monkeypatch.context() as patch:
        kill_before(patch, train, "train_epoch", 4)
        with pytest.raises(Killed):
            run(*options)
    assert len(read_lines(directory(*options))) == 3
    assert run(*options) == 0
    assert without_seconds(directory(*options)) == without_seconds(directory(*options, logs="whole"))


def test_a_run_killed_with_signal_9_ends_as_if_it_had_not_been(run, options, directory):
    long = ("--epochs", 25, *PRUNE, "--e", 20, 20, "--r", 4, "--score", "act", "--batch-size", 16)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *options(*long)], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = directory(*long) / "epochs.jsonl"
    try:
        deadline = time.monotonic() + 120
        while not log.exists() or log.read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (directory(*long) / "done.json").exists()
    assert run(*long) == 0
    assert run(*long, logs="whole") == 0
    assert without_seconds(directory(*long)) == without_seconds(directory(*long, logs="whole"))
    assert len(read_lines(directory(*long))) == 25


@pytest.mark.parametrize("call", (1, 4))  # config.json, and a later file
def test_a_run_killed_while_it_writes_a_file_ends_as_if_it_had_not_been(run, directory, monkeypatch, call):
    options = (*PRUNE, "--epochs", 4)
    with monkeypatch.context() as patch:
        kill_before(patch, os, "replace", call)
        with pytest.raises(Killed):
            run(*options)
    assert run(*options) == 0
    assert run(*options, logs="whole") == 0
    assert without_seconds(directory(*options)) == without_seconds(directory(*options, logs="whole"))


@pytest.mark.parametrize("damage", ("cut", "missing", "empty", "longer"))
def test_the_log_is_repaired_from_the_checkpoint(run, directory, monkeypatch, damage):
    assert run(*PRUNE, logs="whole") == 0
    with monkeypatch.context() as patch:
        kill_before(patch, train, "train_epoch", 4)
        with pytest.raises(Killed):
            run(*PRUNE)
    log = directory(*PRUNE) / "epochs.jsonl"
    content = log.read_bytes()
    assert content.count(b"\n") == 3
    if damage == "missing":
        log.unlink()
    else:
        log.write_bytes({"cut": content[:-20], "empty": b"", "longer": content + b'{"epoch": 3, "lr'}[damage])
    assert run(*PRUNE) == 0
    assert without_seconds(directory(*PRUNE)) == without_seconds(directory(*PRUNE, logs="whole"))


def test_a_finished_run_is_not_touched_again(run, directory, monkeypatch):
    assert run(*PRUNE) == 0
    before = files_of(directory(*PRUNE))
    assert {"config.json", "epochs.jsonl", "checkpoint.pt", "done.json"} <= set(before)
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert run(*PRUNE) == 0
    assert files_of(directory(*PRUNE)) == before


def test_a_run_killed_before_its_last_file_is_finished_without_training(run, directory, monkeypatch):
    with monkeypatch.context() as patch:
        kill_before(patch, files, "write_json", 2)  # the first is config.json
        with pytest.raises(Killed):
            run(*PRUNE)
    assert not (directory(*PRUNE) / "done.json").exists() and len(read_lines(directory(*PRUNE))) == 5
    monkeypatch.setattr(train, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert run(*PRUNE) == 0
    assert json.loads((directory(*PRUNE) / "done.json").read_text())["epochs"] == 5


# +-- What a run leaves -----------------------------------------------------------------------------------------------+

def test_save_epoch_keeps_the_weights_of_that_epoch(run, directory, monkeypatch):
    seen, evaluate = [], train.evaluate

    def spy(model, *rest, **more):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return evaluate(model, *rest, **more)

    monkeypatch.setattr(train, "evaluate", spy)
    assert run("--epochs", 3, "--lrs", 1, "--save-epoch", 2) == 0
    state = torch.load(directory("--epochs", 3, "--lrs", 1) / "epoch2.pt", weights_only=True)
    assert state["epoch"] == 2
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in seen[1].items())
    assert any(not torch.equal(tensor, state["model"][name]) for name, tensor in seen[2].items())


@pytest.mark.parametrize("point, call", [("append_line", 2), ("save_checkpoint", 2), ("save_checkpoint", 3)])
def test_save_epoch_survives_a_crash_around_it(run, directory, monkeypatch, point, call):
    options = ("--epochs", 3, "--lrs", 1)
    with monkeypatch.context() as patch:
        kill_before(patch, files, point, call)
        with pytest.raises(Killed):
            run(*options, "--save-epoch", 2)
    assert run(*options, "--save-epoch", 2) == 0
    assert torch.load(directory(*options) / "epoch2.pt", weights_only=True)["epoch"] == 2


def test_options_that_decide_no_result_may_change_on_resume(run, directory, monkeypatch):
    with monkeypatch.context() as patch:
        kill_before(patch, train, "train_epoch", 2)
        with pytest.raises(Killed):
            run()
    assert run("--save-epoch", 4) == 0
    assert (directory() / "epoch4.pt").exists()


def test_the_learning_rate_is_divided_by_ten_at_each_of_lrs(run, directory, monkeypatch):
    options = ("--epochs", 6, "--lrs", 2, 3, 5, "--lr", 0.02)
    used, train_epoch = [], train.train_epoch

    def spy(model, data, optimizer, *rest, **more):
        used.append(optimizer.param_groups[0]["lr"])
        return train_epoch(model, data, optimizer, *rest, **more)

    monkeypatch.setattr(train, "train_epoch", spy)
    assert run(*options) == 0
    expected = [0.02, 0.02, 2e-3, 2e-4, 2e-4, 2e-5]
    assert [record["lr"] for record in read_lines(directory(*options))] == pytest.approx(expected, rel=1e-12)
    assert used == pytest.approx(expected, rel=1e-12)


def test_config_says_what_was_run(run, directory):
    assert run(*PRUNE, "--epochs", 4, "--lrs", 2) == 0
    config = json.loads((directory(*PRUNE, "--epochs", 4, "--lrs", 2) / "config.json").read_text())
    assert config["options"]["p"] == [0.3, 0.5] and config["options"]["seed"] == 1
    assert config["schedule"]["epochs"] == 4 and config["versions"]["torch"] == torch.__version__
    assert [layer["filters"] for layer in config["pruned_layers"]] == [8, 8]
    assert config["data"]["train"] == 96 and config["data"]["test"] == 64


def test_the_ten_lines_of_the_docstring_are_the_experiment(run, directory, options, capsys):
    lines = train.__doc__.rpartition("The experiment in ten lines")[2].split("\n\n", 1)[1]
    lines = textwrap.dedent(lines).strip().splitlines()
    assert len(lines) == 10
    once = ("--lrs", "--no-augment", *PRUNE)
    given = re.sub(r"\[.*\]", repr(options(*once)).replace("\\", r"\\"), lines[0])
    capsys.readouterr()
    exec("\n".join([given, *lines[1:]]), dict(vars(train)))
    printed = capsys.readouterr().out.splitlines()
    assert run(*once) == 0
    for line, record in zip(printed, read_lines(directory(*once)), strict=True):
        epoch, _, found = line.partition(" ")
        found = ast.literal_eval(found)
        assert int(epoch) == record["epoch"] and found == {name: record[name] for name in found}


# +-- Names -----------------------------------------------------------------------------------------------------------+

def names(line):
    return "-".join(filter(None, train.run_name(train.parse_options(line.split()))))


@pytest.mark.parametrize("line, name", [
    ("", "none"), ("--target S", "S-r40"), ("--target S --r 4", "S-r4"), ("--target L --score ebn", "L-r40-ebn"),
    ("--target L --noise zero --noise-batches 50", "zero-50"), ("--target L --noise gauss", "gauss-1"),
    ("--target S --scratch", "scratch-S"), ("--target L --prune-bn keep", "L-r40-bnkeep"),
    ("--model resnet18 --target S --score ebn-signed --s 3 4 5 6", "S-r40-ebn-signed-s3,4,5,6"),
    ("--model resnet20 --target S --r 60", "S-r60"), ("--model resnet18 --optimizer sgd", "none-sgd"),
])
def test_names_are_readable(line, name):
    assert names(line) == name


def test_runs_shared_by_two_experiments_share_a_directory():
    for model in ("vgg11", "resnet18"):
        plain = train.run_directory(train.parse_options(["--model", model]))
        figure_b2 = train.parse_options(["--model", model, "--target", "none", "--score", "ebn", "--s", *"3456"])
        assert train.run_directory(figure_b2) == plain
        assert plain.parts == ("logs", "cifar10", model, "none", "seed1")
    assert names("--target S --r 40 --score l2 --lr 0.001") == names("--target S") == "S-r40"


@pytest.mark.parametrize("model, optimizer, expected", [  # A.3, B.1; Figures 4 and C.3
    ("vgg11", "adam", dict(lr=0.001, weight_decay=0, epochs=325, lrs=[150, 300], augment=False, score="l2")),
    ("resnet18", "adam", dict(lr=0.001, weight_decay=0, epochs=325, lrs=[150, 300], augment=False, score="act")),
    *[(model, "sgd", dict(lr=0.1, weight_decay=1e-4, epochs=165, lrs=[83, 125], augment=True, score="l1"))
      for model in ("resnet18", "resnet20", "resnet56")],
])
def test_defaults_are_the_papers(model, optimizer, expected):
    more = ["--optimizer", "sgd"] if model == "resnet18" and optimizer == "sgd" else []
    args = train.parse_options(["--model", model, "--target", "S", *more])
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.optimizer, args.batch_size, args.test_batch_size) == (optimizer, 128, 128)
    with torch.device("meta"):
        made = train.make_optimizer(train.build_model(model, 10, 0.05).to_empty(device="cpu"), args)
    assert type(made).__name__.lower() == optimizer
    assert made.defaults.get("momentum", 0.9) == 0.9 and not made.defaults.get("nesterov")


def test_help_goes_to_stdout_and_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    out, err = capsys.readouterr()
    assert not stop.value.code and not err
    options = train.parse_options([])
    assert all(f"--{name.replace('_', '-')}" in out for name in vars(options))


VARIATIONS = [
    "", "--seed 2", "--model vgg19", "--model resnet18", "--model resnet20", "--width 0.5", "--width 0.25",
    "--dataset cifar100", "--dataset digits", "--val-split 500", "--augment", "--optimizer sgd", "--lr 0.01",
    "--weight-decay 0.0001", "--batch-size 64", "--epochs 326", "--lrs 150", "--lrs 150 299", "--lrs",
    "--scale-epochs 0.5", "--precision bf16", "--deterministic", "--target S", "--target L", "--target R",
    "--target S --r 4", "--target S --p 0.5 --s 3 --e 9", "--target S --s 3 3 3 3", "--target S --s 2 2 2 2",
    "--target S --e 90 90 90 90", "--target S --p 0.1x4", "--target S --p 0.1 0.1 0.1 0.2", "--target S --score l1",
    "--target S --score act", "--target S --score ebn", "--target S --score ebn-signed", "--target S --prune-bn keep",
    "--target S --scratch", "--target L --scratch", "--target L --scratch --p 0.1x4", "--target L --scratch --score l1",
    "--target L --noise zero", "--target L --noise gauss", "--target S --noise zero", "--target R --noise zero",
    "--target L --noise zero --noise-batches 50", "--target L --noise zero --noise-batches 50 --noise-filters all",
    "--target L --noise zero --noise-batches 50 --noise-restore", "--target L --noise zero --test-batch-size 256",
    "--target L --noise zero --noise-batches 50 --noise-filters all --noise-restore", "--target L --noise zero --r 4",
    "--target L --noise zero --score l1", "--target L --noise zero --p 0.1x4",
    "--target L --noise zero --lr 0.01 --epochs 400",
    "--target S --p 0.3333333x4", "--target S --p 0.3333334x4", "--lr 0.0012345678", "--lr 0.0012345679",
]


def test_distinct_options_give_distinct_directories():
    lines = collections.defaultdict(list)
    for line in VARIATIONS:
        lines[train.run_directory(train.parse_options(line.split()))].append(line)
    shared = [same for same in lines.values() if len(same) > 1]
    assert not shared


# +-- Whose run it is -------------------------------------------------------------------------------------------------+

def test_built_in_names_are_nobody_elses_and_own_names_are_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {name: train.run_directory(train.parse_options(["--dataset", name])).parts[1] for name in (
        "cifar10", "cifar100", "digits", "digits.npz", "x/digits", "./cifar10", "x/CIFAR100/", "birds/cub.v1",
        "birds/cub.v2", "birds/cub", "birds/noise-0.2", "birds/noise-0.8", "cub.npz")}
    assert all(names[name] == name for name in train.BUILT_IN) and len(set(names.values())) == len(names)
    assert not {part.lower() for name, part in names.items() if name not in train.BUILT_IN} & {*train.BUILT_IN}
    assert names["birds/noise-0.2"] == "noise-0.2" and names["cub.npz"] == "cub.npz"


@pytest.mark.parametrize("name", ("..", ".", "../..", "x/..", "/", "//", "x/../..", ""))
def test_no_name_of_data_leads_out_of_the_log_directory(name):
    directory = train.run_directory(train.parse_options(["--dataset", name, "--log-dir", "logs"]))
    assert directory.parts[0] == "logs" and ".." not in directory.parts and len(directory.parts) == 5


@pytest.fixture
def two_places(tmp_path, options):
    """Options of two data sets of one name, in two places; the second one's test labels are turned round."""
    for place, step in (("a", 1), ("b", -1)):
        (tmp_path / place).mkdir()
        np.savez(tmp_path / place / "x.npz", **{**make_arrays(), "test_y": make_arrays()["test_y"][::step]})
    short = options("--epochs", 1, "--lrs")
    return [[*short, "--dataset", str(tmp_path / place / "x.npz")] for place in "ab"]


def test_a_run_on_other_data_is_refused_finished_or_not(two_places, tmp_path, monkeypatch, capsys):
    first, second = two_places
    directory = train.run_directory(train.parse_options(first))
    assert directory == train.run_directory(train.parse_options(second))
    assert train.main(first) == 0
    (tmp_path / "listed").write_text(" ".join(second) + "\n")
    for done in (True, False):
        if not done:
            (directory / "done.json").unlink()
        before = files_of(directory)
        calls = [(second, 2), (["--runs", str(tmp_path / "listed")], 1)] + [
            (["--plan", str(tmp_path / "listed")], 2)] * done
        for argv, code in calls:
            capsys.readouterr()
            assert train.main(argv) == code
            out, err = capsys.readouterr()
            assert str(directory) in err and "data set" in err and "finished already" not in out
        after = {name: file for name, file in files_of(directory).items() if name != ".lock"}
        assert after == {name: file for name, file in before.items() if name != ".lock"}, "not even marked as failed"
        assert train.main(first) == 0, "the one whose run it is has it still"


def test_a_copy_of_the_data_elsewhere_is_the_same_data(two_places, tmp_path, capsys):
    first, second = two_places
    assert train.main(first) == 0
    (tmp_path / "b" / "x.npz").write_bytes((tmp_path / "a" / "x.npz").read_bytes())
    assert train.main(second) == 0
    assert "finished already\n" in capsys.readouterr().out


def test_as_many_classes_and_sizes_tell_data_apart_where_bytes_do_not(run, tiny, capsys):
    assert run("--epochs", 1, "--lrs") == 0
    arrays = make_arrays()
    np.savez(tiny, **{**arrays, "classes": np.append(arrays["classes"], "more")})
    assert run("--epochs", 1, "--lrs") == 2
    assert "data set" in capsys.readouterr().err


@pytest.mark.parametrize("change", ("data", "--save-epoch 1", "--tensorboard"))
@pytest.mark.parametrize("action", ("--runs", "--plan", "--status"))
def test_of_two_runs_that_would_share_a_directory_none_is_dropped_without_a_word(two_places, tmp_path, capsys, change,
                                                                                 action):
    first, second = two_places
    lines = [first, second if change == "data" else [*first, *change.split()]]
    (tmp_path / "listed").write_text("".join(shlex.join(line) + "\n" for line in lines))
    assert train.main([action, str(tmp_path / "listed")]) == 2
    assert str(train.run_directory(train.parse_options(first))) in error_line(capsys)
    (tmp_path / "listed").write_text("".join(shlex.join(line) + "\n" for line in (first, first, lines[0])))
    assert len(runs.read_runs(tmp_path / "listed", train.runs_of)) == 1


def test_a_list_of_finished_runs_reads_each_data_set_once(two_places, tmp_path, monkeypatch, capsys):
    argv = [*two_places[0], "--seeds", "1-3"]
    assert train.main(argv) == 0
    calls, load_data, crc32 = [], train.load_data, files.zlib.crc32
    monkeypatch.setattr(train, "load_data", lambda *source: calls.append("load") or load_data(*source))
    monkeypatch.setattr(files.zlib, "crc32", lambda *what: calls.append("crc") or crc32(*what))
    capsys.readouterr()
    assert train.main(argv) == 0
    assert capsys.readouterr().out.count("finished already") == 3
    assert calls == ["load"] + 4 * ["crc"]


def test_a_finished_run_on_a_built_in_data_set_fetches_nothing(tmp_path, options, monkeypatch, capsys):
    argv = options("--epochs", 1, "--lrs", "--dataset", "cifar10", "--data-dir", tmp_path)
    np.savez(tmp_path / "cifar10.npz", **make_arrays())
    assert train.main(argv) == 0
    (tmp_path / "cifar10.npz").unlink()
    monkeypatch.setattr(files, "download_cifar", lambda *_: pytest.fail("downloaded"))
    assert train.main(argv) == 0
    np.savez(tmp_path / "cifar10.npz", **make_arrays(64))
    assert train.main(argv) == 2


@pytest.mark.parametrize("more, name", [(("--save-epoch", 2), "epoch2.pt"), (("--tensorboard",), "tensorboard")])
def test_a_finished_run_says_what_it_lacks(run, capsys, more, name):
    short = ("--epochs", 3, "--lrs")
    assert run(*short) == 0 and run(*short) == 0
    assert "finished already\n" in capsys.readouterr().out
    assert run(*short, *more) == 0
    assert f"finished already, without {name}: move it away" in capsys.readouterr().out


def test_a_run_that_goes_on_says_what_it_will_lack(run, monkeypatch, capsys):
    half_done(run, monkeypatch)
    with monkeypatch.context() as patch:
        kill_before(patch, train, "train_epoch", 1)
        with pytest.raises(Killed):
            run("--save-epoch", 3)
    assert "epoch3.pt" not in capsys.readouterr().out, "that is still to come"
    assert run("--save-epoch", 2) == 0
    assert "continues after epoch 2 of 5, without epoch2.pt: move it away" in capsys.readouterr().out


# +-- The learning rate's epochs --------------------------------------------------------------------------------------+

@pytest.mark.parametrize("line, named", [
    ("", ""), ("--epochs 325 --lrs 150 300", ""), ("--lrs", ""), ("--epochs 3 --lrs 3", ""),
    ("--scale-epochs 0.08", ""),
    ("--epochs 350 --lrs 350 --scale-epochs 0.0375", ""), ("--scale-epochs 0.5 --epochs 100 --lrs 0 50", ""),
    ("--epochs 100", "--lrs 150 300"), ("--epochs 200", "--lrs 300"), ("--epochs 300", "--lrs 300"),
    ("--epochs 3 --lrs 2 4", "--lrs 4"), ("--scale-epochs 0.004", "150 300 of 325 epochs to 1 1 of 1"),
    ("--scale-epochs 0.003", "to 0 1 of 1"), ("--scale-epochs 0.01 --lrs 40 300", "to 0 3 of 3"),
    ("--scale-epochs 0.01 --lrs 260 300", "to 3 3 of 3"), ("--scale-epochs 0.04 --lrs 150 324", "to 6 13 of 13"),
    ("--epochs 165 --scale-epochs 0.006", "150 of 165 epochs to 1 2 of 1")])
def test_falls_of_the_learning_rate_that_are_lost_are_named(line, named):
    lines = runs.doubts_about_rate(train.parse_options(line.split()), train)
    assert bool(lines) == bool(named) and all("\n" not in line for line in lines)
    assert named in " ".join(lines)


def test_lost_falls_are_said_once_whatever_the_number_of_runs(run, capsys, monkeypatch):
    monkeypatch.setattr(files, "SAID", set())
    for _ in range(2):
        run("--epochs", 2, "--lrs", 1, 3, "--seeds", "1-2")
    assert "--lrs 3," in error_line(capsys)


# +-- --plan ----------------------------------------------------------------------------------------------------------+

def test_plan_counts_what_is_left_and_prints_each_line_once(run, options, tmp_path, capsys, monkeypatch):
    finished, half, to_do = ("--epochs", 2, "--lrs", 1), ("--seed", 2), ("--seed", 3, "--target", "S", *PRUNE)
    run(*finished)
    with monkeypatch.context() as patch:
        kill_before(patch, train, "train_epoch", 3)
        with pytest.raises(Killed):
            run(*half)
    lines = [" ".join(options(*more)) for more in (half, finished, to_do, half, to_do)]
    (tmp_path / "plan").write_text("\n\n".join(lines) + "\n  " + lines[0] + " --optimizer sgd\n")
    capsys.readouterr()
    assert train.main(["--plan", str(tmp_path / "plan")]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [lines[0], lines[2]]
    assert [int(n) for n in re.findall(r"\d+", err)] == [3, 1, 1, 2, (5 - 2) + 5], err


def test_plan_prints_nothing_when_nothing_is_left(run, options, tmp_path, capsys):
    run("--epochs", 1, "--lrs")
    (tmp_path / "plan").write_text(" ".join(options("--epochs", 1, "--lrs")) + "\n")
    capsys.readouterr()
    assert train.main(["--plan", str(tmp_path / "plan")]) == 0
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1


@pytest.mark.parametrize("content", [None, b"--model vgg12\n", b"--dataset 'open quote\n", b"\xff\xfe\x00\n"])
def test_a_bad_plan_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "plan").write_bytes(content)
    assert train.main(["--plan", str(tmp_path / "plan")]) == 2
    error_line(capsys)


# +-- Mistakes --------------------------------------------------------------------------------------------------------+

@pytest.mark.parametrize("more, named", [
    ("--model vgg12", "vgg12"), ("--target M", "M"), ("--score l3", "l3"), ("--noise pink --target S", "pink"),
    ("--optimizer lion", "lion"), ("--device tpu", "tpu"), ("--frobnicate", "--frobnicate"), ("--r", "--r"),
    ("--seed x", "x"), ("--seed -1", "--seed"), ("--width 0", "--width"), ("--width nan", "--width"),
    ("--lr 0", "--lr"), ("--lr inf", "--lr"), ("--epochs 0", "--epochs"), ("--batch-size 0", "--batch-size"),
    ("--r 0", "--r"), ("--val-split -1", "--val-split"), ("--val-split 96", "--val-split"), ("--lrs -3", "--lrs"),
    ("--scale-epochs 0", "--scale-epochs"), ("--scale-epochs nan", "--scale-epochs"),
    ("--weight-decay -1", "--weight-decay"),
    ("--target S --s 1 2 --e 3 --p 0.5", "--s"), ("--target S --s 1 --e 3 --p 0.5 0.5", "--p"),
    ("--target S --s 1 --e 3 --p 1.2", "1.2"), ("--target S --s 1 --e 3 --p -0.2", "-0.2"),
    ("--target S --s 1 --e 3 --p nan", "nan"), ("--target S --s 1 --e 3 --p 1", "--p 1"),
    ("--target S --s 3 --e 1 --p 0.5", "3"), ("--target S --s -1 --e 1 --p 0.5", "-1"),
    ("--target S --s 0x19 --e 3x19 --p 0.5x19", "19"), ("--target S --s 0 --e 5 --p 0.5", "5"),
    ("--target S --s 0x0 --e 3x0 --p 0.5x0", "x0"), ("--target S --s 0 --e 3 --p 0.5xx", "0.5xx"),
    ("--noise-batches 3", "--noise"), ("--noise-filters all", "--noise"), ("--noise-restore", "--noise"),
    ("--noise zero", "--noise"), ("--target S --s 0 --e 3 --p 0.5 --noise zero --noise-batches 0", "--noise-batches"),
    ("--target S --s 0 --e 3 --p 0.5 --noise gauss --noise-restore", "--noise-restore"),
    ("--target S --s 0 --e 3 --p 0.5 --noise zero --scratch", "--scratch"),
    ("--target S --s 0 --e 3 --p 0.5 --noise zero --prune-bn keep", "--prune-bn"), ("--scratch", "--scratch"),
    ("--seeds 3-1", "3-1"), ("--seeds 1-2,4-3", "4-3"), ("--seeds ,", ","), ("--seeds 1--3", "1--3"),
    ("--save-epoch 6", "--save-epoch"), ("--precision tf32", "tf32"), ("--dataset nowhere", "nowhere"),
    ("--dataset nowhere.npz", "--dataset nowhere.npz: no such thing"), ("--lr 1e7", "below a million"),
    ("--seed 4294967296", "2^32"),
    ("--r 4", "--r does nothing without --target"), ("--score l1", "--score does nothing without --target"),
    ("--runs list", "beside a list"), ("--status list --width 0.5", "beside a list"),
])
def test_a_mistake_is_one_line_that_names_it(run, capsys, more, named):
    assert run(*more.split()) == 2
    assert named in error_line(capsys)


def test_cuda_is_refused_where_there_is_none(run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("--device", "cuda") == 2
    assert "cuda" in error_line(capsys)


def test_bad_data_is_one_line_and_leaves_no_log(run, directory, tiny, capsys):
    for change, named in ((lambda a: a.update(test_y=a["test_y"] + 1), "test_y"),
                          (lambda a: a.update(train_x=a["train_x"][..., :1]), "train_x")):
        arrays = make_arrays()
        change(arrays)
        np.savez(tiny, **arrays)
        assert run() == 2
        assert named in error_line(capsys)
    tiny.write_bytes(tiny.read_bytes()[:5000])
    assert run() == 2
    assert str(tiny) in error_line(capsys)
    assert not (directory() / "config.json").exists()


def half_done(run, monkeypatch, *options, epochs=2):
    with monkeypatch.context() as patch:
        kill_before(patch, train, "train_epoch", epochs + 1)
        with pytest.raises(Killed):
            run(*options)


@pytest.mark.parametrize("damage", ("truncated", "text", "empty", "another model", "not a dict"))
def test_a_damaged_checkpoint_is_one_line_and_stays_as_it_is(run, directory, monkeypatch, capsys, damage):
    half_done(run, monkeypatch)
    path = directory() / "checkpoint.pt"
    content = path.read_bytes()
    if damage in ("another model", "not a dict"):
        state = torch.load(path, weights_only=True)
        state["model"] = {"stem.conv.weight": torch.zeros(3)}
        torch.save(state if damage == "another model" else torch.zeros(3), path)
    else:
        path.write_bytes({"truncated": content[:len(content) // 2], "text": b"hello", "empty": b""}[damage])
    before = {name: file for name, file in files_of(directory()).items() if name != ".lock"}
    capsys.readouterr()
    assert run() == 1
    assert str(path) in error_line(capsys)
    assert str(path) in (directory() / "failed.txt").read_text(), "for --status"
    after = files_of(directory())
    assert {name: file for name, file in after.items() if name not in (".lock", "failed.txt")} == before


@pytest.mark.parametrize("damage", ("damaged", "missing", "a list", "another data set"))
def test_a_run_whose_config_does_not_match_is_refused_in_one_line(run, directory, tiny, monkeypatch, capsys, damage):
    half_done(run, monkeypatch)
    config = directory() / "config.json"
    if damage == "another data set":
        np.savez(tiny, **{**make_arrays(), "train_y": make_arrays()["train_y"][::-1]})
    elif damage == "missing":
        config.unlink()
    else:
        config.write_text({"damaged": '{"options": ', "a list": '["options"]'}[damage])
    before = (directory() / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert run() == 2
    assert str(directory()) in error_line(capsys)
    assert (directory() / "checkpoint.pt").read_bytes() == before


def test_a_log_directory_below_a_file_is_one_line(run, tiny, capsys):
    assert run("--log-dir", tiny / "logs") == 1
    assert str(tiny) in error_line(capsys)


def test_a_read_only_log_directory_is_one_line(run, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", refuse)
    assert run() == 1
    assert "Read-only" in error_line(capsys)


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before(run, directory, monkeypatch, capsys):
    assert run(*PRUNE, logs="whole") == 0
    fsync, written = os.fsync, []

    def full(file):
        path = os.readlink(f"/proc/self/fd/{file}")
        written.extend([path] * ("checkpoint.pt" in path))
        if len(written) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run(*PRUNE) == 1
    assert "No space left" in error_line(capsys)
    assert torch.load(directory(*PRUNE) / "checkpoint.pt", weights_only=True)["epoch"] == 2
    assert not [p.name for p in directory(*PRUNE).iterdir() if "partial" in p.name], "no half-written file is left"
    assert run(*PRUNE) == 0
    assert without_seconds(directory(*PRUNE)) == without_seconds(directory(*PRUNE, logs="whole"))


def test_a_disk_that_fills_up_at_the_log_line_loses_nothing(run, directory, monkeypatch, capsys):
    assert run(logs="whole") == 0
    real_open = builtins.open

    def full_when_appending(file, mode="r", *rest, **more):
        return real_open("/dev/full" if mode.startswith("a") else file, mode, *rest, **more)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full_when_appending)
        assert run() == 1
    assert "No space left" in error_line(capsys)
    assert run() == 0
    assert without_seconds(directory()) == without_seconds(directory(logs="whole"))


def test_a_directory_in_use_by_another_process_is_one_line(run, directory, capsys):
    lock = files.lock_directory(directory()).name
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1], 'w'); "
                               "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()", lock],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        assert run() == 1
        assert str(directory()) in error_line(capsys)
    finally:
        holder.communicate()
    assert run("--epochs", 5) == 0, "the lock goes with its process"


def test_a_diverged_run_is_one_line_and_keeps_the_checkpoint_before(run, directory, monkeypatch, capsys):
    options = ("--optimizer", "sgd", "--lr", 0.01)
    train_epoch, calls = train.train_epoch, []

    def diverge_in_the_third(model, data, optimizer, *rest, **more):
        calls.append(1)
        if len(calls) == 3:
            optimizer.param_groups[0]["lr"] = 1e30
        return train_epoch(model, data, optimizer, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", diverge_in_the_third)
        assert run(*options) == 1
    assert "--lr" in error_line(capsys)
    state = torch.load(directory(*options) / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2 == len(read_lines(directory(*options)))
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
def test_a_huge_learning_rate_ends_in_one_line_or_a_finite_log(run, directory, capsys, optimizer):
    options = ("--optimizer", optimizer, "--lr", 9e5, *PRUNE, "--score", "act", "--batch-size", 16)
    code = run(*options)
    if code:
        assert code == 1 and "--lr" in error_line(capsys)
    assert all(np.isfinite(record["train_loss"]) for record in read_lines(directory(*options)))


def test_an_interrupted_run_is_one_line(run, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_epoch", interrupt)
    assert run() == 130
    assert "interrupted" in error_line(capsys)


def test_a_machine_without_git_can_train(run, directory, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run("--epochs", 1, "--lrs") == 0
    assert json.loads((directory("--epochs", 1, "--lrs") / "config.json").read_text())["git"] is None


# +-- No needless waiting ---------------------------------------------------------------------------------------------+

class ReadBacks(TorchDispatchMode):
    """Lists the operations that would make a GPU wait: values, or sizes that depend on them, wanted by the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"):
            self.seen.append(name)
        if name in ("index", "index_put", "index_put_") and any(
                i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self.seen.append(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def read_backs(monkeypatch):
    """A ReadBacks that also sees the methods which, on a CPU tensor, dispatch nothing."""
    mode = ReadBacks()
    for name in ("tolist", "cpu", "numpy", "__array__"):
        def counted(tensor, *args, function=getattr(torch.Tensor, name), name=name, **kwargs):
            mode.seen.append(name)
            with torch.utils._python_dispatch._disable_current_modes():  # its own inner calls are the same wait
                return function(tensor, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, counted)
    return mode


def test_the_read_back_counter_sees_every_way_to_wait(read_backs):
    x = torch.arange(3.0)
    waits = [lambda: x.sum().item(), lambda: bool(x[0] > 1), lambda: float(x[0]), x.tolist, x.cpu, x.numpy, x.nonzero,
             lambda: x[x > 1], lambda: int(x[1]), lambda: x.__setitem__(x > 1, 0)]
    for i, wait in enumerate(waits, 1):
        with read_backs:
            wait()
        assert len(read_backs.seen) == i, f"wait {i}: {read_backs.seen}"


EPOCH = ("--batch-size", "10", "--target", "S", "--width", "0.06")


@pytest.mark.parametrize("more", [
    ("--model", "vgg11"), ("--model", "resnet20"), ("--model", "resnet18", "--score", "act"),
    ("--model", "resnet20", "--augment"), ("--model", "vgg11", "--noise", "zero", "--noise-batches", "5"),
    ("--model", "vgg11", "--noise", "zero", "--noise-batches", "5", "--noise-restore"),
    ("--model", "resnet20", "--noise", "gauss", "--noise-batches", "50"),
], ids=" ".join)
def test_an_epoch_of_training_never_waits_for_the_device(read_backs, more):
    setup = training_setup(*EPOCH, *more)
    model, _, _, args, _ = setup
    hooks, within = {}, []
    for block in model.prunable:
        train.prune_block(block, torch.tensor([0]))
    if args.noise != "none":
        block, random = model.prunable[-1], torch.Generator().manual_seed(0)
        state = train.new_noise(block)
        train.start_noise(block, state, torch.tensor([0]), args)
        hooks["before_batch"] = lambda training: train.noise_pass(block, state, args, random, training)

    def after_batch():
        if args.noise != "none":
            train.end_noise_if_due(block, state, args, args.noise_batches)
        within.append(len(read_backs.seen))

    with read_backs:
        train.train_epoch(*setup, 0, **hooks, after_batch=after_batch)
    assert len(within) == 10 and not read_backs.seen, read_backs.seen


def test_an_evaluation_never_waits_for_the_device(read_backs):
    model, data, _, args, _ = training_setup(*EPOCH, "--test-batch-size", "10")
    with read_backs:
        train.evaluate(model, data, "test", args)
    assert not read_backs.seen


@pytest.mark.parametrize("more", [(), ("--val-split", 10), ("--target", "S", "--p", 0.5, "--s", 9, "--e", 9, "--r", 1,
                                                            "--epochs", 10)])
def test_an_epoch_without_pruning_meets_the_device_once(run, monkeypatch, read_backs, more):
    monkeypatch.setattr(ops, "may_fold", lambda *_: False)  # for a CPU only, where nothing waits
    within, between = [], files.save_checkpoint

    def epoch(*call, function=train.train_epoch, **rest):
        within.append([])
        return function(*call, **rest)

    def end(*call):  # what is saved has to be read
        within[-1] += read_backs.seen
        with torch.utils._python_dispatch._disable_current_modes():
            between(*call)
        read_backs.seen.clear()

    monkeypatch.setattr(train, "train_epoch", epoch)
    monkeypatch.setattr(files, "save_checkpoint", end)
    with read_backs:
        assert run(*more) == 0
    assert len(within) >= 5 and within[1:4] == [["tolist"]] * 3


@pytest.mark.parametrize("more, splits", [
    ((), ["test"] * 5),
    (PRUNE, ["test"] * 7),  # 8 filters: 8, 7, 6 and 6, 4 after epochs 1, 2, 3 and 2, 3; two events
    (("--target", "S", "--s", 1, "--e", 4, "--p", 0.2, "--r", 1), ["test"] * 6),  # 8, 8, 8, 7: one event
    (("--target", "S", "--s", 1, "--e", 4, "--p", 0, "--r", 1), ["test"] * 5),
    (("--val-split", 10), ["test", "val"] * 5),
    ((*PRUNE, "--noise", "zero", "--noise-batches", 2), ["test"] * 10),
])
def test_the_test_set_is_evaluated_once_an_epoch_and_twice_where_filters_go(run, monkeypatch, more, splits):
    evaluate, calls = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *call, **more: calls.append(call[2]) or evaluate(*call, **more))
    assert run(*more) == 0
    assert calls == splits
