"""Checkpoints that are written seldom, as on a GPU: whatever ends a run but a kill -9 loses the running epoch only."""
import os

import pytest
import torch
from conftest import without_seconds
from test_runs import PRUNE

from gst_ext import files, runs
import train


@pytest.fixture
def seldom(monkeypatch):
    """Checkpoints are due at the end alone; lists the epochs of those that were written."""
    written, save = [], files.save_checkpoint

    def spy(path, state, check=None):
        written.append(state["epoch"])
        save(path, state, check)

    monkeypatch.setattr(runs, "CHECKPOINT_EVERY", {"cpu": 1e9})
    monkeypatch.setattr(files, "save_checkpoint", spy)
    return written


def stop_in(monkeypatch, epoch, stop, of=lambda args: True):
    """Calls stop() when training of the `epoch`-th epoch is to begin, in runs whose options are `of` that kind."""
    train_epoch, epochs = train.train_epoch, []

    def stopping(model, data, optimizer, args, *rest, **more):
        epochs.extend([1] * of(args))
        if len(epochs) == epoch and of(args):
            stop()
        return train_epoch(model, data, optimizer, args, *rest, **more)

    monkeypatch.setattr(train, "train_epoch", stopping)


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise files.UserError("a failure", 1)


def test_the_first_and_the_last_epoch_are_written(run, seldom):
    assert run(*PRUNE) == 0
    assert seldom == [1, 5]


@pytest.mark.parametrize("stop, code", [(interrupt, 130), (fail, 1)])
@pytest.mark.parametrize("more", [
    ("--score", "act", "--batch-size", 16, *PRUNE),
    ("--target", "L", *PRUNE[2:], "--noise", "zero", "--noise-batches", 4, "--noise-restore")])
def test_a_run_that_stops_writes_the_last_epoch_it_finished(run, directory, monkeypatch, seldom, stop, code, more):
    assert run(*more, logs="whole") == 0
    seldom.clear()
    with monkeypatch.context() as patch:
        stop_in(patch, 4, stop)
        assert run(*more) == code
    assert seldom == [1, 3]
    assert run(*more) == 0
    assert seldom == [1, 3, 4, 5]
    assert without_seconds(directory(*more)) == without_seconds(directory(*more, logs="whole"))
    states = [torch.load(directory(*more, logs=logs) / "checkpoint.pt", weights_only=True)["model"]
              for logs in ("whole", "logs")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_one_of_many_runs_that_are_interrupted_is_written(run, directory, monkeypatch, seldom):
    assert run(*PRUNE, "--seeds", "1-3", "--at-once", 3, logs="whole") == 0
    with monkeypatch.context() as patch:
        stop_in(patch, 3, interrupt, of=lambda args: args.seed == 2)
        assert run(*PRUNE, "--seeds", "1-3", "--at-once", 3) == 130
    for seed, epoch in ((1, 2), (2, 2), (3, 1)):  # the third's turn had not come; its second epoch is not finished
        path = directory(*PRUNE, "--seed", seed) / "checkpoint.pt"
        assert torch.load(path, weights_only=True)["epoch"] == epoch
    assert run(*PRUNE, "--seeds", "1-3", "--at-once", 3) == 0
    for seed in (1, 2, 3):
        assert without_seconds(directory(*PRUNE, "--seed", seed)) == without_seconds(
            directory(*PRUNE, "--seed", seed, logs="whole"))


def test_a_kill_loses_the_epochs_since_the_last_checkpoint_and_no_more(run, directory, monkeypatch, seldom):
    assert run(*PRUNE, logs="whole") == 0
    stop_in(monkeypatch, 4, lambda: os._exit(9))
    child = os.fork()
    if not child:
        run(*PRUNE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    monkeypatch.undo()
    assert torch.load(directory(*PRUNE) / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert len(without_seconds(directory(*PRUNE))) == 3, "the log is ahead of the checkpoint, and is put back to it"
    assert run(*PRUNE) == 0
    assert without_seconds(directory(*PRUNE)) == without_seconds(directory(*PRUNE, logs="whole"))
