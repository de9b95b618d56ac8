"""Many runs in one process: each is what it would be alone, whatever the others do, whenever the process is killed."""
import contextlib
import json
import pathlib
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import needs_gpu, without_seconds
from test_runs import PRUNE, Killed, kill_before

from gst_ext import files, graphs, runs
import train

LISTED = {  # networks, precisions, noise and random targets: whatever a run could leave behind for its neighbour
    "random": ("--seed", 3, "--target", "R", *PRUNE[2:]),
    "none": ("--target", "none"),
    "bf16": ("--precision", "bf16", "--score", "act", "--batch-size", 16, *PRUNE, "--epochs", 7),
    "gauss": (*PRUNE, "--target", "L", "--noise", "gauss", "--noise-batches", 4),
    "vgg": ("--model", "vgg11", "--width", 0.05, "--augment", "--val-split", 16, *PRUNE, "--epochs", 4),
    "deterministic": ("--deterministic", *PRUNE),
}


@pytest.fixture
def listed(tmp_path, options):
    """Writes the runs of LISTED, or those named, to a file for --runs; their logs go to `logs`."""
    def write(logs="together", names=LISTED):
        path = tmp_path / "listed"
        path.write_text("".join(shlex.join(options(*LISTED[name], logs=logs)) + "\n" for name in names))
        return str(path)
    return write


@pytest.fixture
def alone(run, directory):
    """What each run of LISTED leaves when it is the only one of its process."""
    found = {}
    for name, more in LISTED.items():
        assert run(*more, logs="alone") == 0
        found[name] = what_is_left(directory(*more, logs="alone"))
    return found


def what_is_left(directory):
    state = torch.load(directory / "checkpoint.pt", weights_only=True)["model"]
    summary = json.loads((directory / "done.json").read_text())
    summary.pop("seconds")
    return without_seconds(directory), summary, {name: tensor.tolist() for name, tensor in state.items()}


@pytest.mark.parametrize("at_once", (None, 2, 4, 16))
def test_each_run_is_what_it_would_be_alone(listed, alone, directory, at_once):
    more = [] if at_once is None else ["--at-once", str(at_once)]
    assert train.main(["--runs", listed(), *more]) == 0
    for name in LISTED:
        assert what_is_left(directory(*LISTED[name], logs="together")) == alone[name], name


@needs_gpu
def test_each_run_on_cuda_is_what_it_would_be_alone(tmp_path, run, options, directory):
    exact = {name: (*more, "--device", "cuda", "--deterministic") for name, more in LISTED.items()}
    together = tmp_path / "listed"
    together.write_text("".join(shlex.join(options(*more, logs="together")) + "\n" for more in exact.values()))
    assert train.main(["--runs", str(together), "--at-once", "4"]) == 0
    for name, more in exact.items():
        assert run(*more, logs="alone") == 0
        assert what_is_left(directory(*more, logs="together")) == what_is_left(directory(*more, logs="alone")), name


def test_runs_at_once_take_turns_at_every_epoch(listed, monkeypatch):
    turns, train_epoch = [], train.train_epoch

    def spy(model, *rest, **more):
        turns.append(id(model))
        return train_epoch(model, *rest, **more)

    monkeypatch.setattr(train, "train_epoch", spy)
    assert train.main(["--runs", listed(names=("random", "none", "deterministic")), "--at-once", "2"]) == 0
    assert len(turns) == 15 and len(set(turns)) == 3
    assert turns[:10] == turns[:2] * 5 and turns[10:] == turns[10:11] * 5, "the third starts when two have ended"


def test_the_data_of_runs_at_once_is_loaded_once(listed, monkeypatch):
    loads, put_on_device = [], train.put_on_device
    monkeypatch.setattr(train, "put_on_device", lambda *call, **m: loads.append(call) or put_on_device(*call, **m))
    assert train.main(["--runs", listed(names=("random", "none", "deterministic")), "--at-once", "3"]) == 0
    assert len(loads) == 1


@pytest.mark.parametrize("at_once", (1, 3, 6))
def test_a_run_that_fails_leaves_the_others_as_they_are(listed, alone, directory, monkeypatch, capsys, at_once):
    train_epoch, calls = train.train_epoch, []

    def diverge(model, data, optimizer, args, *rest, **more):
        if args.target == "R":
            calls.append(1)
            if len(calls) == 3:
                optimizer.param_groups[0]["lr"] = 1e30
        return train_epoch(model, data, optimizer, args, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", diverge)
        assert train.main(["--runs", listed(), "--at-once", str(at_once)]) == 1
    error = capsys.readouterr().err
    assert error.count("lower --lr") == 1 and "1 of 6 runs failed" in error
    for name in set(LISTED) - {"random"}:
        assert what_is_left(directory(*LISTED[name], logs="together")) == alone[name], name
    failed = directory(*LISTED["random"], logs="together")
    assert not (failed / "done.json").exists() and len(without_seconds(failed)) == 2
    assert train.main(["--runs", listed(), "--at-once", str(at_once)]) == 0, "it goes on where it stood"
    assert what_is_left(failed) == alone["random"]


@pytest.mark.parametrize("module, point, call", [(files, "save_checkpoint", 4), (files, "append_line", 7),
                                                 (train, "train_epoch", 9), (files, "write_json", 8)])
def test_a_kill_in_the_midst_of_many_runs_loses_none(listed, alone, directory, monkeypatch, module, point,
                                                      call):
    with monkeypatch.context() as patch:
        kill_before(patch, module, point, call)
        with pytest.raises(Killed):
            train.main(["--runs", listed(), "--at-once", "3"])
    assert train.main(["--runs", listed(), "--at-once", "3"]) == 0
    for name in LISTED:
        assert what_is_left(directory(*LISTED[name], logs="together")) == alone[name], name


def test_runs_that_do_not_fit_into_the_memory_wait_until_they_do(listed, alone, directory, monkeypatch, capsys):
    train_epoch, going = train.train_epoch, []

    def small_memory(model, *rest, **more):
        going[:] = [m for m in going if m is not model] + [model]
        if len(going) == 3:
            going.pop()
            raise torch.OutOfMemoryError
        return train_epoch(model, *rest, **more)

    def done(path, value, function=files.write_json):
        function(path, value)
        if path.name == "done.json":
            going.pop(0)  # the run whose turn was longest ago

    monkeypatch.setattr(train, "train_epoch", small_memory)
    monkeypatch.setattr(files, "write_json", done)
    names = ("random", "none", "deterministic")
    assert train.main(["--runs", listed(names=names), "--at-once", "3"]) == 0
    assert capsys.readouterr().err.count("memory holds 2 runs at once") == 1
    for name in names:
        assert what_is_left(directory(*LISTED[name], logs="together")) == alone[name], name
        assert not (directory(*LISTED[name], logs="together") / "failed.txt").exists()


def test_seeds_are_runs_of_their_own(run, directory):
    assert run(*PRUNE, "--seeds", "1,3-4", "--at-once", 2) == 0
    for seed in (1, 3, 4):
        assert run(*PRUNE, "--seed", seed, logs="alone") == 0
        assert what_is_left(directory(*PRUNE, "--seed", seed)) == what_is_left(
            directory(*PRUNE, "--seed", seed, logs="alone"))
    assert len(list(directory(*PRUNE).parent.iterdir())) == 3


@pytest.mark.parametrize("seeds", ("3-1", "x", "1-", "-3", "1--2", "", "1,,2", "1-2-3", "1-99999999"))
def test_wrong_seeds_are_one_line(run, capsys, seeds):
    assert run("--seeds", seeds) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "--seeds" in lines[0]


@pytest.mark.parametrize("peak, free, fit", [
    (10, 0, 1), (10, 12, 1), (10, 12.5, 2), (10, 100, 9), (10, 1e6, runs.AT_ONCE), (0, 5, 5)])
def test_as_many_runs_as_four_fifths_of_the_free_memory_hold(peak, free, fit):
    assert runs.fit_at_once(peak, free) == fit


# What follows looks at the turns themselves: runs that do nothing, and stand-ins for the device.

def turns_of(monkeypatch, epochs, at_once, turn, around=lambda run: contextlib.nullcontext()):
    """train_all of so many runs, one for each number of epochs, each of which calls turn(its number, shared, what
    `around` its number gives)."""
    def training(run, shared, script):
        with around(run) as more:
            for _ in range(epochs[run]):
                turn(run, shared, more)
                yield

    monkeypatch.setattr(runs, "training", training)
    monkeypatch.setattr(runs, "choose_device", lambda args: torch.device("cpu"))
    listed = {pathlib.Path(f"run{i}"): runs.Run(i, f"--seed {i}", n, ()) for i, n in enumerate(epochs)}
    runs.train_all(listed, at_once, train)


def test_a_run_takes_over_the_stream_of_one_that_has_ended(monkeypatch):
    made, now, seen, epochs = [], [], {}, [3 + i // 3 for i in range(40)]

    class Stream:
        def __init__(self, device):
            self.number = len(made)
            made.append(self)

        def __enter__(self):
            now.append(self.number)

        def __exit__(self, *_):
            now.pop()

    def turn(run, *_):
        seen.setdefault(run, []).append(now[-1])
        going = [r for r in seen if len(seen[r]) < epochs[r] and r != 5 or r == run]
        assert len({seen[r][-1] for r in going}) == len(going) <= 3, "no two at once share one"
        if run == 5:
            raise files.UserError("the run has diverged", 1)

    monkeypatch.setattr(graphs, "stream_of", Stream)
    with pytest.raises(files.UserError, match="1 of 40 runs failed"):
        turns_of(monkeypatch, epochs, 3, turn)
    assert len(made) == 3 and len(seen) == 40 and all(len(set(numbers)) == 1 for numbers in seen.values())


def test_more_runs_at_once_than_there_are_streams_are_refused(run, capsys):
    assert run("--seeds", "1", "--at-once", 33) == 2 and "--at-once 33" in capsys.readouterr().err


class Memory:
    """A GPU's memory: each run takes `size`, data `data`, and a run's first epoch for a while `search` more."""

    def __init__(self, monkeypatch, total, size, data, search):
        self.data, self.size, self.search, self.held, self.peak, self.going = data, size, search, 0, 0, set()
        for name, value in {
                "is_available": lambda: True, "empty_cache": lambda: None, "max_memory_reserved": lambda: self.peak,
                "mem_get_info": lambda: (total - self.held, total), "reset_peak_memory_stats": self.reset}.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "stream_of", lambda device: contextlib.nullcontext())

    def reset(self):
        self.peak = self.held

    def turn(self, run, shared):
        shared["bytes"] = self.data
        first = run not in self.going
        self.going.add(run)
        self.held = self.data + self.size * len(self.going)
        self.peak = max(self.peak, self.held + self.search * first)


def test_neither_the_data_nor_the_search_for_algorithms_counts_as_a_runs_memory(monkeypatch):
    at_once = []
    memory = Memory(monkeypatch, total=1050, size=100, data=50, search=700)

    def turn(run, shared, _):
        memory.turn(run, shared)
        at_once.append(run)

    turns_of(monkeypatch, [4] * 12, None, turn)
    fit = runs.fit_at_once(100, 900)
    assert at_once[:2] == [0, 0], "the second epoch shows it"
    assert at_once[2:2 + fit] == list(range(fit)) and at_once[2 + fit] == 0 and fit > 2


class Clock:
    """Stand-ins for a GPU with hours of work in every queue, but none behind the copies of what is to be written."""

    def __init__(self, monkeypatch):
        self.waited = []
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
        monkeypatch.setattr(torch.cuda, "stream", lambda s: self.on(s) if s else contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("that takes hours"))
        self.where = "a run's"

    def record_event(self):
        return self

    def synchronize(self):
        self.waited.append("for a copy")

    @contextlib.contextmanager
    def on(self, stream):
        self.where = stream
        yield
        self.where = "a run's"


def test_a_stopped_process_waits_for_no_epoch_that_is_queued(monkeypatch, tmp_path):
    clock, written, seen = Clock(monkeypatch), [], []
    save = files.save_checkpoint

    def spy(path, *rest):
        written.append((path.name, clock.where))
        save(path, *rest)

    def turn(run, _, keep):
        epoch = seen.count(run)
        state = torch.full((2,), float(epoch))
        seen.append(run)
        keep({"epoch": epoch, "weights": state}, last=False)
        state.fill_(float("nan"))  # the epoch after is under way
        if (run, epoch) == (1, 4):
            raise KeyboardInterrupt("terminated")

    monkeypatch.setattr(files, "save_checkpoint", spy)
    with pytest.raises(KeyboardInterrupt):
        turns_of(monkeypatch, [9] * 3, 3, turn,
                 lambda run: files.checkpoints(tmp_path / f"{run}.pt", 3600, lambda: None))
    assert sorted(written[:3]) == [(f"{i}.pt", "a run's") for i in range(3)], "the first of each is written at once"
    assert sorted(written[3:]) == [(f"{i}.pt", "default") for i in range(3)]
    assert clock.waited == ["for a copy"] * 3
    for i, epoch in enumerate((4, 4, 3)):
        assert torch.load(tmp_path / f"{i}.pt")["weights"].tolist() == [epoch, epoch]


def started(argv, **pipes):
    return subprocess.Popen([sys.executable, train.__file__, *argv], text=True, **pipes)


@pytest.mark.parametrize("closed", ("stdout", "both"))
def test_whoever_stops_reading_ends_the_printing_and_not_the_training(listed, directory, tmp_path, closed):
    names = ("random", "none")
    with open(tmp_path / "stderr", "w") as errors:
        process = started(["--runs", listed(names=names)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT if closed == "both" else errors)
        assert process.stdout.readline()
        process.stdout.close()  # as head -1 does
        assert process.wait() == 0
    assert not (tmp_path / "stderr").read_text()
    for name in names:
        assert runs.state_of(directory(*LISTED[name], logs="together")) == "done"
        assert len(without_seconds(directory(*LISTED[name], logs="together"))) == 5


@pytest.mark.parametrize("what", (["--help"], ["--plan"], ["--status"]))
def test_whoever_reads_nothing_of_a_list_gets_no_traceback(listed, what):
    process = started([*what, *([listed()] if what != ["--help"] else [])], stdout=subprocess.PIPE,
                      stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0 and "rror" not in errors and "Exception" not in errors
