"""Noise instead of pruning (D): which forward passes have it, what it is, and what it restores."""
import math

import pytest
import scipy.stats
import torch

import train
from gst_ext.networks import Block, build_model


def noisy_block(kind="zero", batches=1, filters="newest", restore=False, seed=0, sizes=(3, 6)):
    """Returns a block without trivial values and its FilterNoise; the block is layer 7."""
    torch.manual_seed(0)
    block = Block(*sizes, bias=True)
    with torch.no_grad():
        for tensor in (*block.parameters(), block.bn.running_mean, block.bn.running_var):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    generator = torch.Generator().manual_seed(seed)
    return block, train.FilterNoise({7: block}, kind, batches, filters, restore, generator)


def snapshot(block):
    return {name: tensor.clone() for name, tensor in block.state_dict().items()}


def same(block, old):
    return all(torch.equal(tensor, old[name]) for name, tensor in block.state_dict().items())


# An epoch has 391 training batches and two evaluations; the event is between the first two.
@pytest.mark.parametrize("kind, k, test_batches, test, training, last_epoch", [
    ("zero", 1, 79, 1, 0, 0),
    ("gauss", 1, 79, 1, 0, 0),
    ("gauss", 2, 79, 79, 2, 1),
    ("zero", 50, 79, 79, 50, 1),
    ("gauss", 391, 79, 79, 391, 1),
    ("zero", 392, 79, 79 + 158, 392, 2),
    ("gauss", 1105, 79, 79 + 158 + 158, 1105, 3),
    ("zero", 2480, 40, 40 + 6 * 80, 2480, 7),
])
def test_noise_ends_after_k_training_batches_or_one_pass(kind, k, test_batches, test, training,
                                                         last_epoch):
    block, noise = noisy_block(kind, k, sizes=(1, 4))
    weight, original = block.conv.weight.data, torch.rand(4, 1, 3, 3)
    noisy = {True: 0, False: 0}

    def forward(in_training):
        weight.copy_(original)
        noise.apply(in_training)
        changed = (weight != original).flatten(1).any(1).tolist()
        assert changed in ([False] * 4, [False, True, False, True])
        noisy[in_training] += any(changed)
        noise.after_batch()
        return any(changed)

    epochs = []
    for epoch in range(9):
        passes = [forward(True) for _ in range(391)] + [forward(False) for _ in range(test_batches)]
        if epoch == 0:
            assert not any(passes), "nothing is noised before the event"
            noise.start(7, torch.tensor([1, 3]))
        passes += [forward(False) for _ in range(test_batches)]
        epochs += [epoch] * any(passes)
    assert noisy == {False: test, True: training} and epochs == list(range(last_epoch + 1))
    state = noise.state[7]
    assert (state["test"], state["train"], state["active"]) == (test, training, None)


@pytest.mark.parametrize("kind", ("zero", "gauss"))
def test_noise_changes_the_weights_of_the_noised_filters_only_and_they_stay(kind):
    block, noise = noisy_block(kind)
    old = snapshot(block)
    noise.apply(True)
    assert same(block, old), "no event yet"
    noise.start(7, torch.tensor([1, 4]))
    noise.apply(False)
    noise.after_batch()
    noise.apply(True)  # the noise is over
    changed = (block.conv.weight != old["conv.weight"]).flatten(1)
    assert changed.any(1).tolist() == changed.all(1).tolist() == [False, True, False] * 2
    assert kind == "gauss" or not block.conv.weight[[1, 4]].any()
    block.conv.weight.data.copy_(old["conv.weight"])
    assert same(block, old)


def test_gaussian_noise_is_added_with_the_present_deviation_of_a_filter_that_never_had_it():
    block, noise = noisy_block("gauss", 100, seed=3, sizes=(64, 12))
    noised, draws = [0, 2, 3, 7, 8, 11], []
    noise.start(7, torch.tensor(noised))
    weight, other = block.conv.weight.data, torch.randn(64, 3, 3)  # any other filter will do
    for scale in (1.0, 3.0, 0.2) * 7:
        weight.copy_(other * scale)
        weight[noised] = 9
        noise.apply(True)
        draws.append(((weight[noised] - 9) / scale).flatten())
    rows = torch.stack(draws).double()
    n, sigma = rows.numel(), other.std().item()
    assert abs(rows.mean().item()) < 4 * sigma / math.sqrt(n)
    assert abs(rows.std().item() / sigma - 1) < 4 / math.sqrt(2 * n) + 1e-3
    assert scipy.stats.kstest(rows.flatten()[::7].numpy() / sigma, "norm").pvalue > 1e-3
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(rows.shape[1]), "each pass draws anew"


def test_gaussian_noise_draws_from_its_own_generator_only():
    results = []
    for seed, global_seed in ((1, 10), (1, 11), (2, 10)):
        block, noise = noisy_block("gauss", seed=seed)
        noise.start(7, torch.tensor([0, 5]))
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        noise.apply(True)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(block.conv.weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("filters, expected", [("newest", [2, 4]), ("all", [1, 2, 4])])
def test_newest_noises_the_filters_of_an_event_and_all_those_of_every_event(filters, expected):
    block, noise = noisy_block("zero", 50, filters)
    noise.start(7, torch.tensor([1]))
    noise.apply(False)
    noise.start(7, torch.tensor([2, 4]))
    assert (noise.state[7]["test"], noise.state[7]["train"]) == (0, 0), "each event counts its own"
    block.conv.weight.data.fill_(1)
    noise.apply(False)
    zero = (block.conv.weight == 0).flatten(1).all(1)
    assert zero.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("target, filters", [("S", "newest"), ("L", "all"), ("R", "newest")])
def test_a_noised_filter_is_not_selected_again(target, filters):
    model, generator = build_model("vgg11", 4, 0.05), torch.Generator().manual_seed(0)
    block = model.prunable[-1]
    n = len(block.mask)
    schedule = {7: dict(enumerate(train.num_filters_to_keep(n, 0.6, 5)))}
    noise = train.FilterNoise({7: block}, "gauss", 50, filters, False, generator)
    noised = []
    for epoch in range(5):
        pruned, _ = train.pruning_event(model, None, "l2", target, generator, noise, False,
                                        schedule, epoch)
        noise.apply(False)
        noised += pruned[7]
    assert len(noised) == len(set(noised)) == n - math.ceil(0.4 * n)
    assert block.mask.all() and block.bn_mask.all()


@pytest.mark.parametrize("k", (1, 3))
def test_restore_zeroes_batch_norm_too_and_restores_every_bit(k):
    block, noise = noisy_block("zero", k, restore=True)
    old, noised = snapshot(block), torch.tensor([0, 3])
    others = torch.tensor([1, 2, 4, 5])
    noise.start(7, noised)
    for i in range(1 if k == 1 else k + 2):
        assert noise.state[7]["active"] is not None
        noise.apply(training=i >= 2)
        for tensor in (block.conv.weight, block.bn.weight, block.bn.bias):
            assert not tensor[noised].any() and tensor[others].all()
        assert block.bn.running_var.all()
        with torch.no_grad():  # as a training step would
            for tensor in (*block.parameters(), block.bn.running_mean, block.bn.running_var):
                tensor += 1 / 3
        trained = snapshot(block)
        noise.after_batch()
    assert noise.state[7]["active"] is None
    expected = {name: tensor.clone() for name, tensor in trained.items()}
    for name in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        expected[name][noised] = old[name][noised]
    assert same(block, expected)


def test_an_event_during_the_noise_of_another_restores_that_first():
    block, noise = noisy_block("zero", 50, "all", restore=True)
    old = snapshot(block)
    for filters in ([1], [2]):
        noise.start(7, torch.tensor(filters))
        assert same(block, old)
        noise.apply(True)
    noise.stop(7)
    assert same(block, old)


# An epoch of the tiny data has three training batches and twice two test batches.
@pytest.mark.parametrize("more, counts", [
    (("--s", 1, "--e", 3, "--r", 2), [(0, 0), (1, 0), (1, 0), (1, 0), (1, 0)]),
    (("--s", 2, "--e", 6, "--r", 4, "--epochs", 10, "--lrs", "--noise-batches", 4,
      "--scale-epochs", 0.5), [(0, 0), (2, 0), (2, 2), (2, 0), (2, 2)]),
])
def test_a_run_with_noise_counts_its_passes_and_keeps_its_filters(records, monkeypatch, more,
                                                                  counts):
    evaluate, splits = train.evaluate, []
    monkeypatch.setattr(train, "evaluate", lambda *call, **options: splits.append(call[2])
                        or evaluate(*call, **options))
    log = records("--target", "L", "--p", 0.5, "--test-batch-size", 32, "--noise", "zero", *more)
    assert splits == ["test"] * 10, "twice an epoch, also without an event"
    assert [record["noised"] for record in log] == [[{"test": test, "train": training}]
                                                    for test, training in counts]
    assert all(record["live"] == [2] * 6 + [4] * 6 + [8] * 6 for record in log)
    assert [sum(record["removed"]) for record in log] == [0, 2, 0, 2, 0]
    assert len({i for record in log for i in record["filters"].get("17", ())}) == 4
    assert log[1]["stability"] is not None and log[2]["stability"] is None
