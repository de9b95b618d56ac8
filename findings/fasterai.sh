#!/usr/bin/env bash
# How many filters fasterai leaves.
# Version: fasterai 0.4.1 with Torch-Pruning 1.6.1 and fastai 2.8.12, torch 2.14.1.
# Expected by memory: int(n p) filters become zero with Sparsifier; Pruner is Torch-Pruning's.
# Seen: Sparsifier keeps every filter whose score is at least the int(n p)-th smallest, so one
#   filter fewer goes: 8, 46, 360 of 10, 64, 512 stay for p = 0.3, and 2 of 10 for 0.9. The score is
#   the mean |weight| of a filter. Pruner leaves 7, 44, 358, and like Torch-Pruning 10 of 10 for
#   0.9. Without its callback the masks are not applied again, and training brings the filters back.
# Run: PYTHON=python bash findings/fasterai.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    fasterai==0.4.1 torch-pruning==1.6.1 fastai==2.8.12 fastcore==2.2.41 fastprogress==1.0.3 \
    fasttransform==0.0.5 fastdownload==0.0.8 einops==0.8.2 plum-dispatch==2.10.1 \
    beartype==0.23.1 cloudpickle==3.1.3 pandas==3.1.1 python-dateutil==4.0.0 pytz==2026.6 \
    six==1.17.0 requests==2.34.2 urllib3==2.8.0 idna==3.20 certifi==2026.10.19.post1 \
    charset-normalizer==3.5.3 pyyaml==6.0.4 rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 \
    pygments==2.21.0
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import torch
from fasterai.core.criteria import large_final
from fasterai.prune.all import Pruner
from fasterai.sparse.all import Sparsifier
from torch import nn

def network(n):
    return nn.Sequential(nn.Conv2d(3, n, 3, padding=1), nn.ReLU(), nn.Conv2d(n, 7, 3, padding=1),
                         nn.Flatten(), nn.Linear(7 * 64, 4))

def sparsified(model, p):
    Sparsifier(model, "filter", "local", large_final).sparsify_model({"0": p})
    return int(model[0].weight.flatten(1).any(1).sum())

def pruned(model, p):
    Pruner(model, p, "local", large_final, ignored_layers=[model[2], model[4]],
           example_inputs=torch.randn(1, 3, 8, 8)).prune_model()
    return model[0].out_channels
for function, expected in ((sparsified, {0.3: [8, 46, 360], 0.9: [2, 8, 53]}),
                           (pruned, {0.3: [7, 44, 358], 0.9: [10, 6, 51]})):
    found = {p: [function(network(n), p) for n in (10, 64, 512)] for p in expected}
    print(function.__name__, found)
    assert found == expected

model, x = network(10), torch.randn(2, 3, 8, 8)
assert torch.allclose(large_final(model[0], "filter").flatten(),
                      model[0].weight.flatten(1).abs().mean(1))
optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
for gone in (0, 5):  # 10 of 10 live, then 10 - 5 + 1
    if gone:
        assert sparsified(model, 0.5) == 6
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
assert model[0].weight.flatten(1).any(1).all()
END
