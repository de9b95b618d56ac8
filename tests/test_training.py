"""A run's records are those of a second, short implementation; seeds share what they should."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_arrays, weights

import train
from gst_ext.networks import build_model

POOLED = (0, 1, 3, 5, 7)  # VGG11's layers before a max-pool
LEFT = {5: {0: 32}, 6: {1: 28, 3: 23}, 7: {2: 24, 4: 16}}  # {layer: {epoch: filters left after it}}
ARGV = ("--model", "vgg11", "--width", 0.0625, "--backend", "eager", "--target", "L", "--score",
        "l2", "--s", 0, 1, 2, "--e", 0, 3, 4, "--p", 0, 0.3, 0.5, "--r", 2, "--optimizer", "sgd",
        "--lr", 0.02, "--lrs", 4, "--epochs", 6, "--batch-size", 12, "--test-batch-size", 40,
        "--augment", "--val-split", 16)


def seeded(purpose, seed=1):
    """Returns the generator of a run's seed for 0 order, 1 augmentation, 2 target, 3 noise."""
    own_seed = np.random.SeedSequence((seed, purpose)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(own_seed))


def second_implementation():
    """Yields what the run of ARGV should record of each epoch: plain PyTorch, masked maps."""
    arrays = {k: torch.from_numpy(v) for k, v in make_arrays().items() if k != "classes"}
    split = np.random.RandomState(0).permutation(96)
    val, kept = (torch.from_numpy(np.sort(part)) for part in (split[:16], split[16:]))
    pixels = arrays["train_x"][kept].double()
    mean, std = pixels.mean((0, 1, 2)), pixels.std((0, 1, 2), correction=0)
    torch.manual_seed(1)
    model = build_model("vgg11", 4, 0.0625)
    convs, norms = [b.conv for b in model.prunable], [b.bn for b in model.prunable]
    masks = [torch.ones(len(conv.weight)) for conv in convs]
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=1e-4)
    order_generator, crop_generator = seeded(0), seeded(1)

    def forward(images, training):
        x = ((images - mean) / std).float().permute(0, 3, 1, 2)
        for i, (conv, bn) in enumerate(zip(convs, norms)):
            x = F.batch_norm(conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias,
                             training, 0.1, 1e-5)
            x = F.relu(x) * masks[i].view(-1, 1, 1)
            x = F.max_pool2d(x, 2) if i in POOLED else x
        return model.linear(x.mean((2, 3)))

    @torch.no_grad()
    def test(x, y):
        logits = torch.cat([forward(part, False) for part in x.split(40)])
        return logits.argmax(1), (logits.argmax(1) == y).sum().item(), F.cross_entropy(logits, y)

    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = lr = 0.02 if epoch < 4 else 0.002
        order = torch.randperm(80, generator=order_generator)
        offsets = torch.randint(0, 9, (2, 80), generator=crop_generator)
        flips = torch.randint(0, 2, (80,), generator=crop_generator)
        train_loss = train_correct = 0
        for start in range(0, 80, 12):
            places = range(start, min(start + 12, 80))
            images = []
            for j in places:
                image = F.pad(arrays["train_x"][kept][order[j]], (0, 0, 4, 4, 4, 4))
                image = image[offsets[0, j]:, offsets[1, j]:][:32, :32]
                images.append(image.flip(1) if flips[j] else image)
            labels = arrays["train_y"][kept][order[start:start + 12]]
            logits = forward(torch.stack(images), True)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # a pruned filter stays zero
                for conv, bn, mask in zip(convs, norms, masks):
                    for p in (*conv.parameters(), *bn.parameters()):
                        p[mask == 0] = 0
            train_loss += loss.item() * len(labels) / 80
            train_correct += (logits.argmax(1) == labels).sum().item()
        classes, correct_before, loss_before = test(arrays["test_x"], arrays["test_y"])
        filters = {}
        for layer, left in LEFT.items():
            if epoch in left:
                live = masks[layer].nonzero().flatten().tolist()
                norm = convs[layer].weight.detach().flatten(1).norm(dim=1)
                live.sort(key=lambda i: norm[i].item())
                if live[left[epoch]:]:
                    filters[str(layer)] = sorted(live[left[epoch]:])
                masks[layer][live[left[epoch]:]] = 0
                for p in (*convs[layer].parameters(), *norms[layer].parameters()):
                    p.data[masks[layer] == 0] = 0
                    optimizer.state[p]["momentum_buffer"][masks[layer] == 0] = 0
        classes_after, correct, loss = test(arrays["test_x"], arrays["test_y"])
        changed = (classes != classes_after).sum().item()
        val_correct = test(arrays["train_x"][val], arrays["train_y"][val])[1]
        yield {
            "epoch": epoch, "lr": lr, "train_loss": train_loss, "train_acc": train_correct / 0.8,
            "test_acc_before": correct_before / 0.64, "test_acc": correct / 0.64,
            "test_loss_before": loss_before.item(), "test_loss": loss.item(),
            "val_acc": val_correct / 0.16,
            "stability": 100 * correct / correct_before if filters else None,
            "churn": changed / 0.64 if filters else None, "train_correct": train_correct,
            "test_correct_before": correct_before, "test_correct": correct,
            "val_correct": val_correct, "filters": filters,
            "removed": [len(filters.get(layer, ())) for layer in "567"],
            "live": [int(mask.sum()) for mask in masks], "tied": {}, "noised": []}


def test_a_run_is_what_a_second_implementation_computes(records):
    found = records(*ARGV)
    for record, expected in zip(found, second_implementation(), strict=True):
        for name, value in expected.items():
            exact = value is None or isinstance(value, (dict, list))
            assert record[name] == (value if exact else pytest.approx(value, rel=1e-3)), name


def test_runs_of_a_seed_share_initial_weights_order_and_augmentation(records, monkeypatch):
    batches, crop_and_flip = [], train.crop_and_flip

    def watch(padded, *draw):
        batches[-1] += [tensor.tolist() for tensor in draw]
        return crop_and_flip(padded, *draw)

    monkeypatch.setattr(train, "crop_and_flip", watch)

    def first_epoch(*more):
        batches.append([])
        first, _ = records("--augment", "--epochs", 2, "--lrs", "--batch-size", 8, *more)
        return [first[k] for k in ("train_loss", "train_correct", "test_loss_before")]

    prune = ("--s", 0, "--e", 0, "--p", 0.5, "--r", 1)
    baseline = first_epoch("--target", "none")
    for more in (("S", "--score", "act"), ("R",), ("L", "--noise", "gauss")):
        assert first_epoch(*prune, "--target", *more) == baseline
    assert first_epoch("--p", 0.5, "--scratch", "--target", "R") != baseline
    assert len(batches[0]) == 2 * 12 * 3 and all(other == batches[0] for other in batches)
    assert first_epoch("--target", "none", "--seed", 2) != baseline and batches[-1] != batches[0]


@pytest.mark.parametrize("seed", (1, 7))
def test_random_filters_come_from_their_own_generator(records, directory, seed):
    argv = ("--target", "R", "--s", 0, "--e", 1, "--p", 0.5, "--r", 1, "--epochs", 2, "--lrs",
            "--prune-bn", "keep", "--seed", seed)
    generator, live, expected = seeded(2, seed), list(range(8)), []
    for n in (8, 6):
        expected.append(sorted(live[i] for i in torch.randperm(n, generator=generator)[:2]))
        live = [i for i in live if i not in expected[-1]]
    log, state = records(*argv), weights(directory(*argv))
    assert [record["filters"]["17"] for record in log] == expected
    assert all(record["tied"] == {} for record in log)
    assert state["pairs.8.1.mask"].sum() == 4 and state["pairs.8.1.bn_mask"].all()
