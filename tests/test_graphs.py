"""Captured steps: replayed, they compute what they would have, and pruning captures anew only where shapes change.

There is no graph on a CPU. A tape takes its place: it notes every operation that a step dispatches, with the tensors it
had, and plays them again on the same tensors. Like a graph it holds fast whatever was a number or a shape.
"""
import signal

import pytest
import torch
from conftest import needs_gpu, read_lines, without_seconds
from test_ext_blocks import draw, outcome, pair_of_networks
from test_runs import PRUNE, RESUMED, Killed, kill_before
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gst_ext import files, graphs, ops
import train


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
def nothing_folded(monkeypatch):
    """Folded weights are for evaluation on a CPU, where no graph is: they are made outside of what is dispatched."""
    monkeypatch.setattr(ops, "may_fold", lambda *_: False)


@pytest.fixture
def tapes(monkeypatch):
    """Makes CPU runs capture their steps on tapes; lists what was captured."""
    made = []

    def record(function, graphs):
        tape, first = Tape(), [True]
        with tape:
            function()
        made.append(tape)

        def replay():  # a capture computes nothing, so that the first replay is the call that the tape has seen
            if not first:
                tape.play()
            first.clear()
        return replay

    monkeypatch.setattr(graphs, "GRAPHED", ("cpu",))
    monkeypatch.setattr(graphs, "record", record)
    return made


backends = pytest.mark.parametrize("backend", ["eager", pytest.param("ext", marks=pytest.mark.skipif(
    not ops.available, reason="the extension is not built"))])
needs_ext = pytest.mark.skipif(not ops.available, reason="the extension is not built")
LONG = ("--batch-size", 16, "--test-batch-size", 32, "--epochs", 8, "--lrs", 6)


def test_a_tape_holds_fast_what_a_graph_would(tapes):
    state, factor = torch.ones(2), 2.0
    x = torch.zeros(2)
    replay = graphs.record(lambda: state.mul_(factor).add_(x * 2), {})
    replay()
    assert torch.equal(state, torch.tensor([2.0, 2.0]))
    factor, x[0] = 100.0, 1.0
    replay()
    assert torch.equal(state, torch.tensor([6.0, 4.0]))


@backends
@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_of_captured_steps_is_the_run_itself(run, directory, request, kind, backend):
    options = (*LONG, "--backend", backend, *RESUMED[kind])
    assert run(*options, logs="plain") == 0
    tapes = request.getfixturevalue("tapes")
    assert run(*options) == 0
    assert tapes and without_seconds(directory(*options)) == without_seconds(directory(*options, logs="plain"))
    states = [torch.load(directory(*options, logs=logs) / "checkpoint.pt", weights_only=True)["model"]
              for logs in ("plain", "logs")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@backends
def test_a_killed_run_of_captured_steps_goes_on_as_itself(run, directory, tapes, monkeypatch, backend):
    options = (*LONG, "--backend", backend, "--score", "act", *PRUNE)
    assert run(*options, logs="whole") == 0
    with monkeypatch.context() as patch:
        kill_before(patch, files, "save_checkpoint", 5)
        with pytest.raises(Killed):
            run(*options)
    assert run(*options) == 0
    assert without_seconds(directory(*options)) == without_seconds(directory(*options, logs="whole"))


def test_steps_are_captured_again_only_for_another_learning_rate(run, tapes):
    assert run("--batch-size", 20, "--epochs", 12, "--lrs") == 0  # 96 = 4 * 20 + 16 images, 64 = 2 * 32
    once = len(tapes)
    assert once == 3, "whole and last training batches, whole test batches"
    assert run("--batch-size", 20, "--epochs", 12, "--lrs", 6) == 0
    assert len(tapes) == once + 2 * once


@needs_ext
@pytest.mark.parametrize("model, width", [("vgg11", 0.05), ("resnet20", 0.25)])
def test_an_event_captures_anew_only_where_a_number_of_computed_filters_changes(run, directory, tapes, monkeypatch,
                                                                                model, width):
    options = ("--model", model, "--width", width, *LONG[:4], "--epochs", 16, "--lrs", "--target", "S",
               "--score", "l2", "--s", 3, "--e", 13, "--p", 0.3, "--r", 5)
    captured = {}
    for multiple in (1, 8, 100):
        monkeypatch.setitem(train.MULTIPLE, "cpu", multiple)
        tapes.clear()
        assert run(*options, logs=f"logs{multiple}") == 0
        lines = read_lines(directory(*options, logs=f"logs{multiple}"))
        assert [line["epoch"] for line in lines if any(line["removed"])] == [3, 8, 13]
        filters = lines[0]["live"]  # nothing has gone yet
        assert [line["computed"] for line in lines] == [
            [min(n, -(-live // multiple) * multiple) for n, live in zip(filters, line["live"])] for line in lines]
        captured[multiple] = len(tapes) / 2  # a step of training and one of evaluation
        shapes = len({tuple(line["computed"]) for line in lines})
        # the first event gives a ResNet a map of its shortcut, whatever it does to the shapes
        assert captured[multiple] == shapes + (model == "resnet20" and lines[3]["computed"] == filters)
    assert captured[1] == 4 > captured[8] >= captured[100]


@needs_ext
@pytest.mark.parametrize("name", ("vgg11", "resnet18", "resnet20"))
@pytest.mark.parametrize("masks", ("some", "most"))
@pytest.mark.parametrize("multiple", (3, 8))
def test_filters_that_fill_up_a_shape_stay_gone(name, masks, multiple):
    eager, model = pair_of_networks(name, masks)
    model.multiple = multiple
    train.use_backend(model, "ext")
    for block in model.prunable:
        assert block.computed() == min(len(block.mask), multiple * -(-int(block.mask.sum()) // multiple))
    assert any(block.computed() > int(block.mask.sum()) for block in model.prunable)
    x, y = draw(0, 12, 3, 32, 32), torch.arange(12) % 10
    want, got = outcome(eager, x, y), outcome(model, x, y)
    scale = max(v.abs().max() for k, v in want.items() if k.startswith("d"))
    for k, v in want.items():
        torch.testing.assert_close(got[k], v, rtol=1e-5, atol=max(1e-7, 1e-10 * scale), msg=lambda m: f"{k}: {m}")
    for block in model.prunable:
        for tensor in (block.conv.weight, block.bn.weight, block.bn.bias):
            assert not tensor.grad[~block.mask].any()


def test_without_cuda_graphs_nothing_is_captured_and_the_run_is_the_same(run, directory, tapes):
    options = (*LONG, "--score", "act", *PRUNE)
    assert run(*options, "--no-cuda-graphs", logs="plain") == 0 and not tapes
    assert run(*options) == 0 and tapes
    assert directory(*options, "--no-cuda-graphs") == directory(*options)
    assert without_seconds(directory(*options)) == without_seconds(directory(*options, logs="plain"))


@pytest.mark.parametrize("failing", (1, 2, 4))
def test_after_a_capture_that_fails_a_run_goes_on_without(run, directory, tapes, monkeypatch, capsys, failing):
    options, record, tried = (*LONG, "--score", "act", *PRUNE), graphs.record, []

    def unsupported(function, graphs):
        tried.append(1)
        if len(tried) == failing:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about that")
        return record(function, graphs)

    assert run(*options, "--no-cuda-graphs", logs="plain") == 0
    monkeypatch.setattr(files, "SAID", set())
    monkeypatch.setattr(graphs, "record", unsupported)
    assert run(*options) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "(operation not permitted when stream is capturing)" in said[0]
    assert len(tried) == failing, "it is not tried again, whatever changes"
    assert without_seconds(directory(*options)) == without_seconds(directory(*options, logs="plain"))


def test_memory_that_is_full_in_a_capture_is_not_a_capture_that_fails(monkeypatch):
    def full(function, graphs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(graphs, "record", full)
    held = {}
    for _ in range(graphs.WARM_UP):
        graphs.replayed(held, "step", lambda size: None, 1)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.replayed(held, "step", lambda size: None, 1)
    assert not held.get("given up")


class Stream:
    """A stream that is done when it was asked three times; it and all that is captured on it note what is done."""

    def __init__(self, calls, done=3):
        self.calls, self.left = calls, done

    def record_event(self):
        self.calls.append("event")
        return self

    def query(self):
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def calls(monkeypatch):
    """The calls of a capture on stand-ins; waiting for the whole device fails."""
    made = []

    class Graph:
        def capture_begin(self, *pool, capture_error_mode):
            made.append(("begin", *pool, capture_error_mode))

        def capture_end(self):
            made.append("end")
            if "broken" in made:
                raise RuntimeError("the capture is not valid")

        def pool(self):
            return 7

        def replay(self):
            made.append("replay")

    stream = Stream(made)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("that concerns the other runs"))
    return made


def test_a_capture_waits_for_its_own_stream_only_and_shares_the_runs_memory(calls):
    held = {}
    replay = graphs.record(lambda: calls.append("step"), held)
    assert calls == ["event", ("begin", "thread_local"), "step", "end"]
    replay()
    graphs.hold_for(held, "other shapes")
    graphs.record(lambda: None, held)
    assert calls[4:] == ["replay", "event", ("begin", 7, "thread_local"), "end"]


def test_what_goes_wrong_in_a_capture_ends_it_and_is_what_is_raised(calls):
    def step():
        calls.append("broken")
        raise KeyboardInterrupt("terminated")

    with pytest.raises(KeyboardInterrupt, match="terminated"):
        graphs.record(step, {})
    assert calls[-1] == "end"


def test_a_signal_is_heard_while_a_run_waits_for_its_device(monkeypatch):
    class Heard(Exception):
        pass

    def hear(*_):
        raise Heard

    class OnDevice(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream([], done=1e9))
    before = signal.signal(signal.SIGALRM, hear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Heard):
            graphs.numbers(torch.ones(2).as_subclass(OnDevice))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert graphs.numbers(torch.ones(2)) == [1, 1]


@needs_gpu
@backends
@pytest.mark.parametrize("multiple", (1, 32))
@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_on_cuda_is_the_same_with_graphs_and_without(run, directory, monkeypatch, kind, multiple, backend):
    if backend == "ext" and not ops.computes_on(torch.device("cuda")):
        pytest.skip("the extension is not built for a GPU")
    captured, record = [], graphs.record
    monkeypatch.setattr(graphs, "record", lambda *call: captured.append(1) or record(*call))
    monkeypatch.setattr(files, "SAID", set())
    monkeypatch.setitem(train.MULTIPLE, "cuda", multiple)
    options = (*LONG, "--device", "cuda", "--deterministic", "--backend", backend, *RESUMED[kind])
    assert run(*options, "--no-cuda-graphs", logs="plain") == 0 and not captured
    assert run(*options) == 0 and captured
    assert not any("captured" in line for line in files.SAID)
    assert without_seconds(directory(*options)) == without_seconds(directory(*options, logs="plain"))
    assert any(any(line["removed"]) for line in read_lines(directory(*options)))
