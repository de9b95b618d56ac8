"""Whatever stops a run, it ends as an undisturbed one would; a damaged checkpoint is one line."""
import contextlib
import itertools
import os
import pathlib
import random
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import without_seconds
from test_runs import PRUNE, error_line, half_done, plain, result

from gst_ext import rundir
import train

RUN = (*PRUNE, "--score", "act", "--batch-size", 16, "--augment", "--val-split", 10)


# --- Signals ---

class Halved:
    """A file that writes the first half and calls event, which may kill, before the second."""

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
    """Runs train.main(argv) in a process that sends itself a signal at its moment-th event.

    Events are what a run does: a batch's forward pass, its loss, an optimizer's step, and each of
    the stages of writing each file, a half-written one among them. Returns the exit status; what
    the process prints is in the file `log`.
    """
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(BaseException):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
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
        for module, name in ((train, "predict"), (F, "cross_entropy"), (torch.optim.SGD, "step"),
                             (torch, "save"), (os, "fsync"), (os, "replace"),
                             (rundir, "append_line")):
            def seen(*arguments, function=getattr(module, name), name=name, **more):
                event(name)
                return function(*arguments, **more)
            setattr(module, name, seen)
        rundir.open = lambda path, mode="r": (
            Halved(open(path, mode), event) if mode in ("wb", "a") else open(path, mode))
        code = train.main(argv)
        print("events:", next(counter) - 1, flush=True)
        sys.stderr.flush()
        os._exit(code)
    os._exit(99)


CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("numbers, wanted", [((signal.SIGKILL,), 20),
                                             ((signal.SIGTERM, signal.SIGINT), 8)])
def test_a_run_stopped_at_random_moments_ends_as_if_it_had_not_been(
        run, options, directory, tmp_path, numbers, wanted):
    chance, log = random.Random(0), tmp_path / "output"
    assert run(*RUN, logs="whole") == 0  # here, so that each fork need not load the libraries
    assert forked(options(*RUN, logs="count"), None, None, log) == 0
    events, whole = int(log.read_text().split("events:")[1]), result(directory(*RUN, logs="whole"))
    assert events > 80
    stops, points = 0, set()
    for place in itertools.count():
        argv, path = options(*RUN, logs=f"logs{place}"), directory(*RUN, logs=f"logs{place}")
        while stops < wanted:
            number = numbers[stops % len(numbers)]
            code = forked(argv, chance.randrange(1, events // 2), number, log)
            if code == 0:
                break
            text = log.read_text()
            assert code == CODES[number], text
            assert rundir.run_status(path) in ("waiting", "done"), "no lock is left"
            if number != signal.SIGKILL:
                line, = (line for line in text.splitlines() if line.startswith("train.py: "))
                assert "the same command continues" in line and "Traceback" not in text
                assert ("terminated" in line) == (number == signal.SIGTERM)
                assert not list(path.glob("*.partial"))
            points.add(text.split("event: ")[1].split()[0])
            stops += 1
        assert code == 0 or train.main(argv) == 0
        assert result(path) == whole and not list(path.glob("*.partial"))
        if stops == wanted:
            break
    assert "predict" in points and len(points) >= 3 + wanted // 10, points


def test_two_processes_with_the_same_runs_share_them(options, directory, tmp_path, run):
    processes = []
    for i in range(2):
        processes.append(os.fork())
        if not processes[-1]:
            os._exit(forked(options(*RUN, "--seeds", "1-3"), None, None, tmp_path / f"output{i}"))
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0]
    outputs = "".join((tmp_path / f"output{i}").read_text() for i in range(2))
    for seed in (1, 2, 3):
        assert outputs.count(f"seed{seed} epoch 5/5") == 1
    assert run(*RUN, "--seed", 2, logs="whole") == 0
    assert result(directory(*RUN, "--seed", 2)) == result(
        directory(*RUN, "--seed", 2, logs="whole"))


# --- Damaged checkpoints ---

@pytest.fixture
def checkpoint(run, directory, monkeypatch, capsys):
    """The checkpoint of a half-done run."""
    half_done(run, monkeypatch, *RUN)
    capsys.readouterr()
    return directory(*RUN) / "checkpoint.pt"


def test_no_flipped_bit_and_no_cut_changes_what_a_checkpoint_holds(checkpoint):
    content, state = checkpoint.read_bytes(), plain(rundir.load_checkpoint(checkpoint))
    chance, refused = random.Random(3), 0
    for i in range(30):
        damaged = bytearray(content)
        if i % 3:
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del damaged[chance.randrange(len(content)):]
        checkpoint.write_bytes(damaged)
        try:
            loaded = rundir.load_checkpoint(checkpoint)
        except Exception:
            refused += 1
        else:
            assert plain(loaded) == state, f"damage {i}"
    assert refused > 20, "what lies between the records changes nothing"


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_damaged_checkpoint_is_one_line_and_stays_as_it_is(
        run, checkpoint, directory, tmp_path, capsys):
    content, state = checkpoint.read_bytes(), rundir.load_checkpoint(checkpoint)
    flipped = bytearray(content)
    flipped[content.index(state["model"]["linear.weight"].numpy().tobytes()) + 5] ^= 1
    lines = without_seconds(directory(*RUN))

    def damages():
        yield from (flipped, content[:len(content) // 2], b"hello", b"")
        for new in ([1], state | {"model": {"stem.conv.weight": torch.zeros(3)}},
                    state | {"noise": Malicious(tmp_path / "harm")}):
            torch.save(new, checkpoint)
            yield checkpoint.read_bytes()
        for change in (
                lambda s: s.pop("optimizer"), lambda s: s.pop("log"), lambda s: s["log"].pop(),
                lambda s: s["generators"].pop("augment"), lambda s: s.update(epoch=3),
                lambda s: s.update(epoch="2"), lambda s: s.update(log=["{"]),
                lambda s: s.update(log=["[]", "[]"]), lambda s: s.update(model=None),
                lambda s: s["optimizer"]["param_groups"].clear(),
                lambda s: s["model"].pop("linear.bias")):
            checkpoint.write_bytes(content)
            new = rundir.load_checkpoint(checkpoint)
            change(new)
            torch.save(new, checkpoint)
            yield checkpoint.read_bytes()

    for i, damage in enumerate(damages()):
        checkpoint.write_bytes(damage)
        assert run(*RUN) == 1, i
        line = error_line(capsys)
        assert str(checkpoint) in line and ("checksum" in line or i != 0), (i, line)
        assert str(checkpoint) in rundir.failure_reason(directory(*RUN)), "for --status"
        assert checkpoint.read_bytes() == damage and without_seconds(directory(*RUN)) == lines
    assert not (tmp_path / "harm").exists()
    torch.save(Malicious(tmp_path / "harm"), checkpoint)
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "harm").exists(), "it would have been made"
