"""Whatever befalls a run, it ends as an undisturbed one would, or one line says what is wrong and nothing is lost."""
import contextlib
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import without_seconds
from test_runs import PRUNE, error_line, half_done

from gst_ext import files, runs
import train

RUN = (*PRUNE, "--score", "act", "--batch-size", 16, "--augment", "--val-split", 10)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "SILENCE", 0.5)  # a claim that was cut says nothing of its host


def result(directory):
    """What a run found, without the times."""
    done = json.loads((directory / "done.json").read_text())
    state = files.read_checkpoint(directory / "checkpoint.pt")
    return without_seconds(directory), {k: v for k, v in done.items() if k != "seconds"}, state["model"]


def same(a, b):
    """Whether two values of a checkpoint's kinds are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


# +-- Signals ---------------------------------------------------------------------------------------------------------+

class Halved:
    """A file that writes the first half, then has its process killed, when the moment is that write."""

    def __init__(self, file, event):
        self.file, self.event = file, event

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.event("write")
        self.file.write(content[half:])


def forked(argv, moment, number, log):
    """train.main(argv) in a forked process that sends itself a signal at its moment-th event; returns its status.

    Events are what a run does one after another: a batch's forward pass, its loss, an optimiser's step, and each of
    the stages of writing each file, a half-written one among them.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BaseException):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        counter, unlink, stopped = itertools.count(1), pathlib.Path.unlink, []

        def event(name):
            if next(counter) == moment:
                print("event:", name, flush=True)
                stopped.append(number)
                os.kill(os.getpid(), number)

        def unlink_when_told_again(path, **more):  # a second SIGTERM while it cleans up
            if stopped == [signal.SIGTERM]:
                os.kill(os.getpid(), signal.SIGTERM)
            unlink(path, **more)

        pathlib.Path.unlink = unlink_when_told_again

        for module, name in ((train, "predict"), (F, "cross_entropy"), (torch.optim.SGD, "step"), (torch, "save"),
                             (os, "fsync"), (os, "replace"), (files, "append_line"), (os, "utime")):
            def seen(*arguments, function=getattr(module, name), name=name, **more):
                event(name)
                return function(*arguments, **more)
            setattr(module, name, seen)
        files.open = lambda path, mode="r", **more: (Halved(open(path, mode, **more), event) if mode in ("wb", "a", "x")
                                                     else open(path, mode, **more))
        code = train.main(argv)
        print("events:", next(counter) - 1, flush=True)
        sys.stderr.flush()
        os._exit(code)
    os._exit(99)


@pytest.fixture
def whole(run, directory):
    """The result of the run that nothing disturbs."""
    assert run(*RUN, logs="whole") == 0
    return result(directory(*RUN, logs="whole"))


def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_had_not_been(options, directory, tmp_path, whole):
    chance, log = random.Random(0), tmp_path / "output"
    assert forked(options(*RUN, logs="count"), None, None, log) == 0
    events = int(log.read_text().rpartition("events:")[2])
    assert events > 80
    kills, points = 0, set()
    for place in itertools.count():
        argv = options(*RUN, logs=f"logs{place}")
        while kills < 20:
            code = forked(argv, chance.randrange(1, events // 2), signal.SIGKILL, log)
            if code == 0:
                break
            assert code == -signal.SIGKILL, log.read_text()
            points.add(log.read_text().split("event: ")[1].split()[0])
            kills += 1
        assert code == 0 or train.main(argv) == 0
        assert same(result(directory(*RUN, logs=f"logs{place}")), whole)
        assert not list(directory(*RUN, logs=f"logs{place}").glob("*.partial"))
        if kills == 20:
            break
    assert {"predict", "write"} < points and len(points) >= 5, points


def test_a_process_of_many_runs_killed_at_random_moments_ends_as_if_it_had_not_been(options, directory, tmp_path, run):
    chance, log, seeds = random.Random(1), tmp_path / "output", ("--seeds", "1-3", "--at-once", 3, "--epochs", 4)
    kills = 0
    while (code := forked(options(*RUN, *seeds), chance.randrange(60, 200), signal.SIGKILL, log)) != 0:
        assert code == -signal.SIGKILL, log.read_text()
        kills += 1
    assert kills >= 2
    for seed in (1, 2, 3):
        assert run(*RUN, "--epochs", 4, "--seed", seed, logs="whole") == 0
        assert same(*(result(directory(*RUN, "--epochs", 4, "--seed", seed, logs=logs)) for logs in ("logs", "whole")))


@pytest.mark.parametrize("many", (False, True))
def test_a_run_told_to_stop_says_so_in_one_line_and_goes_on_later(options, directory, tmp_path, whole, many):
    chance, log = random.Random(2), tmp_path / "output"
    argv = options(*RUN, *(("--seeds", "1-2", "--at-once", 2) if many else ()))
    codes, stops = {signal.SIGTERM: 143, signal.SIGINT: 130}, 0
    while (code := forked(argv, chance.randrange(2, 140 if many else 70), number := list(codes)[stops % 2], log)) != 0:
        stops += 1
        lines = [line for line in log.read_text().splitlines() if line.startswith("train.py: ")]
        assert code == codes[number] and len(lines) == 1 and "the same command goes on" in lines[0], log.read_text()
        assert "Traceback" not in log.read_text()
        assert runs.state_of(directory(*RUN)) in ("waiting", "done") and not (directory(*RUN) / ".claim").exists()
        assert not list(directory(*RUN).glob("*.partial"))
    assert stops >= 3 and same(result(directory(*RUN)), whole)


def test_two_processes_with_the_same_runs_share_them(options, directory, tmp_path, run):
    argv = options(*RUN, "--seeds", "1-3", "--epochs", 4)
    processes = []
    for i in range(2):
        processes.append(os.fork())
        if not processes[-1]:
            os._exit(forked(argv, None, None, tmp_path / f"output{i}"))
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes] == [0, 0]
    outputs = "".join((tmp_path / f"output{i}").read_text() for i in range(2))
    for seed in (1, 2, 3):
        assert outputs.count(f"seed{seed} epoch 4/4") == 1
        assert run(*RUN, "--epochs", 4, "--seed", seed, logs="whole") == 0
        assert same(*(result(directory(*RUN, "--epochs", 4, "--seed", seed, logs=logs)) for logs in ("logs", "whole")))


# +-- One of many runs fails ------------------------------------------------------------------------------------------+

def test_a_bug_in_one_of_many_runs_is_reported_and_noted_and_the_others_go_on(options, directory, monkeypatch, capsys,
                                                                              tmp_path):
    short = ("--epochs", 1, "--lrs")
    make_optimizer = train.make_optimizer

    def buggy(model, args):
        return 1 / 0 if args.seed == 2 else make_optimizer(model, args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "make_optimizer", buggy)
        assert train.main(options(*short, "--seeds", "1-3", "--at-once", 3)) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "ZeroDivisionError" in err and "1 of 3 runs failed" in err
    assert [runs.state_of(directory(*short, "--seed", seed)) for seed in (1, 2, 3)] == ["done", "failed", "done"]
    assert files.why_failed(directory(*short, "--seed", 2)) == "ZeroDivisionError: division by zero"

    listed = tmp_path / "fig0"
    listed.write_text(" ".join(options(*short, "--seeds", "1-3")) + "\n")
    assert train.main(["--status", str(listed)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split()[:6] == ["fig0", "3", "2", "0", "1", "0"] and "ZeroDivisionError" in out[2]
    for more, left in (((), 0), (("--retry-failed",), 1)):
        assert train.main(["--plan", str(listed), *more]) == 0
        assert len(capsys.readouterr().out.splitlines()) == left
    assert train.main(options(*short, "--seed", 2)) == 0
    assert not (directory(*short, "--seed", 2) / "failed.txt").exists(), "forgotten"


# +-- Disks -----------------------------------------------------------------------------------------------------------+

@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB, and what remounts it; only root can have one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small tmpfs: run this as root")
    try:
        yield path, lambda how: subprocess.run(["mount", "-o", f"remount,{how}", path], check=True)
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up_or_is_read_only_is_one_line_and_loses_nothing(run, directory, monkeypatch, capsys, whole,
                                                                            small_disk):
    disk, remount = small_disk
    place = directory(*RUN, logs="disk/logs")
    train_epoch, epochs = train.train_epoch, []

    def fill_up(*arguments, **more):
        epochs.append(1)
        if len(epochs) == 3:
            with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
        return train_epoch(*arguments, **more)

    def refused(what):
        capsys.readouterr()
        assert run(*RUN, logs="disk/logs") == 1
        assert what in error_line(capsys)
        assert files.read_checkpoint(place / "checkpoint.pt")["epoch"] == 2 == len(without_seconds(place))

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", fill_up)
        refused("No space left")
    refused("No space left")
    (disk / "filler").unlink()
    remount("ro")
    refused("Read-only")
    remount("rw")
    assert run(*RUN, logs="disk/logs") == 0
    assert same(result(place), whole)


# +-- Checkpoints -----------------------------------------------------------------------------------------------------+

@pytest.fixture
def checkpoint(run, directory, monkeypatch):
    """The checkpoint of a half-done run."""
    half_done(run, monkeypatch, *RUN)
    return directory(*RUN) / "checkpoint.pt"


def test_no_flipped_bit_and_no_cut_changes_what_a_checkpoint_holds(checkpoint):
    content, state, chance = checkpoint.read_bytes(), files.read_checkpoint(checkpoint), random.Random(3)
    refused = 0
    for i in range(150):
        damaged = bytearray(content)
        if i % 3:
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(content)):]
        checkpoint.write_bytes(damaged)
        try:
            assert same(files.read_checkpoint(checkpoint), state), f"damage {i}"
        except AssertionError:
            raise
        except Exception:
            refused += 1
    assert refused > 100, "what lies between the records changes nothing"


def test_a_flipped_bit_in_a_weight_is_one_line_and_the_checkpoint_stays(run, checkpoint, directory, capsys):
    weight = files.read_checkpoint(checkpoint)["model"]["linear.weight"].numpy().tobytes()
    damaged = bytearray(checkpoint.read_bytes())
    damaged[damaged.index(weight) + 5] ^= 1
    checkpoint.write_bytes(damaged)
    capsys.readouterr()
    assert run(*RUN) == 1
    line = error_line(capsys)
    assert str(checkpoint) in line and "checksum" in line
    assert checkpoint.read_bytes() == damaged and not (directory(*RUN) / "done.json").exists()


@pytest.mark.parametrize("change", [
    lambda s: s.pop("noise"), lambda s: s.pop("log"), lambda s: s["generators"].pop("augment"),
    lambda s: s.update(epoch=s["epoch"] + 1), lambda s: s.update(epoch="2"), lambda s: s["log"].pop(),
    lambda s: s.update(log=["{"]), lambda s: s.update(log=["[]", "[]"]), lambda s: s.update(model=None),
    lambda s: s["optimizer"]["param_groups"].clear(), lambda s: s["model"].pop("linear.bias"),
])
def test_a_checkpoint_of_another_version_is_one_line_and_stays(run, checkpoint, capsys, change):
    state = files.read_checkpoint(checkpoint)
    change(state)
    torch.save(state, checkpoint)
    before = checkpoint.read_bytes()
    capsys.readouterr()
    assert run(*RUN) == 1
    assert str(checkpoint) in error_line(capsys) and checkpoint.read_bytes() == before


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_malicious_checkpoint_is_refused_in_one_line_and_does_not_run(run, checkpoint, tmp_path, capsys):
    state = files.read_checkpoint(checkpoint)
    torch.save({**state, "step": Malicious(tmp_path / "harm")}, checkpoint)
    capsys.readouterr()
    assert run(*RUN) == 1
    assert str(checkpoint) in error_line(capsys) and not (tmp_path / "harm").exists()
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "harm").exists(), "it would have run"


# +-- TensorBoard -----------------------------------------------------------------------------------------------------+

def test_tensorboard_shows_the_epochs_of_a_continued_run_once(run, directory, monkeypatch):
    pytest.importorskip("tensorboard", reason="pip install tensorboard, then this test runs")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    half_done(run, monkeypatch, *PRUNE, "--tensorboard")
    assert run(*PRUNE, "--tensorboard") == 0
    events = EventAccumulator(str(directory(*PRUNE) / "tensorboard"))
    events.Reload()
    records = [json.loads(line) for line in without_seconds(directory(*PRUNE))]
    for name in ("train_loss", "test_acc", "stability"):
        expected = [(record["epoch"], record[name]) for record in records if record[name] is not None]
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)] == expected
    assert [e.value for e in events.Scalars("live_filters")] == [sum(record["live"]) for record in records]


def test_tensorboard_that_is_not_installed_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run("--tensorboard") == 2
    assert "pip install tensorboard" in error_line(capsys)
