"""Captured steps: replayed, they compute what they would have, and pruning captures anew only where that is worth it.

There is no graph on a CPU. A tape takes its place: it notes every operation that a step dispatches, with the tensors it
had, and plays them again on the same tensors. Like a graph it holds fast whatever was a number or a shape.
"""
import json

import pytest
import torch
from conftest import read_lines, tiny_model, without_seconds
from test_ext_blocks import draw, outcome, pair_of_networks
from test_runs import PRUNE, RESUMED, Killed, kill_before
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gst_ext import ops
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

    monkeypatch.setattr(train, "GRAPHED", ("cpu",))
    monkeypatch.setattr(train, "record", record)
    return made


@pytest.fixture
def shapes(monkeypatch):
    """Sets what measure_shapes finds."""
    def found(multiple=1, ms_per_filter=1.0, capture_ms=0.0):
        monkeypatch.setattr(train, "measure_shapes", lambda *_: {
            "multiple": multiple, "ms_per_filter": ms_per_filter, "capture_ms": capture_ms})
    return found


backends = pytest.mark.parametrize("backend", ["eager", pytest.param("ext", marks=pytest.mark.skipif(
    not ops.available, reason="the extension is not built"))])
needs_ext = pytest.mark.skipif(not ops.available, reason="the extension is not built")
LONG = ("--batch-size", 16, "--test-batch-size", 32, "--epochs", 8, "--lrs", 6)


def test_a_tape_holds_fast_what_a_graph_would(tapes):
    state, factor = torch.ones(2), 2.0
    x = torch.zeros(2)
    replay = train.record(lambda: state.mul_(factor).add_(x * 2), {})
    replay()
    assert torch.equal(state, torch.tensor([2.0, 2.0]))
    factor, x[0] = 100.0, 1.0
    replay()
    assert torch.equal(state, torch.tensor([6.0, 4.0]))


@backends
@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_of_captured_steps_is_the_run_itself(run, directory, request, shapes, kind, backend):
    options = (*LONG, "--backend", backend, *RESUMED[kind])
    assert run(*options, logs="plain") == 0
    tapes = request.getfixturevalue("tapes")
    shapes()
    assert run(*options) == 0
    assert tapes and without_seconds(directory(*options)) == without_seconds(directory(*options, logs="plain"))
    states = [torch.load(directory(*options, logs=logs) / "checkpoint.pt", weights_only=True)["model"]
              for logs in ("plain", "logs")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@backends
def test_a_killed_run_of_captured_steps_goes_on_as_itself(run, directory, tapes, shapes, monkeypatch, backend):
    options = (*LONG, "--backend", backend, "--score", "act", *PRUNE)
    shapes()
    assert run(*options, logs="whole") == 0
    with monkeypatch.context() as patch:
        kill_before(patch, "save_checkpoint", 5)
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
@pytest.mark.parametrize("model", ("vgg11", "resnet18", "resnet20"))
def test_an_event_that_is_not_worth_new_shapes_captures_nothing_and_prunes_all_the_same(run, directory, tapes, shapes,
                                                                                        model):
    options = ("--model", model, "--batch-size", 32, "--epochs", 12, "--lrs", "--target", "S", "--score", "l2",
               "--s", 3, "--e", 9, "--p", 0.6, "--r", 3)
    for capture_ms, logs in ((0, "reshaped"), (1e9, "masked")):
        shapes(capture_ms=capture_ms)
        tapes.clear()
        assert run(*options, logs=logs) == 0
        lines = read_lines(directory(*options, logs=logs))
        events = [line["epoch"] for line in lines if any(line["removed"])]
        assert events == [3, 6, 9]
        computed = [line["computed"][-1] for line in lines]
        if logs == "reshaped":
            assert computed == [line["live"][-1] for line in lines]
        else:
            assert len(set(computed)) == 1 < len({line["live"][-1] for line in lines})
    plain = read_lines(directory(*options, logs="reshaped"))
    assert [line["live"] for line in lines] == [line["live"] for line in plain]
    assert [line["filters"] for line in lines[:6]] == [line["filters"] for line in plain[:6]]
    assert [line["train_loss"] for line in lines] == pytest.approx([line["train_loss"] for line in plain], rel=0.05)


@needs_ext
def test_masks_alone_need_no_new_capture(run, tapes, shapes):
    """VGG has no shortcut whose map an event would have to make."""
    never = ("--model", "vgg11", "--width", 0.05, "--batch-size", 32, "--epochs", 12, "--lrs")
    assert run(*never) == 0
    unpruned = len(tapes)
    shapes(capture_ms=1e9)
    tapes.clear()
    assert run(*never, "--target", "S", "--s", 3, "--e", 9, "--p", 0.6, "--r", 3) == 0
    assert len(tapes) == unpruned


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


@needs_ext
def test_what_shapes_cost_is_measured_and_logged(run, directory, tapes):
    options = ("--model", "vgg11", "--width", 0.1, *LONG, "--target", "S", "--s", 1, 1, "--e", 5, 5, "--p", 0.5, 0.5,
               "--r", 2)
    assert run(*options) == 0
    found = json.loads((directory(*options) / "config.json").read_text())["shapes"]
    assert set(found["ms"]) == {"unpruned", "1", "8", "16", "32"} and min(found["ms"].values()) > 0
    assert found["ms"][str(found["multiple"])] == min(found["ms"][m] for m in ("1", "8", "16", "32"))
    assert found["ms_per_filter"] >= 0 and found["capture_ms"] >= 0


@needs_ext
@pytest.mark.parametrize("steps, expected", [(100, None), (101, 8)])
def test_new_shapes_have_to_save_more_than_their_capture(steps, expected):
    model = train.use_backend(tiny_model("vgg11", width=0.1), "ext")  # 51 filters in each of the last layers
    shapes = {"multiple": 8, "ms_per_filter": 0.01, "capture_ms": 11.0}
    train.choose_shapes(model, shapes, [(7, {})], {0: 11}, steps)  # 40 are left: 11 fewer, 0.11 ms a step
    assert model.multiple == expected
    train.choose_shapes(model, shapes, [(7, {})], {0: 2}, 10**6)  # 49 are left, and 51 is the whole layer: 0 fewer
    assert model.multiple is None
