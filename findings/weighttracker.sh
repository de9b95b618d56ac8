#!/usr/bin/env bash
# Which pruned filters torch-weighttracker sees in a network whose masks are zeros.
# Version: torch-weighttracker 0.4.0, torch 2.14.1.
# Expected by memory: a filter is gone if its own weights, bias and batch norm are 0, so that two of
#   six count for a third of the work.
# Seen: what reads its map must be 0, too. Until then no unit is zero, the compression in bit
#   operations is 0, and prune_zero_units removes nothing, without a word, although the map is 0.
# Run: PYTHON=python bash findings/weighttracker.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    torch-weighttracker==0.4.0 fvcore==0.1.5.post20221221 iopath==0.1.10 yacs==0.1.8 \
    portalocker==4.4.2 tabulate==0.10.0 termcolor==3.3.0 pyyaml==6.0.4
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import torch
from torch import nn
from torch_weighttracker import WeightTracker

x = torch.randn(2, 3, 8, 8)
for readers_too in (False, True):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(5, 4)).eval()
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight[:2] = layer.bias[:2] = 0
        if readers_too:
            model[3].weight[:, :2] = 0
    assert not model[:3](x)[:, :2].any()
    tracker = WeightTracker(model, example_inputs=x)
    units = tracker.view_zero_units().total_zero_units
    tracker.create_tracker("structured_bops")
    compression = tracker.track()["structured_bops"]["compression"]
    tracker.prune_zero_units()
    print("readers are 0:", readers_too, "zero units", units, "compression", compression,
          "filters after pruning", model[0].weight.shape[0])
    assert (units, model[0].weight.shape[0]) == ((2, 4) if readers_too else (0, 6))
    assert abs(compression - (readers_too and 1 / 3)) < 0.01
END
