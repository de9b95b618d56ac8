"""Captured steps compute what direct calls would, and are captured again only where they must.

A CPU has no graphs. A tape takes their place: it notes every operation that a step dispatches and
plays them again on the same tensors. Like a graph it keeps every address, number and shape.
"""
import pytest
import torch
from conftest import needs_ext, needs_gpu, read_lines, weights, without_seconds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from gst_ext import errors, graphs, ops
from gst_ext.graphs import Graphs
from gst_ext.networks import build_model, graph_key, set_backend


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def play(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if torch.is_tensor(old) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def no_folding(monkeypatch):
    """Weights are folded on a CPU only, where there are no graphs, and outside of dispatch."""
    monkeypatch.setattr(ops, "may_fold", lambda *_: False)


@pytest.fixture
def tapes(monkeypatch):
    """Makes runs on the CPU capture their steps on tapes; lists the tapes."""
    made = []

    def capture(self, step, index):
        tape, first = Tape(), [True]
        with tape:
            step(index)
        made.append(tape)

        def replay():  # a capture computes nothing: the first replay is what the tape has seen
            if not first:
                tape.play()
            first.clear()
        return replay

    monkeypatch.setattr(train, "Graphs", lambda enabled: Graphs(True))
    monkeypatch.setattr(Graphs, "capture", capture)
    return made


def test_a_tape_keeps_what_a_graph_would(tapes):
    state, factor, x = torch.ones(2), 2.0, torch.zeros(2)
    replay = Graphs(True).capture(lambda size: state.mul_(factor).add_(x * size), 2)
    replay()
    assert torch.equal(state, torch.tensor([2.0, 2.0]))
    factor, x[0] = 100.0, 1.0
    replay()
    assert torch.equal(state, torch.tensor([6.0, 4.0]))


def test_beside_its_replay_a_step_costs_one_copy(tapes):
    steps, seen = Graphs(True), []
    for _ in range(graphs.WARM_UP_CALLS + 1):
        steps.run("step", seen.append, torch.arange(1))
    index = torch.tensor([5])
    with Tape() as tape:
        steps.run("step", seen.append, index)
    assert [str(func) for func, *_ in tape.calls] == ["aten.copy_.default"]
    assert len({index.data_ptr() for index in seen}) == 1 and seen[0] == 5


BATCHES = ("--batch-size", 16, "--test-batch-size", 32)
PRUNE = (*BATCHES, "--epochs", 7, "--lrs", 6, "--target", "S", "--s", 1, 2, "--e", 3, 4, "--p",
         0.3, 0.75, "--r", 1)
KINDS = {  # six batches an epoch, so that the act score's tenth batches lie in different places
    "act": ("ext", *PRUNE, "--score", "act"),
    "random": ("ext", *PRUNE, "--target", "R", "--prune-bn", "keep"),
    "augmented": ("ext", *PRUNE, "--augment", "--score", "ebn", "--val-split", 32),
    "sgd": ("eager", *PRUNE, "--optimizer", "sgd", "--lr", 0.05),
    "vgg": ("eager", *PRUNE, "--model", "vgg11", "--width", 0.05),
    "gauss": ("ext", *PRUNE, "--target", "L", "--noise", "gauss", "--noise-batches", 8),
    "restore": ("eager", *PRUNE, "--target", "L", "--noise", "zero", "--noise-batches", 8,
                "--noise-restore", "--noise-filters", "all"),
}
needs_backend = [pytest.param(kind, marks=needs_ext if KINDS[kind][0] == "ext" else ())
                 for kind in KINDS]


@pytest.mark.parametrize("kind", needs_backend)
def test_a_run_of_captured_steps_is_the_run_itself(run, directory, request, monkeypatch, kind):
    """Also if it is interrupted and continued."""
    monkeypatch.setitem(train.ROUND_TO, "cpu", 4)  # some events keep the shapes, some do not
    argv = ("--backend", *KINDS[kind])
    assert run(*argv, logs="direct") == 0
    tapes, train_epoch = request.getfixturevalue("tapes"), train.train_epoch

    def interrupted(model, data, optimizer, options, generators, epoch, *rest):
        if epoch >= 4:
            raise KeyboardInterrupt
        return train_epoch(model, data, optimizer, options, generators, epoch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupted)
        assert run(*argv) == 130 and tapes
    assert run(*argv) == 0
    paths = [directory(*argv, logs=logs) for logs in ("direct", "logs")]
    assert without_seconds(paths[0]) == without_seconds(paths[1])
    expected, found = map(weights, paths)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_steps_are_captured_again_for_another_learning_rate_only(run, tapes):
    assert run("--batch-size", 20, "--epochs", 10, "--lrs", 5) == 0  # 96 = 4 * 20 + 16 images
    assert len(tapes) == 2 * 3, "whole and last training batches, whole test batches"


def test_an_event_needs_new_graphs_only_if_a_number_of_computed_filters_changes():
    model, keys = build_model("resnet20", width=0.5), []
    model.round_to = 8
    for pruned in ([0], [1], range(2, 9), [9]):  # 31, 30, 23, 22 of 32 filters are left
        train.prune_filters(model.prunable[-1], torch.tensor(pruned))
        keys.append(graph_key(set_backend(model, "ext")))
    assert keys[0] == keys[1] != keys[2] == keys[3]


def test_after_a_capture_that_fails_a_run_continues_without_graphs(run, directory, tapes,
                                                                   monkeypatch, capsys):
    capture, calls = Graphs.capture, []

    def unsupported(self, step, index):
        calls.append(index)
        if len(calls) == 4:
            raise RuntimeError("operation not permitted\nmore about that")
        return capture(self, step, index)

    monkeypatch.setattr(Graphs, "capture", unsupported)
    monkeypatch.setattr(errors, "WARNED", set())
    assert run(*PRUNE) == 0
    line, = capsys.readouterr().err.splitlines()
    assert "(operation not permitted)" in line
    assert len(calls) == 4, "it is not tried again, whatever changes"
    monkeypatch.setattr(train, "Graphs", Graphs)
    assert run(*PRUNE, logs="direct") == 0
    assert without_seconds(directory(*PRUNE)) == without_seconds(directory(*PRUNE, logs="direct"))


def test_a_full_memory_is_not_a_capture_that_fails(monkeypatch):
    def full(self, step, index):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Graphs, "capture", full)
    steps = Graphs(True)
    for _ in range(graphs.WARM_UP_CALLS):
        steps.run("step", lambda index: None, torch.arange(1))
    with pytest.raises(torch.OutOfMemoryError):
        steps.run("step", lambda index: None, torch.arange(1))
    assert steps.enabled


class Stream:
    """A stream whose event has happened when it was asked three times."""

    def __init__(self, calls):
        self.calls = calls

    def record_event(self):
        self.calls.append("event")
        return self

    def query(self):
        self.calls.append("query")
        return self.calls[-3:] == ["query"] * 3


WAIT = ["event", *["query"] * 3]


def test_a_capture_waits_for_its_own_stream_and_shares_the_memory_of_the_run(monkeypatch):
    calls = []

    class Graph:
        def capture_begin(self, *pool, capture_error_mode):
            calls.append(("begin", *pool, capture_error_mode))

        def capture_end(self):
            calls.append("end")
            if "broken" in calls:
                raise RuntimeError("the capture is not valid")

        def pool(self):
            return 7

        def replay(self):
            calls.append("replay")

    def interrupted(size):
        calls.append("broken")
        raise KeyboardInterrupt("terminated")

    stream, steps = Stream(calls), Graphs(True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("it waits for other streams"))
    replay = steps.capture(lambda size: calls.append(size), 16)
    assert calls == [*WAIT, ("begin", "thread_local"), 16, "end"]
    calls.clear()
    replay()
    steps.clear_unless("other shapes")
    with pytest.raises(KeyboardInterrupt, match="terminated"):  # the error of the step itself
        steps.capture(interrupted, 16)
    assert calls == ["replay", *WAIT, ("begin", 7, "thread_local"), "broken", "end"]


def test_results_are_awaited_by_polling_so_that_signals_are_handled(monkeypatch):
    class OnDevice(torch.Tensor):
        is_cuda = True

    calls = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(calls))
    assert graphs.to_list(torch.ones(2)) == [1, 1] and not calls
    assert graphs.to_list(torch.ones(2).as_subclass(OnDevice)) == [1, 1] and calls == WAIT


@needs_gpu
@pytest.mark.parametrize("round_to", (1, 32))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_cuda_is_the_same_with_graphs_and_without(run, directory, monkeypatch, kind,
                                                           round_to):
    backend = KINDS[kind][0]
    if backend == "ext" and not ops.supports_device(torch.device("cuda")):
        pytest.skip("the extension is not built for a GPU")
    captured, capture = [], Graphs.capture
    monkeypatch.setattr(Graphs, "capture", lambda *call: captured.append(1) or capture(*call))
    monkeypatch.setattr(errors, "WARNED", set())
    monkeypatch.setitem(train.ROUND_TO, "cuda", round_to)
    argv = ("--device", "cuda", "--deterministic", "--backend", *KINDS[kind])
    assert run(*argv, "--no-cuda-graphs", logs="direct") == 0 and not captured
    assert run(*argv) == 0 and captured
    assert not any("captured" in line for line in errors.WARNED)
    assert without_seconds(directory(*argv)) == without_seconds(directory(*argv, logs="direct"))
    assert any(any(record["removed"]) for record in read_lines(directory(*argv)))
