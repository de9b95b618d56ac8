"""Noise in place of pruning (D): which forward passes are noised, what the noise is, and what is put back after it."""
import json
import math

import pytest
import scipy.stats
import torch
from conftest import read_lines

import train


def noise_args(kind="zero", k=1, *more):
    return train.parse_options(["--target", "L", "--noise", kind, "--noise-batches", str(k), *more])


def make_block(c_in=3, c_out=6, seed=0):
    torch.manual_seed(seed)
    block = train.Block(c_in, c_out, bias=True)
    with torch.no_grad():
        for tensor in (*block.parameters(), block.bn.running_mean, block.bn.running_var):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return block


def snapshot(block):
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Which passes: 391 training batches an epoch, two evaluations, an event between the first epoch's two.

@pytest.mark.parametrize("kind", ("zero", "gauss"))
@pytest.mark.parametrize("k, test_batches, test, train_passes, epochs", [
    (1, 79, 1, 0, 0),
    (2, 79, 79, 2, 1),
    (50, 79, 79, 50, 1),
    (391, 79, 79, 391, 1),
    (392, 79, 79 + 158, 392, 2),
    (1105, 79, 79 + 158 + 158, 1105, 3),
    (89, 40, 40, 89, 1),
    (630, 40, 40 + 80, 630, 2),
    (1220, 40, 40 + 3 * 80, 1220, 4),
    (2480, 40, 40 + 6 * 80, 2480, 7),
])
def test_noise_ends_after_k_training_batches_or_one_pass(k, test_batches, test, train_passes, epochs, kind):
    block, args, random = make_block(1, 4), noise_args(kind, k), generator()
    state = train.new_noise(block)
    weight = block.conv.weight.data
    still = torch.rand(4, 1, 3, 3)
    changed = {True: 0, False: 0}

    def forward(training):
        weight.copy_(still)
        train.noise_pass(block, state, args, random, training)
        moved = (weight != still).flatten(1).any(1)
        assert moved.tolist() in ([False] * 4, [False, True, False, True])
        changed[training] += int(moved.any())
        train.end_noise_if_due(block, state, args, args.noise_batches)
        return moved.any()

    last_epoch = None
    for epoch in range(9):
        noised = [forward(True) for _ in range(391)] + [forward(False) for _ in range(test_batches)]
        if epoch == 0:
            assert not any(noised), "nothing is noised before the event"
            train.start_noise(block, state, torch.tensor([1, 3]), args)
        noised += [forward(False) for _ in range(test_batches)]
        last_epoch = epoch if any(noised) else last_epoch
    assert changed == {False: test, True: train_passes} and last_epoch == epochs
    assert (state["test"], state["train"], state["active"]) == (test, train_passes, None)


# What the noise is.

@pytest.mark.parametrize("kind", ("zero", "gauss"))
def test_noise_touches_nothing_but_the_targeted_filters_weights(kind):
    block, args = make_block(), noise_args(kind)
    state, old = train.new_noise(block), snapshot(block)
    train.noise_pass(block, state, args, generator(), True)
    assert all(torch.equal(v, old[name]) for name, v in block.state_dict().items()), "no event yet"
    train.start_noise(block, state, torch.tensor([1, 4]), args)
    train.noise_pass(block, state, args, generator(), True)
    new = snapshot(block)
    for i in range(6):
        weight = new["conv.weight"][i]
        if i not in (1, 4):
            assert torch.equal(weight, old["conv.weight"][i])
        else:
            assert not weight.any() if kind == "zero" else (weight != old["conv.weight"][i]).all()
    del new["conv.weight"], old["conv.weight"]
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_gaussian_noise_has_the_deviation_of_an_untargeted_filter_now():
    block, args, random = make_block(64, 12), noise_args("gauss", 100), generator(3)
    calm = torch.randn(64, 3, 3)  # every untargeted filter: which of them sets the deviation is left open
    state, targeted, draws = train.new_noise(block), [0, 2, 3, 7, 8, 11], []
    train.start_noise(block, state, torch.tensor(targeted), args)
    weight = block.conv.weight.data
    for scale in (1.0, 3.0, 0.2) * 7:
        weight.copy_(calm * scale)
        weight[targeted] = 0
        train.noise_pass(block, state, args, random, True)
        draws.append((weight[targeted] / scale).flatten())
    noise = torch.cat(draws).double()
    n, sigma = len(noise), calm.std().item()
    assert n > 70_000
    assert abs(noise.mean().item()) < 4 * sigma / math.sqrt(n)
    assert abs(noise.std().item() / sigma - 1) < 4 / math.sqrt(2 * n) + 1 / (2 * 576)  # std by n or n - 1: both will do
    assert scipy.stats.kstest(noise[::7].numpy() / sigma, "norm").pvalue > 1e-3
    rows = torch.stack(draws).double()
    worst = (torch.corrcoef(rows) - torch.eye(len(rows))).abs().max().item()
    assert worst < 5 / math.sqrt(rows.shape[1]), "each pass draws anew"


def test_gaussian_noise_adds_up_over_passes():
    block, args, random = make_block(64, 4), noise_args("gauss", 100), generator()
    state = train.new_noise(block)
    train.start_noise(block, state, torch.tensor([2]), args)
    start = block.conv.weight.detach().clone()
    for _ in range(25):
        train.noise_pass(block, state, args, random, False)
    moved = (block.conv.weight.detach() - start)[2]
    assert moved.std().item() == pytest.approx(5 * start[0].std().item(), rel=0.15)


def test_gaussian_noise_draws_from_its_own_generator_only():
    after = []
    for seed, global_seed in ((1, 10), (1, 11), (2, 10)):
        block, args = make_block(), noise_args("gauss")
        state = train.new_noise(block)
        train.start_noise(block, state, torch.tensor([0, 5]), args)
        torch.manual_seed(global_seed)
        untouched = torch.get_rng_state()
        train.noise_pass(block, state, args, generator(seed), True)
        assert torch.equal(torch.get_rng_state(), untouched)
        after.append(block.conv.weight.detach().clone())
    assert torch.equal(after[0], after[1]) and not torch.equal(after[0], after[2])


# Which filters, event by event.

def two_events(filters):
    """Events on filters 1 and then 2, 4; the indices that a pass after the second zeroes."""
    block, args = make_block(), noise_args("zero", 50, "--noise-filters", filters)
    state = train.new_noise(block)
    train.start_noise(block, state, torch.tensor([1]), args)
    train.noise_pass(block, state, args, generator(), False)
    train.start_noise(block, state, torch.tensor([2, 4]), args)
    assert (state["test"], state["train"]) == (0, 0), "each event counts its own passes"
    block.conv.weight.data.fill_(1)
    train.noise_pass(block, state, args, generator(), False)
    return (block.conv.weight == 0).flatten(1).all(1).nonzero().flatten().tolist()


def test_newest_noises_an_events_own_filters_and_all_every_one_so_far():
    assert two_events("newest") == [2, 4]
    assert two_events("all") == [1, 2, 4]


@pytest.mark.parametrize("target", ("S", "L", "R"))
@pytest.mark.parametrize("filters", ("newest", "all"))
def test_a_targeted_filter_is_not_targeted_again(filters, target):
    args = train.parse_options(["--width", "0.05", "--noise", "gauss", "--target", target, "--noise-filters", filters,
                                "--s", "0", "--e", "4", "--p", "0.6", "--r", "1"])
    torch.manual_seed(0)
    model = train.build_model("vgg11", 4, args.width)
    plan = train.pruning_plan(model, args, train.schedule(args))
    noise = [train.new_noise(model.prunable[-1])]
    targeted = []
    for epoch in range(5):
        due = train.filters_due(model, args, plan, epoch, noise)
        gone = train.prune_now(model, train.make_optimizer(model, args), args, plan, due, noise, generator(epoch))
        train.noise_pass(model.prunable[-1], noise[0], args, generator(), False)
        targeted += gone[7]
    n = len(model.prunable[-1].mask)
    assert len(targeted) == len(set(targeted)) == n - math.ceil(0.4 * n)
    assert model.prunable[-1].mask.all() and not train.filters_due(model, args, plan, 5, noise)


# Restoring (D.2).

@pytest.mark.parametrize("k", (1, 3))
def test_restore_zeroes_batch_norm_too_and_puts_all_back_bit_for_bit(k):
    block, args = make_block(), noise_args("zero", k, "--noise-restore")
    state, old, chosen = train.new_noise(block), snapshot(block), torch.tensor([0, 3])
    train.start_noise(block, state, chosen, args)
    restored = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    passes = 1 if k == 1 else k + 2
    for i in range(passes):
        train.noise_pass(block, state, args, generator(), training=i >= 2)
        for name in restored[:3]:
            assert not block.state_dict()[name][chosen].any()
        with torch.no_grad():  # as a training step would
            for tensor in (*block.parameters(), block.bn.running_mean, block.bn.running_var):
                tensor += 1 / 3
        trained = snapshot(block)
        assert state["active"] is not None
        train.end_noise_if_due(block, state, args, args.noise_batches)
    assert state["active"] is None
    new = snapshot(block)
    others = torch.tensor([1, 2, 4, 5])
    for name in restored:
        assert torch.equal(new[name][chosen], old[name][chosen])
        assert torch.equal(new[name][others], trained[name][others])
    assert torch.equal(new["conv.bias"], trained["conv.bias"])


def test_without_restore_the_noised_weights_stay():
    block, args = make_block(), noise_args("zero", 1)
    state = train.new_noise(block)
    train.start_noise(block, state, torch.tensor([3]), args)
    train.noise_pass(block, state, args, generator(), False)
    train.end_noise_if_due(block, state, args, args.noise_batches)
    assert state["active"] is None and not block.conv.weight[3].any() and block.bn.weight[3] != 0


def test_an_event_in_the_middle_of_anothers_noise_restores_that_first():
    block, args = make_block(), noise_args("zero", 50, "--noise-restore", "--noise-filters", "all")
    state, old = train.new_noise(block), snapshot(block)
    train.start_noise(block, state, torch.tensor([1]), args)
    train.noise_pass(block, state, args, generator(), True)
    train.start_noise(block, state, torch.tensor([2]), args)
    assert all(torch.equal(v, old[name]) for name, v in block.state_dict().items())
    for _ in range(50):
        train.noise_pass(block, state, args, generator(), True)
        train.end_noise_if_due(block, state, args, args.noise_batches)
    assert all(torch.equal(v, old[name]) for name, v in block.state_dict().items())


# A whole run: 3 training and 2 test batches an epoch.

NOISE = ("--target", "L", "--s", 1, "--e", 3, "--p", 0.5, "--r", 2, "--test-batch-size", 32, "--width", 0.25)


@pytest.mark.parametrize("k, counts", [
    (1, [(0, 0), (1, 0), (1, 0), (1, 0), (1, 0)]),
    (2, [(0, 0), (2, 0), (2, 2), (2, 0), (2, 2)]),
    (4, [(0, 0), (2, 0), (6, 3), (2, 0), (6, 3)]),  # its 4th batch is the first of epoch 3, before the next event
])
def test_a_noise_run_counts_its_passes_and_keeps_its_filters(run, directory, monkeypatch, k, counts):
    options = (*NOISE, "--noise", "zero", "--noise-batches", k)
    evaluate, calls = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *call, **more: calls.append(call[2]) or evaluate(*call, **more))
    assert run(*options) == 0
    assert calls == ["test"] * 10, "before and after every epoch's pruning iteration, due or not"
    records = read_lines(directory(*options))
    targeted = []
    for record, (test, train_passes) in zip(records, counts, strict=True):
        assert record["noised"] == [{"test": test, "train": train_passes}]
        assert record["live"] == [4] * 6 + [8] * 6 + [16] * 6
        targeted += record["filters"].get("17", [])
    assert [sum(r["removed"]) for r in records] == [0, 4, 0, 4, 0]
    assert len(set(targeted)) == 8
    assert records[1]["stability"] is not None or records[1]["test_acc_before"] == 0


def test_scaled_epochs_end_the_noise_as_early(run, directory):
    options = ("--target", "L", "--s", 2, "--e", 2, "--p", 0.5, "--epochs", 10, "--scale-epochs", 0.5, "--noise",
               "zero", "--noise-batches", 8)
    assert run(*options) == 0
    config = json.loads((directory(*options) / "config.json").read_text())
    assert config["schedule"]["noise_batches"] == 4 and config["method"].startswith("zero-8")
    assert [record["noised"][0]["train"] for record in read_lines(directory(*options))] == [0, 0, 3, 4, 4]
