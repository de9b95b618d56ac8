#!/usr/bin/env bash
# Where channels-last memory, which is how networks run fastest on a CPU, changes results.
# Versions: opacus 1.6.0, pytorch_optimizer 4.1.0, torch 2.14.1.
# Expected by memory: a memory layout changes times and last bits, and nothing else.
# Seen: opacus gives other gradients of single images for a convolution whose input is in
#   channels-last memory, without a word: Tr(C) is 2.924 instead of 2.809. A CPU optimizer with
#   fused=True reads gradients in the order of memory: where a tool puts one in plain memory beside
#   a channels-last weight, as PCGrad does, it goes to other weights. Without fused=True, and for
#   the gradients that backward() leaves, which have the weight's layout, steps are right.
# Run: PYTHON=python bash findings/channels-last.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    opacus==1.6.0 opt_einsum==3.4.0 pytorch_optimizer==4.1.0
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from pytorch_optimizer import PCGrad
from torch import nn

x = torch.randn(8, 4, 10, 10, generator=torch.Generator().manual_seed(1))
y = torch.arange(8) % 4
layouts = torch.contiguous_format, torch.channels_last

def network(layout):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 4)).to(memory_format=layout)

def trace_by_autograd(model, x):
    total = 0
    for image, label in zip(x, y):
        gradients = torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]),
                                        [*model.parameters()])
        total += sum(g.square().sum() for g in gradients)
    return float(total) / len(x)

def trace_by_opacus(model, x):
    F.cross_entropy(GradSampleModule(model, loss_reduction="sum")(x), y, reduction="sum").backward()
    return float(sum(p.grad_sample.square().sum() for p in model.parameters())) / len(x)

traces = {trace: [trace(network(layout), x.to(memory_format=layout)) for layout in layouts]
          for trace in (trace_by_autograd, trace_by_opacus)}
for trace, found in traces.items():
    print(f"{trace.__name__}: {found[0]:.3f} in plain, {found[1]:.3f} in channels-last memory")
(right, same), (plain, other) = traces.values()
assert abs(same / right - 1) < 1e-4 and abs(plain / right - 1) < 1e-4
assert abs(other / right - 1) > 0.03

def step(layout, fused, wrap=lambda optimizer: optimizer):
    model = network(layout)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1.0, fused=fused))
    losses = [F.cross_entropy(model(x), labels) for labels in (y, y.flip(0))]
    if isinstance(optimizer, PCGrad):
        optimizer.pc_backward(losses)
    else:
        sum(losses).backward()
    optimizer.step()
    return torch.cat([p.detach().contiguous().flatten() for p in model.parameters()])

for wrap in (lambda optimizer: optimizer, PCGrad):
    for fused in (False, True):
        torch.manual_seed(0)
        before = step(layouts[0], fused, wrap)
        start = torch.cat([p.detach().flatten() for p in network(layouts[0]).parameters()])
        change = (step(layouts[1], fused, wrap) - before).norm() / (before - start).norm()
        print(f"PCGrad {wrap is PCGrad}, fused {fused}: the step differs by {change:.1e} of it")
        assert (change > 0.1) == (wrap is PCGrad and fused), change
END
