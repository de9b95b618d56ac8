#!/usr/bin/env bash
# How many filters torch.nn.utils.prune leaves, and what an optimizer does to those that are gone.
# Version: torch 2.14.1.
# Expected by memory: round(n p) filters go, halves to even; the weights that are gone stay zero.
# Seen: round(n p), halves to even, may empty a layer: 2 of 10 go for p = 0.25, 4 of 10 for 0.35,
#   all 10 for 0.95. A fraction is of the filters that are left: three times 0.3 of 10 leaves 7, 5,
#   3. Momentum goes on moving weight_orig under the mask, and after prune.remove training brings
#   the filters back. Bias and batch norm stay, so the map of a filter that is gone is not 0.
# Run: PYTHON=python bash findings/prune-utils.sh   (a Python with requirements.txt)
set -euo pipefail
"${PYTHON:-python3}" -W ignore - <<'END'
import torch
from torch import nn
from torch.nn.utils import prune

def live(conv):
    return int(conv.weight.flatten(1).any(1).sum())

def left(n, *fractions):
    conv, counts = nn.Conv2d(3, n, 3), []
    for p in fractions:
        prune.ln_structured(conv, "weight", p, 2, dim=0)
        counts.append(live(conv))
    return counts
found = {p: [left(n, p)[0] for n in (10, 64, 512)] for p in (0.25, 0.3, 0.35, 0.9, 0.95)}
print(found, left(10, 0.3, 0.3, 0.3))
assert found == {0.25: [8, 48, 384], 0.3: [7, 45, 358], 0.35: [6, 42, 333], 0.9: [1, 6, 51],
                 0.95: [0, 3, 26]}
assert left(10, 0.3, 0.3, 0.3) == [7, 5, 3]

torch.manual_seed(0)
x, conv, bn = torch.randn(4, 3, 8, 8), nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
optimizer = torch.optim.SGD([*conv.parameters(), *bn.parameters()], 0.1, momentum=0.9)

def step():
    optimizer.zero_grad()
    bn(conv(x)).relu().square().mean().backward()
    optimizer.step()
step()
prune.ln_structured(conv, "weight", 0.3, 2, dim=0)
gone = ~conv.weight_mask.flatten(1).any(1)
before = conv.weight_orig[gone].clone()
step()
print((conv.weight_orig[gone] - before).abs().max(), bn(conv(x))[:, gone].abs().max())
assert not torch.equal(conv.weight_orig[gone], before) and not conv.weight[gone].any()
assert bn(conv(x))[:, gone].abs().max() > 0
conv(x)
prune.remove(conv, "weight")
assert live(conv) == 7
step()
print(live(conv))
assert live(conv) == 10
END
