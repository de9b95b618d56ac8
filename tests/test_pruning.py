"""Pruning keeps A.4's schedule exactly, scores are their closed forms, and the choice of filters is the target's."""
import decimal
import itertools
import json
import math
from decimal import Decimal

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from conftest import make_arrays, read_lines, tiny_model

from gst_ext import files, ops
import train

# +-- Schedule: every experiment of runs.sh, in integers only --------------------------------------------------------+

VGG11, RESNET18 = [512] * 4, [512] * 4  # the filters of their last four layers
ALL_RESNET18 = [c for c in (64, 128, 256, 512) for _ in range(4)]
ALL_RESNET20, ALL_RESNET56 = ([c for c in (16, 32, 64) for _ in range(2 * depth)] for depth in (3, 9))
FIG2_VGG11 = ([3, 4, 5, 6], [150, 150, 150, 275], [(3, 10), (3, 10), (3, 10), (9, 10)])
FIG2_RESNET18 = ([7, 8, 9, 10], [150, 150, 170, 275], [(1, 4), (2, 5), (1, 4), (19, 20)])
VGG11_OPTIONS, RESNET18_OPTIONS = ("--model vgg11 --target L", "--model resnet18 --target L")


def every_layer(n, p, s, e):
    return [s] * n, [e] * n, [p] * n


SCHEDULES = [  # options, filters, (s, e, p as integer ratios), r
    *[(f"{VGG11_OPTIONS} --r {r}", VGG11, FIG2_VGG11, r) for r in (4, 20, 40, 60, 100, 200, 300)],
    *[(f"{RESNET18_OPTIONS} --r {r}", RESNET18, FIG2_RESNET18, r) for r in (4, 40)],
    *[(f"{RESNET18_OPTIONS} --score ebn-signed --s 3 4 5 6 --r {r}", RESNET18, ([3, 4, 5, 6], *FIG2_RESNET18[1:]), r)
      for r in (4, 40)],
    *[(f"{RESNET18_OPTIONS} --p 0.25 0.8 0.25 0.95 --r {r}", RESNET18,
       (*FIG2_RESNET18[:2], [(1, 4), (4, 5), (1, 4), (19, 20)]), r) for r in (4, 40)],
    *[(f"--model {model} --optimizer sgd --target S --r {r}", filters, every_layer(len(filters), (1, 10), 40, 100), r)
      for model, filters in (("resnet18", ALL_RESNET18), ("resnet20", ALL_RESNET20), ("resnet56", ALL_RESNET56))
      for r in (30, 60)],
    *[(f"--model resnet18 --optimizer sgd --target S --s 24x16 --e 100x16 --r 1 --p {p[0] / p[1]}x16", ALL_RESNET18,
       every_layer(16, p, 24, 100), 1) for p in ((6, 100), (1, 10))],
    ("--model resnet18 --target L --lr 0.0001 --epochs 4000 --lrs 2000 --score ebn-signed --p 0 0 0 0.7 --s 2500x4 "
     "--e 3250x4 --r 750", RESNET18, ([2500] * 4, [3250] * 4, [(0, 1)] * 3 + [(7, 10)]), 750),
]


def ceiling(a, b):
    return -(-a // b)


def survivors(n, p, s, e, r):
    """{epoch: filters left after it}, by counting."""
    epochs = [epoch for epoch in range(s, e + 1) if (epoch - s) % r == 0]
    m = ceiling((p[1] - p[0]) * n, p[1])
    return {epoch: m + ceiling((n - m) * (len(epochs) - j), len(epochs)) for j, epoch in enumerate(epochs, 1)}


@pytest.mark.parametrize("options, filters, layers, r", SCHEDULES, ids=[s[0] for s in SCHEDULES])
def test_every_iteration_of_every_experiment_keeps_the_exact_count(options, filters, layers, r):
    args = train.parse_options(options.split())
    times = train.schedule(args)
    with torch.device("meta"):
        model = train.build_model(args.model)
    plan = train.pruning_plan(model, args, times)
    first = train.PRUNABLE_BLOCKS[args.model] - len(filters)
    assert [layer for layer, _ in plan] == list(range(first, first + len(filters))), "the LAST n prunable blocks"
    for (_, kept), n, s, e, p in zip(plan, filters, *layers, strict=True):
        assert kept == survivors(n, p, s, e, r)


@pytest.mark.parametrize("n, p, s, e, r, expected", [
    (512, 0.3, 3, 150, 40, {3: 474, 43: 436, 83: 398, 123: 359}),
    (512, 0.9, 6, 275, 40, {6: 447, 46: 381, 86: 315, 126: 250, 166: 184, 206: 118, 246: 52}),
    (512, 0.9, 6, 275, 300, {6: 52}),
    (512, 0.95, 10, 275, 200, {10: 269, 210: 26}),
    (16, 0.1, 40, 100, 30, {40: 16, 70: 16, 100: 15}),
    (64, 0.1, 40, 100, 30, {40: 62, 70: 60, 100: 58}),
    (64, 0.1, 40, 100, 60, {40: 61, 100: 58}),
    (512, 0.7, 2500, 3250, 750, {2500: 333, 3250: 154}),
])
def test_counts_worked_out_by_hand(n, p, s, e, r, expected):
    epochs = train.prune_epochs(s, e, r)
    assert dict(zip(epochs, train.kept_filters(n, p, len(epochs)), strict=True)) == expected


@pytest.mark.parametrize("n, p, left", [
    (10, 0.3, 7), (512, 0.3, 359), (512, 0.25, 384), (512, 0.9, 52), (1, 0.5, 1), (7, 0.999, 1), (1000, 0.1, 900),
    *[(10, 0.7, 3), (20, 0.95, 1), (50, 0.42, 29), (100, 0.58, 42)],  # where (1 - p) * n is a little too much in floats
])
def test_ceilings_are_exact(n, p, left):
    for iterations in (1, 2, 3, 7, 68):
        assert train.kept_filters(n, p, iterations)[-1] == left


@pytest.mark.parametrize("n", (1, 7, 512))
def test_nothing_goes_when_p_is_0(n):
    assert train.kept_filters(n, 0.0, 5) == [n] * 5


def test_p_is_reached_by_the_last_iteration_at_or_before_e():
    """Also where r divides e - s + 1, for which the printed formula counts an iteration past e."""
    divided = 0
    for s, length, r in itertools.product((0, 3), range(40), (1, 2, 3, 4, 5, 7, 40, 60)):
        epochs = list(train.prune_epochs(s, s + length, r))
        assert epochs[0] == s and epochs[-1] <= s + length < epochs[-1] + r and len(epochs) == length // r + 1
        kept = train.kept_filters(50, 0.3, len(epochs))
        assert kept[-1] == 35 and kept == sorted(kept, reverse=True) and kept[0] <= 50
        divided += (length + 1) % r == 0
    assert divided > 100


def test_the_removals_of_a_run_differ_by_one_at_most():
    for n, p, iterations in itertools.product((16, 64, 512), (0.06, 0.3, 0.95), (1, 4, 7, 37, 77)):
        kept = [n, *train.kept_filters(n, p, iterations)]
        steps = [a - b for a, b in itertools.pairwise(kept)]
        assert max(steps) - min(steps) <= 1


# +-- --scale-epochs --------------------------------------------------------------------------------------------------+

def scaled(*options):
    return train.schedule(train.parse_options(["--target", "S", *map(str, options)]))


@pytest.mark.parametrize("factor, ratio", [("0.08", (8, 100)), ("0.5", (1, 2)), ("0.003", (3, 1000)), ("1", (1, 1)),
                                           ("2", (2, 1)), ("0.29", (29, 100)), ("0.1", (1, 10)), ("1.3", (13, 10))])
@pytest.mark.parametrize("model", ("vgg11", "resnet18", "resnet56"))
def test_scaling_rounds_half_up_and_stays_within_the_run(model, factor, ratio):
    def expected(x):
        return (2 * ratio[0] * x + ratio[1]) // (2 * ratio[1])

    args = train.parse_options(["--model", model, "--target", "S", "--scale-epochs", factor])
    times = train.schedule(args)
    assert times["epochs"] == max(1, expected(args.epochs)) and times["r"] == max(1, expected(args.r))
    assert times["lrs"] == [expected(x) for x in args.lrs] and times["s"] == [expected(x) for x in args.s]
    assert times["e"] == [min(expected(x), times["epochs"] - 1) for x in args.e]
    assert times["save_epoch"] == (args.save_epoch and max(1, expected(args.save_epoch))) <= times["epochs"]


def test_scaling_by_hand():
    times = scaled("--scale-epochs", 0.08, "--r", 4)
    assert times == {"epochs": 26, "lrs": [12, 24], "s": [0, 0, 0, 0], "e": [12, 12, 12, 22], "r": 1, "save_epoch": 25,
                     "noise_batches": None}
    times = scaled("--scale-epochs", 0.5, "--s", 1, 3, 5, 6)
    assert times["epochs"] == 163 and times["s"] == [1, 2, 3, 3] and times["e"] == [75, 75, 75, 138]
    times = scaled("--scale-epochs", 0.29, "--lrs", 50)
    assert times["lrs"] == [15], "14.5 exactly, though 0.29 * 50 is 14.499999999999998"
    times = scaled("--scale-epochs", 0.5, "--epochs", 276)
    assert times["epochs"] == 138 and times["e"][-1] == 137, "275 / 2 rounds to the epoch past the last"


@pytest.mark.parametrize("factor, k, left", [(0.2, 1, 1), (0.2, 2, 2), (0.2, 50, 10), (0.2, 1105, 221), (3, 1, 1),
                                             (3, 2, 6)])
def test_scaling_changes_how_long_noise_lasts_but_makes_no_single_pass_of_it_nor_another_of_one(factor, k, left):
    assert scaled("--scale-epochs", factor, "--noise", "zero", "--noise-batches", k)["noise_batches"] == left


def test_scaling_keeps_a_pruning_iteration_for_every_layer():
    """Rounding up may carry s past the run's end, as it may e; a layer that is never pruned would not reach p."""
    for factor, epochs in itertools.product((0.05, 0.1, 0.3, 0.49, 0.5), range(2, 30)):
        times = scaled("--s", epochs - 1, "--e", epochs - 1, "--p", 0.5, "--epochs", epochs, "--lrs", 1,
                       "--save-epoch", 0, "--scale-epochs", factor)
        assert len(train.prune_epochs(times["s"][0], times["e"][0], times["r"])) == 1, f"{epochs} x {factor}: {times}"


# +-- Scores ----------------------------------------------------------------------------------------------------------+

@pytest.mark.parametrize("name", ("vgg11", "resnet18"))
def test_norms_are_of_the_weights_without_bias(name):
    block = tiny_model(name).prunable[-1]
    if block.conv.bias is not None:
        block.conv.bias.data.fill_(100)
    l1, l2 = train.filter_scores(block, "l1"), train.filter_scores(block, "l2")
    assert l1.shape == l2.shape == block.mask.shape
    for i, weights in enumerate(block.conv.weight.detach().flatten(1).tolist()):
        assert l1[i].item() == pytest.approx(math.fsum(abs(w) for w in weights), rel=1e-5)
        assert l2[i].item() == pytest.approx(math.sqrt(math.fsum(w * w for w in weights)), rel=1e-5)


def ebn(gamma, beta, signed=False):
    return ops.ebn_score(torch.tensor([gamma], dtype=torch.float64), torch.tensor([beta], dtype=torch.float64),
                           signed).item()


@pytest.mark.parametrize("gamma", (0.3, 1.0, -2.5))
@pytest.mark.parametrize("beta", (-3.0, -0.4, 0.0, 0.7, 4.0))
def test_ebn_is_the_integral_it_stands_for(gamma, beta):
    sd = abs(gamma)
    integral, _ = scipy.integrate.quad(lambda m: m * scipy.stats.norm.pdf(m, beta, sd), 0, max(beta, 0) + 40 * sd,
                                       points=[max(beta, 0) + sd, max(beta, 0) + 8 * sd], epsabs=0, epsrel=1e-12)
    assert ebn(gamma, beta) == pytest.approx(integral, rel=1e-9)


def exact_ebn(sd, beta):
    """E[max(0, M)] to 60 digits: phi(u) - u Phi(-u) by Laplace's continued fraction of the Mills ratio, u >= 1."""
    with decimal.localcontext(prec=60):
        sd, beta = Decimal(sd), Decimal(beta)
        u = abs(beta) / sd
        pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
        mills = u
        for k in range(3000, 0, -1):
            mills = u + k / mills
        return max(beta, Decimal(0)) + sd * (-u * u / 2).exp() / (2 * pi).sqrt() * (1 - u / mills)


@pytest.mark.parametrize("u", (1.0, 1.7, 3.0, 5.5, 8.3, 12.0, 20.0, 26.6, 30.0))
@pytest.mark.parametrize("gamma", (1.0, -0.37, 3e-5, 1e4))
def test_ebn_keeps_its_relative_accuracy_in_the_far_tails(u, gamma):
    for beta in (-u * abs(gamma), u * abs(gamma)):
        score = ebn(gamma, beta)
        assert score > 0 and abs(Decimal(score) / exact_ebn(abs(gamma), beta) - 1) < Decimal("1e-11")


@pytest.mark.parametrize("gamma", (0.3, 1.0, -0.3, -2.5))
@pytest.mark.parametrize("beta", (-1.5, -0.2, 0.0, 0.2, 1.5))
def test_ebn_closed_forms(gamma, beta):
    def closed_form(g):
        phi = math.exp(-(beta / g)**2 / 2) / math.sqrt(2 * math.pi)
        return beta * math.erfc(-beta / g / math.sqrt(2)) / 2 + g * phi

    assert ebn(gamma, beta) == pytest.approx(closed_form(abs(gamma)), rel=1e-11)
    assert ebn(gamma, beta, signed=True) == pytest.approx(closed_form(gamma), rel=1e-11)
    if gamma < 0:
        assert ebn(gamma, beta, signed=True) == pytest.approx(-ebn(gamma, -beta), rel=1e-12), "-E[max(0, -M)]"


@pytest.mark.parametrize("signed", (False, True))
@pytest.mark.parametrize("beta", (-2.0, 0.0, 2.0))
def test_ebn_without_deviation_is_the_positive_part_of_the_mean(beta, signed):
    assert ebn(0.0, beta, signed) == ebn(-0.0, beta, signed) == max(beta, 0.0)


def test_ebn_is_finite_and_signed_right_for_extreme_values():
    sizes = (0.0, 5e-324, 1e-300, 1e-40, 1.0, 1e40, 1e300)
    values = sorted({sign * size for size in sizes for sign in (-1, 1)})
    gamma, beta = torch.tensor(list(itertools.product(values, values)), dtype=torch.float64).T
    plain, signed = ops.ebn_score(gamma, beta), ops.ebn_score(gamma, beta, signed=True)
    assert plain.isfinite().all() and signed.isfinite().all()
    assert (plain >= beta.clamp(min=0)).all(), "E[max(0, M)] >= max(0, E[M])"
    assert (signed[gamma >= 0] == plain[gamma >= 0]).all() and (signed[gamma < 0] <= 0).all()


def test_ebn_reads_a_blocks_batch_norm_in_double_precision():
    block = tiny_model("resnet18").prunable[0]
    gamma, beta = block.bn.weight.detach().double(), block.bn.bias.detach().double()
    block.bn.weight.data[0] *= -1
    for signed, method in ((False, "ebn"), (True, "ebn-signed")):
        scores = train.filter_scores(block, method)
        assert scores[1].item() == pytest.approx(ebn(gamma[1].item(), beta[1].item(), signed), rel=1e-12)
        assert scores[0].item() == pytest.approx(ebn(-gamma[0].item(), beta[0].item(), signed), rel=1e-12)


# +-- The activation score's moving average ---------------------------------------------------------------------------+

def training_setup(*options, n_train=100):
    """(model, data, optimizer, args, generators) for train_epoch on `n_train` tiny images."""
    args = train.parse_options([*options, "--target", "S"])
    data = train.put_on_device(make_arrays(n_train), torch.device("cpu"))
    data["padded"] = F.pad(data["train"][0], (0, 0, *[train.CROP_PADDING] * 4))
    model = tiny_model(args.model, args.width)
    generators = {name: torch.Generator().manual_seed(i) for i, name in enumerate(("order", "augment"))}
    return model, data, train.make_optimizer(model, args), args, generators


def spy_on_activations(model):
    """Collects, for every block and forward pass, mean |a| computed anew from the block's inputs and parameters."""
    seen = [[] for _ in model.prunable]

    def hook(block, inputs, _, means):
        x, shortcut = inputs if len(inputs) == 2 else (*inputs, None)
        bias = None if block.conv.bias is None else block.conv.bias.double()
        y = F.conv2d(x.double(), block.conv.weight.double(), bias, block.conv.stride, 1).detach()
        y = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        y = y * block.bn.weight.detach().view(-1, 1, 1) + block.bn.bias.detach().view(-1, 1, 1)
        means.append((y if shortcut is None else y + shortcut.detach()).abs().mean((0, 2, 3)))

    for block, means in zip(model.prunable, seen):
        block.register_forward_hook(lambda *call, means=means: hook(*call, means))
    return seen


@pytest.mark.parametrize("name", ("resnet18", "resnet20", "vgg11"))
def test_act_averages_every_tenth_batch_across_epochs(name):
    setup = training_setup("--model", name, "--width", "0.06", "--score", "act", "--batch-size", "8", "--lr", "0.001")
    model = setup[0]
    seen = spy_on_activations(model)
    step = 0
    for _ in range(3):  # 13 batches each: the 10th, 20th and 30th lie in different places of their epochs
        _, step = train.train_epoch(*setup, step)
        model.eval()
        with torch.no_grad():
            model(torch.randn(2, 3, 32, 32))  # no score is taken from evaluation
        for means in seen:
            means.pop()
    assert step == 39 == len(seen[0])
    for block, means in zip(model.prunable, seen):
        expected = torch.zeros(len(block.mask), dtype=torch.float64)
        for batch in (10, 20, 30):
            expected = 0.9 * expected + 0.1 * means[batch - 1]
        assert expected.all()
        torch.testing.assert_close(train.filter_scores(block, "act").double(), expected, rtol=1e-4, atol=1e-7)


def test_act_is_zero_before_the_tenth_batch():
    setup = training_setup("--model", "resnet20", "--width", "0.1", "--score", "act", "--batch-size", "12")
    train.train_epoch(*setup, 0)
    assert not any(train.filter_scores(block, "act").any() for block in setup[0].prunable)


def test_act_is_not_taken_from_test_batches_even_after_an_epoch_that_ends_on_a_tenth():
    setup = training_setup("--model", "resnet20", "--width", "0.1", "--score", "act", "--batch-size", "10")
    model, data, _, args, _ = setup
    train.train_epoch(*setup, 0)
    scores = [train.filter_scores(block, "act") for block in model.prunable]
    train.evaluate(model, data, "test", args)
    assert all(old.any() and torch.equal(old, train.filter_scores(block, "act"))
               for old, block in zip(scores, model.prunable))


# +-- Targets ---------------------------------------------------------------------------------------------------------+

def test_targets_take_the_extremes_of_the_live_filters_and_of_equals_the_lower_index():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        n = 1 + trial % 40
        scores = torch.randint(-3, 4, (n,), generator=generator).float()  # few values, so many ties
        mask = torch.rand(n, generator=generator) < 0.8
        live = mask.nonzero().flatten().tolist()
        for k in {0, len(live) // 2, len(live)}:
            for target, sign in (("S", 1), ("L", -1)):
                expected = sorted(sorted(live, key=lambda i: (sign * scores[i].item(), i))[:k])
                assert train.select_filters(scores, mask, k, target).tolist() == expected
            drawn = train.select_filters(scores, mask, k, "R", generator).tolist()
            assert len(set(drawn)) == k and drawn == sorted(drawn) and set(drawn) <= set(live)


def test_selection_by_hand():
    scores, mask = torch.tensor([3.0, 1.0, 1.0, 9.0, 1.0, 3.0, 0.0]), torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool()
    assert train.select_filters(scores, mask, 2, "S").tolist() == [1, 2]
    assert train.select_filters(scores, mask, 4, "S").tolist() == [0, 1, 2, 4]
    assert train.select_filters(scores, mask, 2, "L").tolist() == [0, 3]
    with pytest.raises(files.UserError):
        train.select_filters(scores, mask, 7, "S")


@pytest.mark.parametrize("target", ("S", "L"))
def test_a_score_that_is_no_number_stops_the_run(target):
    scores, mask = torch.tensor([0.0, math.nan, 1.0]), torch.tensor([True, True, True])
    with pytest.raises(files.UserError) as error:
        train.select_filters(scores, mask, 1, target)
    assert error.value.code == 1
    mask[1] = False  # a pruned filter's score is nobody's business
    assert len(train.select_filters(scores, mask, 1, target)) == 1


def test_random_target_draws_every_subset_equally_often():
    mask = torch.ones(9, dtype=torch.bool)
    mask[4] = False
    generator, scores = torch.Generator().manual_seed(5), torch.arange(9.0)
    counts = dict.fromkeys(itertools.combinations([0, 1, 2, 3, 5, 6, 7, 8], 3), 0)
    for _ in range(100 * len(counts)):
        counts[tuple(train.select_filters(scores, mask, 3, "R", generator).tolist())] += 1
    assert len(counts) == math.comb(8, 3)
    assert 0.001 < scipy.stats.chisquare(list(counts.values())).pvalue < 0.999


def test_random_target_depends_on_its_generator_only():
    mask = torch.ones(30, dtype=torch.bool)

    def draw(seed, scores):
        return train.select_filters(scores, mask, 10, "R", torch.Generator().manual_seed(seed)).tolist()

    torch.manual_seed(1)
    first, state = draw(3, torch.zeros(30)), torch.get_rng_state()
    torch.manual_seed(2)
    assert draw(3, torch.arange(30.0)) == first != draw(4, torch.zeros(30))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was not drawn from"


# +-- Ties ------------------------------------------------------------------------------------------------------------+

def test_ties_that_decide_are_counted_and_no_others():
    scores, mask = torch.tensor([3.0, 1.0, 1.0, 9.0, 1.0, 3.0, 1.0]), torch.tensor([1, 1, 1, 1, 1, 1, 0]).bool()
    for target, counts in (("S", [0, 3, 3, 0, 2, 0, 0]), ("L", [0, 0, 2, 0, 3, 3, 0])):
        for k, expected in enumerate(counts):
            assert train.count_tied(scores, mask, train.select_filters(scores, mask, k, target)) == expected


TIES = ("--model", "resnet18", "--s", 0, "--e", 0, "--p", 0.5, "--r", 1, "--epochs", 1, "--lrs")


@pytest.mark.parametrize("target", ("S", "L"))
def test_scores_that_are_all_equal_prune_nothing(run, directory, capsys, target):
    assert run(*TIES, "--target", target) == 1  # act, before its tenth batch
    line, = capsys.readouterr().err.splitlines()
    assert "act" in line and "--s" in line and "--score" in line
    assert not read_lines(directory(*TIES, "--target", target))
    assert "act" in (directory(*TIES, "--target", target) / "failed.txt").read_text()


def test_scores_that_differ_and_random_targets_know_no_ties(run, directory, capsys):
    for more in (("--target", "S", "--batch-size", 8), ("--target", "R"), ("--target", "S", "--score", "l1")):
        assert run(*TIES, *more) == 0
        record, = read_lines(directory(*TIES, *more))
        assert record["tied"] == {} and record["removed"] == [32]
    assert "equal" not in capsys.readouterr().out


@pytest.mark.parametrize("score", ("act", "ebn"))
def test_scratch_takes_the_scores_of_a_fresh_network_and_says_that_they_are_equal(run, directory, capsys, score):
    more = ("--target", "S", "--scratch", "--score", score, "--p", 0.3, 0.5, "--epochs", 1, "--lrs", "--width", 0.25)
    assert run(*more) == 0
    config = json.loads((directory(*more) / "config.json").read_text())
    assert config["tied"] == {"16": 16, "17": 16}
    line, = [line for line in capsys.readouterr().out.splitlines() if "equal" in line]
    assert score in line and "16 filters of layer 16" in line and "16 filters of layer 17" in line


def test_a_tie_of_some_is_logged(run, directory, monkeypatch, capsys):
    scores = torch.cat([torch.zeros(3), torch.arange(1, 14)])
    monkeypatch.setattr(train, "filter_scores", lambda block, score: scores)
    more = ("--target", "S", "--s", 0, "--e", 0, "--p", 0.125, "--r", 1, "--epochs", 1, "--lrs", "--width", 0.25)
    assert run(*more) == 0
    record, = read_lines(directory(*more))
    assert record["tied"] == {"17": 3} and record["filters"] == {"17": [0, 1]}
    assert "3 filters of layer 17" in capsys.readouterr().out


# +-- Whole runs ------------------------------------------------------------------------------------------------------+

PRUNE = ("--target", "S", "--s", 0, 1, "--e", 3, 4, "--p", 0.3, 0.5, "--r", 2)


def final_masks(path):
    state = torch.load(path / "checkpoint.pt", weights_only=True)["model"]
    return [mask for name, mask in state.items() if name.endswith(".mask") and not name.startswith("stem")]


@pytest.mark.parametrize("target", ("S", "L", "R"))
def test_a_run_logs_what_the_schedule_says_and_masks_only_shrink(run, directory, target):
    options = (*PRUNE, "--target", target, "--width", 0.25)
    assert run(*options) == 0
    records = read_lines(directory(*options))
    kept = [survivors(16, (3, 10), 0, 3, 2), survivors(16, (1, 2), 1, 4, 2)]
    assert kept == [{0: 14, 2: 12}, {1: 12, 3: 8}]
    live, gone = [16, 16], [set(), set()]
    for record in records:
        left = [layer.get(record["epoch"], now) for layer, now in zip(kept, live)]
        assert record["removed"] == [a - b for a, b in zip(live, left)]
        assert record["live"] == [4] * 6 + [8] * 6 + [16] * 4 + left
        for i, layer in enumerate(("16", "17")):
            now = set(record["filters"].get(layer, ()))
            assert len(now) == record["removed"][i] and not now & gone[i]
            gone[i] |= now
        live = left
    masks = final_masks(directory(*options))
    assert all(mask.all() for mask in masks[:16])
    assert [set((~mask).nonzero().flatten().tolist()) for mask in masks[16:]] == gone


def test_stability_is_after_over_before_at_events_and_nothing_elsewhere(run, directory):
    run(*PRUNE)
    records = read_lines(directory(*PRUNE))
    events = 0
    for record in records:
        if any(record["removed"]) and record["test_acc_before"]:
            assert record["stability"] == pytest.approx(100 * record["test_acc"] / record["test_acc_before"])
            events += 1
        else:
            assert record["stability"] is None
            assert any(record["removed"]) or record["test_acc"] == record["test_acc_before"]
    assert events >= 3


def test_scratch_prunes_everything_before_the_first_step(run, directory, monkeypatch):
    options = ("--target", "L", "--scratch", "--score", "l1", "--s", "0x3", "--e", "0x3", "--p", 0, 0.3, 0.5,
               "--epochs", 2, "--lrs", 1, "--width", 0.25)
    seen, train_epoch = [], train.train_epoch

    def spy(model, *rest, **more):
        if not seen:
            seen.extend(block.mask.clone() for block in model.prunable)
        return train_epoch(model, *rest, **more)

    monkeypatch.setattr(train, "train_epoch", spy)
    assert run(*options) == 0
    assert [int(mask.sum()) for mask in seen] == [4] * 6 + [8] * 6 + [16] * 4 + [12, 8]

    torch.manual_seed(1)  # the run's seed, and so its initial weights
    for block, mask in list(zip(train.build_model("resnet20", 4, 0.25).prunable, seen))[-2:]:
        norms = block.conv.weight.detach().abs().sum((1, 2, 3))
        assert norms[mask].max() <= norms[~mask].min()
    for record in read_lines(directory(*options)):
        assert record["live"] == [int(mask.sum()) for mask in seen]
        assert not any(record["removed"]) and record["stability"] is None


def test_scratch_with_its_own_p_needs_no_s_and_e():
    args = train.parse_options(["--target", "L", "--scratch", "--p", "0.5"])
    assert args.p == [0.5] and args.s is None and args.e is None and args.r is None


def test_random_pruning_repeats_with_its_seed(run, directory):
    options = (*PRUNE, "--target", "R", "--width", 0.25)
    filters = []
    for logs, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*options, "--seed", seed, logs=logs)
        filters.append([r["filters"] for r in read_lines(directory(*options, "--seed", seed, logs=logs))])
    assert filters[0] == filters[1] != filters[2]


def record_of(epoch, test_acc, removed=0, stability=None, val_acc=None):
    return {"epoch": epoch, "test_acc": test_acc, "train_acc": test_acc + 10 + epoch, "removed": [removed, 0],
            "stability": stability, "val_acc": val_acc, "seconds": 1.0}


def test_a_runs_accuracy_counts_from_its_last_pruning_event_on():
    records = [record_of(0, 90.0), record_of(1, 60.0, 3, 80.0), record_of(2, 85.0), record_of(3, 70.0, 2, 90.0),
               record_of(4, 65.0), record_of(5, 69.0)]
    summary = train.summarize_epochs(records, {})
    assert (summary["best_acc"], summary["best_epoch"], summary["gap"]) == (70.0, 3, 13.0)
    assert summary["mean_stability"] == np.mean([80, 90]) and summary["events"] == 2 and summary["last_acc"] == 69.0

    baseline = train.summarize_epochs([record_of(i, a) for i, a in enumerate((50.0, 95.0, 60.0))], {})
    assert (baseline["best_acc"], baseline["mean_stability"], baseline["val_chosen_acc"]) == (95.0, 100.0, None)


def test_with_a_validation_split_the_chosen_epoch_is_its_best():
    records = [record_of(0, 90.0, val_acc=99.0), record_of(1, 60.0, 3, 80.0, val_acc=50.0),
               record_of(2, 85.0, val_acc=60.0), record_of(3, 70.0, val_acc=65.0)]
    summary = train.summarize_epochs(records, {})
    assert summary["best_acc"] == 85.0 and summary["val_chosen_acc"] == 70.0


def test_an_event_that_changes_no_image_is_exactly_stable():
    """Of whatever number of right answers; percentages of percentages were 99.99999999999999."""
    for n in (797, 1000, 10_000):
        data = {"train": ((), range(5)), "test": ((), range(n))}
        for right in range(1, n, 7):
            seen = torch.tensor([right, 3.0, n], dtype=torch.float64), torch.arange(n)
            found = train.measured("here", data, torch.tensor([1.0, 2.0], dtype=torch.float64), seen, seen, event=True)
            assert found["stability"] == 100 and found["churn"] == 0


def test_losses_churn_and_stability_of_an_event_by_hand():
    data = {"train": ((), range(4)), "test": ((), range(5)), "val": ((), range(2))}
    trained = torch.tensor([6.0, 3.0], dtype=torch.float64)
    before = torch.tensor([4, 2.5, 5], dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    after = torch.tensor([3, 5, 5], dtype=torch.float64), torch.tensor([0, 1, 2, 0, 0])
    val = torch.tensor([1, 1, 2], dtype=torch.float64), torch.tensor([0, 0])
    assert train.measured("here", data, trained, before, after, val, event=True) == {
        "train_loss": 1.5, "train_acc": 75, "test_acc_before": 80, "test_acc": 60, "test_loss_before": 0.5,
        "test_loss": 1, "val_acc": 50, "stability": 75, "churn": 40}
    for broken in (dict(trained=trained * math.nan), dict(after=(after[0] - torch.tensor([0, 0, 1]), after[1])),
                   dict(val=(val[0] - torch.tensor([0, 0, 1]), val[1]))):
        call = dict(trained=trained, before=before, after=after, val=val) | broken
        with pytest.raises(files.UserError, match="here.*lower --lr"):
            train.measured("here", data, **call)
