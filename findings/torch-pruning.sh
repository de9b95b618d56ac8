#!/usr/bin/env bash
# How many filters Torch-Pruning leaves, at once and in steps, what is in its default score, and
# what an optimizer that was there before goes on training.
# Version: Torch-Pruning 1.6.1 (its __version__ says 1.6.0), torch 2.14.1.
# Expected by memory: int(n (1 - p)) filters stay, at least 1, in however many steps; round_to
#   rounds this number up; the score is the norm of all weights of a filter's group; an old
#   optimizer raises, or trains tensors that the network no longer has.
# Seen: int(n (1 - p)) = 7, 44, 358 of 10, 64, 512 for p = 0.3. A layer that would be emptied stays
#   whole, without a word: 10 of 10 for p = 0.9, since int(10 (1 - 0.9)) is 0 in floating point, and
#   10, 64, 512 for p = 0.999. In steps it stops where the next would empty the layer: for p = 0.9,
#   iterative_steps of 1, 3 and 9 leave 10, 4 and 2 of 10. round_to rounds down: for p = 0.3, 8
#   leaves 40 of 64, and 4 leaves 4 of 10. The score is the mean over conv, batch norm and the next
#   layer of sums of squares, without root and biases, divided by its mean over the filters. The
#   old optimizer raises nothing and trains only what was not pruned: build a new one after each
#   pruning step.
# Run: PYTHON=python bash findings/torch-pruning.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    torch-pruning==1.6.1
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import torch
import torch_pruning as tp
from torch import nn

x = torch.randn(2, 3, 8, 8)

def network(n):
    return nn.Sequential(nn.Conv2d(3, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(),
                         nn.Conv2d(n, 7, 3, padding=1), nn.Flatten(), nn.Linear(7 * 64, 4))

def prune(model, p, steps=1, **options):
    score = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.MagnitudePruner(model, x, importance=score, pruning_ratio=p,
                                       iterative_steps=steps,
                                       ignored_layers=[model[3], model[5]], **options)
    for _ in range(steps):
        pruner.step()
    return model[0].out_channels
left = {p: [prune(network(n), p) for n in (10, 64, 512)] for p in (0.3, 0.9, 0.999)}
print(left)
assert left == {0.3: [7, 44, 358], 0.9: [10, 6, 51], 0.999: [10, 64, 512]}
in_steps = [prune(network(10), 0.9, steps) for steps in (1, 3, 9)]
rounded = [prune(network(64), 0.3, round_to=8), prune(network(10), 0.3, round_to=4)]
print("in steps", in_steps, "rounded", rounded)
assert in_steps == [10, 4, 2] and rounded == [40, 4]

model = network(6)
nn.init.uniform_(model[1].weight)
group = tp.DependencyGraph().build_dependency(model, x).get_pruning_group(
    model[0], tp.prune_conv_out_channels, list(range(6)))
squares = (model[0].weight.square().sum((1, 2, 3)) + model[1].weight.square()
           + model[3].weight.square().sum((0, 2, 3))) / 3
score = tp.importance.MagnitudeImportance(p=2)(group)
print(score)
assert torch.allclose(score, squares / squares.mean())

model = network(10)
optimizer = torch.optim.Adam(model.parameters(), 0.1)
prune(model, 0.3)
before = {name: p.detach().clone() for name, p in model.named_parameters()}
model(x).sum().backward()
optimizer.step()
moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
print(moved)
assert moved == ["3.bias", "5.weight", "5.bias"]
END
