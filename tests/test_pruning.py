"""The schedule is A.4's to the filter, scores are their closed forms, targets select by them."""
import itertools
import json
import math
from types import SimpleNamespace

import mpmath
import pytest
import torch
import torch.nn.functional as F
from conftest import read_lines, tiny_model, training_setup

import train
from gst_ext import ops
from gst_ext.errors import UserError
from gst_ext.graphs import Graphs
from gst_ext.networks import build_model

# Schedule

@pytest.mark.parametrize("n, p, s, e, r, expected", [
    (512, 0.3, 3, 150, 40, {3: 474, 43: 436, 83: 398, 123: 359}),
    (512, 0.9, 6, 275, 40, {6: 447, 46: 381, 86: 315, 126: 250, 166: 184, 206: 118, 246: 52}),
    (512, 0.95, 10, 275, 200, {10: 269, 210: 26}),
    (16, 0.1, 40, 100, 30, {40: 16, 70: 16, 100: 15}),
    (64, 0.1, 40, 100, 60, {40: 61, 100: 58}),
    (10, 0.5, 0, 3, 2, {0: 8, 2: 5}),  # the printed formula counts an iteration at epoch 4
])
def test_counts_worked_out_by_hand(n, p, s, e, r, expected):
    epochs = train.pruning_epochs(s, e, r)
    assert dict(zip(epochs, train.num_filters_to_keep(n, p, len(epochs)), strict=True)) == expected


@pytest.mark.parametrize("n, p, left", [
    (512, 0.3, 359), (512, 0.9, 52), (1, 0.5, 1), (7, 0.999, 1), (1000, 0.1, 900), (512, 0.0, 512),
    # floating-point numbers make (1 - p) n a little too much here
    (10, 0.7, 3), (20, 0.95, 1), (50, 0.42, 29), (100, 0.58, 42)])
def test_ceilings_are_exact(n, p, left):
    for n_iter in (1, 2, 3, 7, 68):
        numerators = [left * n_iter + (n - left) * (n_iter - j) for j in range(1, n_iter + 1)]
        assert train.num_filters_to_keep(n, p, n_iter) == [-(-x // n_iter) for x in numerators]


# --scale-epochs

@pytest.mark.parametrize("argv, expected", [
    ("--scale-epochs 0.08 --r 4", {"epochs": 26, "lrs": [12, 24], "s": [0] * 4, "r": 1,
                                   "e": [12, 12, 12, 22], "save_epoch": 25}),
    ("--scale-epochs 0.003 --model resnet56", {"epochs": 1, "r": 1, "lrs": [0, 0], "s": [0] * 54,
                                               "e": [0] * 54}),
    ("--scale-epochs 2 --model resnet18", {"epochs": 650, "r": 80, "s": [14, 16, 18, 20]}),
    ("--scale-epochs 0.5 --s 1 3 5 6", {"epochs": 163, "s": [1, 2, 3, 3], "e": [75, 75, 75, 138]}),
    ("--scale-epochs 0.29 --lrs 50", {"lrs": [15]}),  # 14.5, though 0.29 * 50 is below it
    ("--scale-epochs 0.5 --epochs 276", {"epochs": 138, "e": [75, 75, 75, 137]}),
    *[(f"--scale-epochs {f} --noise zero --noise-batches {k}", {"noise_batches": left})
      for f, k, left in ((0.2, 1, 1), (0.2, 2, 2), (0.2, 50, 10), (3, 1, 1), (3, 2, 6))]])
def test_scaling_by_hand(argv, expected):
    times = train.scaled_schedule(train.parse_options(["--target", "S", *argv.split()]))
    assert {name: times[name] for name in expected} == expected


def test_scaling_keeps_an_iteration_for_every_layer():
    """A layer whose s was rounded past the end of the run would never reach its p."""
    for factor, epochs in itertools.product((0.05, 0.3, 0.49, 0.5), range(2, 30)):
        times = train.scaled_schedule(train.parse_options(
            f"--target S --s {epochs - 1} --e {epochs - 1} --p 0.5 --epochs {epochs} --lrs 1 "
            f"--save-epoch 0 --scale-epochs {factor}".split()))
        assert len(train.pruning_epochs(times["s"][0], times["e"][0], times["r"])) == 1


# Scores

@pytest.mark.parametrize("name", ("vgg11", "resnet18"))
def test_norms_are_of_the_weights_without_bias(name):
    block = tiny_model(name).prunable[-1]
    if block.conv.bias is not None:
        block.conv.bias.data.fill_(100)
    filters = block.conv.weight.detach().flatten(1).tolist()
    for score, norm in (("l1", lambda f: math.fsum(map(abs, f))), ("l2", lambda f: math.hypot(*f))):
        expected = torch.tensor([norm(f) for f in filters])
        torch.testing.assert_close(train.filter_scores(block, score), expected)


def exact_ebn(gamma, beta, signed):
    """Computes beta Phi(beta / gamma) + gamma phi(beta / gamma) to 60 digits."""
    with mpmath.workdps(60):
        gamma, beta = mpmath.mpf(gamma), mpmath.mpf(beta)
        gamma = gamma if signed else abs(gamma)
        if not gamma:
            return max(beta, mpmath.mpf(0))
        return beta * mpmath.ncdf(beta / gamma) + gamma * mpmath.npdf(beta / gamma)


@pytest.mark.parametrize("score, signed", [("ebn", False), ("ebn-signed", True)])
def test_ebn_is_its_closed_form_also_far_in_the_tails(score, signed):
    pairs = [(gamma, u * abs(gamma)) for gamma in (1.0, -0.37, 3e-5, -1e4)
             for u in (-30, -26.6, -12, -5.5, -1.7, -1, -0.2, 0, 0.4, 1, 3, 8.3, 20, 30)]
    pairs += [(gamma, beta) for gamma in (0.0, -0.0) for beta in (-2.0, 0.0, 2.0)]
    gamma, beta = torch.tensor(pairs).T  # float32; the score is computed in double precision
    block = SimpleNamespace(bn=SimpleNamespace(weight=gamma, bias=beta), mask=gamma)
    scores = train.filter_scores(block, score)
    for *pair, value in torch.stack([gamma.double(), beta.double(), scores]).T.tolist():
        expected = exact_ebn(*pair, signed)
        assert abs(value - expected) <= 1e-11 * abs(expected), pair


def test_ebn_is_finite_and_its_sign_right_for_extreme_values():
    values = [sign * size for size in (0.0, 5e-324, 1e-40, 1.0, 1e40, 1e300) for sign in (-1, 1)]
    gamma, beta = torch.cartesian_prod(*[torch.tensor(values, dtype=torch.float64)] * 2).T
    plain, signed = ops.ebn_score(gamma, beta), ops.ebn_score(gamma, beta, signed=True)
    assert plain.isfinite().all() and (plain >= beta.clamp(min=0)).all()
    assert torch.equal(signed[gamma >= 0], plain[gamma >= 0])
    assert torch.equal(signed[gamma < 0], -ops.ebn_score(gamma, -beta)[gamma < 0])


def watch_activations(model):
    """Lists, for each block and forward pass, mean |a| computed anew from the block's input."""
    seen = [[] for _ in model.prunable]

    def hook(block, inputs, _, means):
        x, shortcut = (*inputs, None)[:2]
        y = F.conv2d(x.double(), block.conv.weight.double(), None, block.conv.stride, 1).detach()
        y = y - y.mean((0, 2, 3), keepdim=True)
        y = y / (y.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        y = y * block.bn.weight.detach().view(-1, 1, 1) + block.bn.bias.detach().view(-1, 1, 1)
        a = y if shortcut is None else y + shortcut.detach()
        means.append(a.abs().mean((0, 2, 3)))

    for block, means in zip(model.prunable, seen):
        block.register_forward_hook(lambda *call, means=means: hook(*call, means))
    return seen


@pytest.mark.parametrize("name", ("resnet18", "resnet20", "vgg11"))
def test_act_averages_every_tenth_training_batch_across_epochs(name):
    model, data, *rest = training_setup("--model", name, "--width", "0.06", "--score", "act",
                                        "--batch-size", "8", "--lr", "0.001", n_train=120)
    seen, graphs = watch_activations(model), Graphs(False)
    for epoch in range(2):  # the second epoch ends on a tenth batch
        train.train_epoch(model, data, *rest, epoch, graphs)
        train.evaluate(model, data, "test", 64, "fp32", graphs)  # no score is taken from it
    for block, means in zip(model.prunable, seen):
        assert len(means) == 30 + 2
        expected = 0.081 * means[9] + 0.09 * means[20] + 0.1 * means[30]  # means[15] is of a test
        assert (expected > 0).all()
        torch.testing.assert_close(train.filter_scores(block, "act").double(), expected,
                                   rtol=1e-4, atol=1e-7)


# Targets

def test_targets_take_the_extremes_of_the_live_filters_and_of_equal_ones_the_lower_index():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 120):
        scores = torch.randint(-3, 4, (n,), generator=generator) / 100  # many ties
        mask = torch.rand(n, generator=generator) < 0.8
        live = mask.nonzero().flatten().tolist()
        for k in {0, len(live) // 2, len(live)}:
            for target, sign in (("S", 1), ("L", -1)):
                expected = sorted(sorted(live, key=lambda i: (sign * scores[i].item(), i))[:k])
                assert train.select_filters(scores, mask, k, target).tolist() == expected
            drawn = train.select_filters(None, mask, k, "R", generator).tolist()
            assert len(set(drawn)) == k and drawn == sorted(drawn) and set(drawn) <= set(live)


def test_a_quantile_takes_neighbours_in_the_order_of_scores_and_of_equal_ones_the_lower_index():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 60):
        mask = torch.rand(n, generator=generator) < 0.8
        live = mask.nonzero().flatten().tolist()
        ranked = torch.randperm(n, generator=generator) / 100  # no ties
        tied = torch.randint(-3, 4, (n,), generator=generator) / 100
        for k, q in itertools.product({0, len(live) // 3, len(live)}, (0.125, 0.5, 0.75)):
            first = int(q * (len(live) - k) + 0.5)
            for scores in (ranked, tied):
                order = sorted(live, key=lambda i: scores[i].item())
                values = [scores[i].item() for i in order[first:first + k]]
                expected = [i for value in set(values) for i in
                            [i for i in live if scores[i].item() == value][:values.count(value)]]
                indices = train.select_filters(scores, mask, k, f"Q{q}")
                assert indices.tolist() == sorted(expected)


def test_quantiles_on_the_command_line():
    def target(text):
        return train.parse_options(["--target", text]).target

    assert [target(f"Q{q}") for q in ("0", "1", "0.50", ".25")] == ["S", "L", "Q0.5", "Q0.25"]
    for wrong in ("Q", "Q1.5", "Q-0.1", "Qx", "Qnan", "T", "0.5", ""):
        with pytest.raises(UserError, match=f"--target {wrong}: give none, S, L, R, or Q and a"):
            target(wrong)
    options = train.parse_options("--target Q0.5 --r 40".split())
    assert train.run_name(options) == ("Q0.5-r40", "")


def test_selection_and_ties_by_hand():
    """Ties are counted only where they decide."""
    scores = torch.tensor([3.0, 1.0, 1.0, 9.0, 1.0, 3.0, 1.0])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool()
    for target, order, ties in (("S", [1, 2, 4, 0, 5, 3], [0, 3, 3, 0, 2, 0, 0]),
                                ("L", [3, 0, 5, 1, 2, 4], [0, 0, 2, 0, 3, 3, 0])):
        for k, num_tied in enumerate(ties):
            indices = train.select_filters(scores, mask, k, target)
            assert indices.tolist() == sorted(order[:k])
            assert train.count_ties(scores, mask, indices) == num_tied
    with pytest.raises(UserError, match="7 of 6 live"):
        train.select_filters(scores, mask, 7, "S")


@pytest.mark.parametrize("target", ("S", "L"))
def test_a_score_that_is_nan_stops_the_run(target):
    scores, mask = torch.tensor([0.0, math.nan, 1.0]), torch.tensor([True, True, True])
    with pytest.raises(UserError) as error:
        train.select_filters(scores, mask, 1, target)
    assert error.value.code == 1
    mask[1] = False  # the score of a pruned filter does not matter
    assert train.select_filters(scores, mask, 2, target).tolist() == [0, 2]


TIES = ("--target", "S", "--s", 0, "--e", 0, "--p", 0.5, "--r", 1, "--epochs", 1, "--score", "act",
        "--lrs")


def test_scores_that_are_all_equal_prune_nothing(run, directory, capsys):
    assert run(*TIES) == 1  # act, before its tenth batch
    line, = capsys.readouterr().err.splitlines()
    assert "act" in line and "--s" in line and "--score" in line
    path = directory(*TIES)
    assert not read_lines(path) and "act" in (path / "failed.txt").read_text()


def test_scratch_prunes_by_the_initial_weights_before_the_first_step(records, monkeypatch):
    masks, train_epoch = [], train.train_epoch
    monkeypatch.setattr(train, "train_epoch", lambda model, *rest: masks.append(
        model.prunable[-1].mask.clone()) or train_epoch(model, *rest))
    log = records("--target", "L", "--scratch", "--score", "l1", "--p", 0.3, 0.5)
    torch.manual_seed(1)  # the seed of the run
    norms = build_model("resnet20", 4, 0.125).prunable[-1].conv.weight.detach().abs().sum((1, 2, 3))
    assert masks[0].sum() == 4 and norms[masks[0]].max() <= norms[~masks[0]].min()
    for record in log:
        assert record["live"] == [2] * 6 + [4] * 6 + [8] * 4 + [6, 4]
        assert not any(record["removed"]) and record["stability"] is None


def test_equal_scores_are_logged_and_named(run, directory, monkeypatch, capsys):
    scratch = ("--target", "S", "--scratch", "--score", "ebn", "--p", 0.3, 0.5)
    assert run(*scratch) == 0
    config = json.loads((directory(*scratch) / "config.json").read_text())
    assert config["tied"] == {"16": 8, "17": 8}
    printed = capsys.readouterr().out
    assert all(f"layer {layer}: 8 filters have the ebn score" in printed for layer in (16, 17))

    scores = torch.tensor([0.0, 0, 0, 1, 2, 3, 4, 5])
    monkeypatch.setattr(train, "filter_scores", lambda block, score: scores)
    assert run(*TIES, "--p", 0.25) == 0
    record, = read_lines(directory(*TIES, "--p", 0.25))
    assert record["tied"] == {"17": 3} and record["filters"] == {"17": [0, 1]}
    assert "layer 17: 3 filters have the act score" in capsys.readouterr().out


# Metrics and the summary

def record_of(epoch, test_acc, removed=0, stability=None, val_acc=None):
    return {"epoch": epoch, "test_acc": test_acc, "train_acc": test_acc + 10 + epoch,
            "removed": [removed, 0], "stability": stability, "val_acc": val_acc, "seconds": 1.5,
            "test_loss_before": 0.5, "test_loss": 0.5 + removed / 8, "parameters": 90 - epoch,
            "churn": 10.0 * removed if removed else None, "macs": 100 - 10 * epoch}


def test_the_summary_counts_from_the_last_pruning_event_on():
    records = [record_of(0, 90.0, val_acc=99), record_of(1, 60.0, 3, 89.0, val_acc=50),
               record_of(2, 85.0, val_acc=60), record_of(3, 70.0, 2, 96.0, val_acc=65),
               record_of(4, 65.0, val_acc=70), record_of(5, 69.0, val_acc=66)]
    summary = train.summarize_run(records, {"macs": 120, "data": {"train": 7}})
    assert summary == {
        "epochs": 6, "events": 2, "best_acc": 70.0, "best_epoch": 3, "gap": 13.0, "last_acc": 69.0,
        "val_chosen_acc": 65.0, "mean_stability": 92.5, "min_stability": 89.0,
        "below": {"99": 2, "98": 2, "95": 1, "90": 1}, "loss_rise": 0.3125, "churn": 25.0,
        "parameters": 85, "macs": 50, "macs_spent": 21 * (100 + 100 + 90 + 80 + 70 + 60),
        "macs_unpruned": 21 * 6 * 120, "seconds": 9.0}
    without = train.summarize_run([record_of(i, a) for i, a in enumerate((50.0, 95.0, 95.0))], {})
    assert (without["best_acc"], without["best_epoch"]) == (95.0, 1), "the first of equal ones"
    assert (without["mean_stability"], without["min_stability"]) == (100.0, 100.0)
    assert without["val_chosen_acc"] is None and without["macs_spent"] is None


def test_an_event_that_changes_no_image_is_exactly_stable():
    for n, step in ((797, 7), (10_000, 37)):
        data = {"train": ((), range(5)), "test": ((), range(n))}
        for correct in range(1, n, step):
            test = torch.tensor([correct, 3.0, n], dtype=torch.float64), torch.arange(n)
            metrics = train.epoch_metrics("here", data, torch.ones(2).double(), test, test,
                                          event=True)
            assert metrics["stability"] == 100 and metrics["churn"] == 0


def test_metrics_of_an_event_by_hand():
    data = {"train": ((), range(4)), "test": ((), range(5)), "val": ((), range(2))}
    totals = dict(trained=[6, 3], before=[4, 2.5, 5], after=[3, 5, 5], val=[1, 1, 2])
    classes = dict(before=[0, 1, 2, 3, 4], after=[0, 1, 2, 0, 0], val=[0, 0])

    def metrics(event=True, **changed):
        given = {k: torch.tensor(v, dtype=torch.float64) for k, v in (totals | changed).items()}
        given |= {k: (given[k], torch.tensor(v)) for k, v in classes.items()}
        return train.epoch_metrics("here", data, **given, event=event)

    assert metrics() == {
        "train_loss": 1.5, "train_acc": 75, "test_acc_before": 80, "test_acc": 60,
        "test_loss_before": 0.5, "test_loss": 1, "val_acc": 50, "stability": 75, "churn": 40,
        "train_correct": 3, "test_correct_before": 4, "test_correct": 3, "val_correct": 1}
    assert metrics(event=False)["stability"] is metrics(event=False)["churn"] is None
    assert metrics(before=[0, 2.5, 5])["stability"] is None
    for broken in (dict(trained=[math.nan, 3]), dict(before=[4, 2.5, 4]), dict(after=[3, 5, 4]),
                   dict(val=[1, 1, 1])):
        with pytest.raises(UserError, match="here.*lower --lr"):
            metrics(**broken)
