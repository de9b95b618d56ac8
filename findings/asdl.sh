#!/usr/bin/env bash
# The Fisher information by ASDL, which laplace-torch uses, of a network with pruned filters.
# Versions: asdfghjkl 0.1a4 (the ASDL that laplace-torch 0.3 asks for; 0.1a5 does the same),
#   laplace-torch 0.3, torch 2.14.1.
# Expected by memory: the exact diagonal is 0 at a pruned filter; with n_mc_samples = n the sampled
#   diagonal estimates the exact one, the better the larger n is.
# Seen: what batch norm has normalised is computed back from its output, (output - shift) / scale.
#   At a filter whose scale is 0, as pruned ones have it, this is NaN, and so are the trace and
#   laplace-torch's H by AsdlGGN and AsdlEF. CurvlinopsGGN, the default, and BackPackGGN are right.
#   The sampled diagonal is 1/n of the exact one: each of n gradients is divided by n, and then
#   their squares are added.
# Run: PYTHON=python bash findings/asdl.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    asdfghjkl==0.1a4 laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 \
    einops==0.8.2 einconv==0.1.0 unfoldNd==0.2.3 opt_einsum==3.4.0 torchmetrics==1.9.0 \
    lightning-utilities==0.15.3
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import asdl, laplace, torch
import torch.nn.functional as F
from laplace import curvature
from torch import nn

torch.manual_seed(0)
x, y = torch.randn(20, 3, 8, 8), torch.arange(20) % 4

def network(gone):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight[:gone] = layer.bias[:gone] = 0
    return model

def exact_diagonal(model):
    total = 0
    for logits in F.log_softmax(model(x), 1):
        for log_p in logits:
            gradient = torch.autograd.grad(log_p, [*model.parameters()], retain_graph=True)
            total += log_p.exp().detach() * torch.cat([g.flatten() for g in gradient]).square()
    return total / len(x)

def asdl_diagonal(model, kind, n=1):
    maker = asdl.get_fisher_maker(model, asdl.FisherConfig(
        fisher_type=kind, fisher_shapes=["diag"], loss_type="cross_entropy", data_size=len(x),
        n_mc_samples=n))
    maker.setup_loss_call(F.cross_entropy, maker.setup_model_call(model, x), y)
    maker.forward_and_backward()
    parts = [getattr(model[i].fisher.diag, name) for i in (0, 1, 5) for name in ("weight", "bias")]
    return torch.cat([part.flatten() for part in parts])

right, found = exact_diagonal(network(0)), asdl_diagonal(network(0), "fisher_exact")
assert torch.allclose(found, right, rtol=1e-3, atol=1e-7)
for n in (1, 10, 400):
    ratio = (asdl_diagonal(network(0), "fisher_mc", n).sum() / right.sum()).item()
    print(f"trace of the sampled diagonal over the exact one, n = {n}: {ratio:.5f}")
assert 0.9 < 400 * ratio < 1.1

right, found = exact_diagonal(network(2)), asdl_diagonal(network(2), "fisher_exact")
scale = slice(6 * 27 + 6, 6 * 27 + 12)
print("batch norm's scale", found[scale], "exact", right[scale])
assert found.isnan().nonzero().flatten().tolist() == [scale.start, scale.start + 1]
for backend, wrong in (("AsdlGGN", True), ("AsdlEF", True), ("CurvlinopsGGN", False),
                       ("BackPackGGN", False)):
    approximation = laplace.Laplace(network(2), "classification", subset_of_weights="all",
                                    hessian_structure="diag", backend=getattr(curvature, backend))
    approximation.fit(torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=20))
    trace = approximation.H.sum() / len(x)
    print(backend, trace.item(), "exact", right.sum().item())
    assert trace.isnan() if wrong else torch.allclose(trace, right.sum(), rtol=1e-3)
END
