#!/usr/bin/env bash
# Where the tools for Hessians and single gradients differ.
# Versions: hessian-eigenthings 1.0.0a5, pyhessian 0.1, curvlinops-for-pytorch 3.0.1,
#   backpack-for-pytorch 1.7.1, torch 2.14.1.
# Expected by memory: hessian-eigenthings weights batches by their images and goes on until its
#   pairs have converged; pyhessian works; curvlinops and backpack refuse training mode.
# Seen: hessian-eigenthings takes the plain mean over batches, wrong where the last is smaller, and
#   2 k products, after which 7 of 10 pairs have not converged; `converged` of the result says so.
#   pyhessian's density calls torch.eig, which is gone; it leaves the network in eval mode.
#   curvlinops refuses batch norm in training mode, and dropout. backpack's BatchGrad only warns in
#   training mode, where BatchL2Grad raises.
# Run: PYTHON=python bash findings/hessian-tools.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    hessian-eigenthings==1.0.0a5 pyhessian==0.1 curvlinops-for-pytorch==3.0.1 \
    backpack-for-pytorch==1.7.1 einops==0.8.2 einconv==0.1.0 unfoldNd==0.2.3
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import backpack, curvlinops, hessian_eigenthings, pyhessian, torch, warnings
from backpack import extensions
from torch import nn

def error_of(function, *arguments, **options):
    try:
        return function(*arguments, **options) and None
    except Exception as error:
        return str(error)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model, loss = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
x, y = torch.randn(20, 6), torch.arange(20) % 3
def hessian(*batches):
    return hessian_eigenthings.HessianOperator(model, list(batches),
                                               hessian_eigenthings.supervised_loss(loss))
v, a, b = torch.ones(83), (x[:16], y[:16]), (x[16:], y[16:])
parts = [hessian(batch).matvec(v) for batch in (a, b)]
assert torch.allclose(hessian(a, b).matvec(v), (parts[0] + parts[1]) / 2)
assert torch.allclose(hessian((x, y)).matvec(v), (16 * parts[0] + 4 * parts[1]) / 20)
pairs = hessian_eigenthings.lanczos(hessian((x, y)), k=10, seed=0)
assert pairs.iterations == 20 and pairs.converged.sum() <= 3

theirs = pyhessian.hessian(model.train(), loss, data=(x, y), cuda=False)
assert "torch.linalg.eig" in error_of(theirs.density, iter=5, n_v=1) and not model.training
for layer, words in ((nn.BatchNorm1d(8), "in-place"), (nn.Dropout(), "deterministic")):
    net = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3)).train()
    assert words in error_of(curvlinops.HessianLinearOperator, net, loss, [*net.parameters()],
                             [(x, y)])
def single_gradients(extension):
    net = backpack.extend(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    with backpack.backpack(extension):
        backpack.extend(nn.CrossEntropyLoss())(net(x), y).backward()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    single_gradients(extensions.BatchGrad())
assert any("training mode" in str(warning.message) for warning in caught)
assert "training mode" in error_of(single_gradients, extensions.BatchL2Grad())
END
