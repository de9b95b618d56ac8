#!/usr/bin/env bash
# Which points of the loss surface loss-landscapes evaluates, and how it leaves the network.
# Version: loss-landscapes 3.0.6, torch 2.14.1.
# Expected by memory: random_plane spans two directions with normal entries, scaled per filter;
#   `distance` is how far it goes, the network is in the middle, and it is not changed.
# Seen: the first direction is uniform in [0, 1) before it is scaled, so that no entry is negative.
#   `distance` divides: the plane is |weights| / distance wide, so that the larger it is, the
#   flatter the surface looks. Every second row is shifted by a step along the second direction.
#   Unless deepcopy_model=True, the network is left at another corner, its parameters frozen.
# Run: PYTHON=python bash findings/loss-landscapes.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" loss-landscapes==3.0.6
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import torch
from loss_landscapes import random_plane
from torch import nn

def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def plane(steps, **options):
    """The evaluated weights less those given, (steps, steps, weights), and the network after."""
    torch.manual_seed(0)
    model, points = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).double(), []
    start = flat(model)

    def loss(wrapper):  # called in the order in which the points are visited
        points.append(flat(wrapper.modules[0]) - start)
        return len(points) - 1
    order = torch.from_numpy(random_plane(model, loss, steps=steps, **options))
    return torch.stack(points)[order], model, start

for distance in (1, 10):
    points, model, start = plane(6, distance=distance)
    first, second = (points[2, 0] - points[0, 0]) / 2, points[0, 1] - points[0, 0]
    width = (6 * first.norm() / start.norm()).item()
    print("distance", distance, "width / |weights|", width, "negative", (first < 0).sum().item())
    assert abs(width - 1 / distance) < 1e-6 and (first >= 0).all()
    places = torch.linalg.lstsq(torch.stack([first, second], 1), points.flatten(0, 1).T).solution
    rows, columns = places.round().long().reshape(2, 6, 6)
    print(columns.tolist())
    assert torch.equal(rows, torch.arange(-3, 3).unsqueeze(1).expand(6, 6))
    assert torch.equal(columns[::2], torch.arange(-2, 4).expand(3, 6))
    assert torch.equal(columns[1::2], torch.arange(-3, 3).expand(3, 6))
    moved = flat(model) - start
    print("moved by", (moved.norm() / start.norm()).item())
    assert torch.allclose(moved, 3 * first - 3 * second)
    assert not any(p.requires_grad for p in model.parameters())
points, model, start = plane(6, deepcopy_model=True)
assert torch.equal(flat(model), start) and all(p.requires_grad for p in model.parameters())
END
