#!/usr/bin/env bash
# Which optimizers of pytorch_optimizer move pruned weights whose gradient has always been 0.
# Version: pytorch_optimizer 4.1.0 with its defaults, torch 2.14.1.
# Expected by memory: those that mix the entries of a matrix: SOAP and Shampoo the filters, and
#   gradient centralization (Ranger) the weights that read a pruned map.
# Seen: SOAP and Shampoo move neither. Gravity, whose velocity is random at first, Yogi, whose
#   averages start at 1e-6, and Kron, which adds noise, bring pruned filters back. Ranger, Ranger21
#   and ROSE, which centralize, and Nero, which balances filters, move the weights that read a
#   pruned map. Count masks, not zeros, or mask after each step.
# Run: PYTHON=python bash findings/optimizers.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" pytorch_optimizer==4.1.0
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import torch
from pytorch_optimizer import load_optimizer
from torch import nn

x, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 4

def moved(name, **options):
    """Whether 5 steps move pruned filters, and the weights of the next layer that read them."""
    torch.manual_seed(0)
    first, second, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
    with torch.no_grad():
        first.weight[:3] = first.bias[:3] = second.weight[:, :3] = 0
    mask = (torch.arange(8) >= 3).float()[:, None, None]
    optimizer = load_optimizer(name)(nn.ModuleList([first, second, last]).parameters(), lr=0.01,
                                     **options)
    for _ in range(5):
        optimizer.zero_grad()
        maps = second((first(x) * mask).relu()).relu().mean((2, 3))
        nn.functional.cross_entropy(last(maps), y).backward()
        assert not first.weight.grad[:3].any() and not first.bias.grad[:3].any()
        assert not second.weight.grad[:, :3].any()
        optimizer.step()
    return bool(first.weight[:3].any()), bool(second.weight[:, :3].any())

expected = {
    (False, False): ["adamw", "adabelief", "adan", "lamb", "lion", "radam", "shampoo", "soap"],
    (True, True): ["gravity", "kron", "yogi"], (False, True): ["nero", "ranger", "rose"]}
for result, names in expected.items():
    for name in names:
        print(name, "filters, weights that read them:", moved(name))
        assert moved(name) == result
assert moved("ranger21", num_iterations=5) == (False, True)
END
