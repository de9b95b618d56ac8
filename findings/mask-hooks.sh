#!/usr/bin/env bash
# What curvature tools make of a layer that torch.nn.utils.prune masks.
# Versions: nngeometry 0.4, backpack-for-pytorch 1.7.1, curvlinops-for-pytorch 3.0.1, torch 2.14.1.
# Expected by memory: they take the derivative by weight_orig, which is 0 at masked weights, or
#   refuse the layer.
# Seen: curvlinops' GGN takes weight_orig. Its KFAC knows a layer's "weight" by that name alone:
#   with any mask, one that keeps everything included, the covariance of the layer's inputs is left
#   out, as if it were the identity. nngeometry's diagonal is by `weight`, masked weights included.
#   backpack leaves weight_orig without a quantity: a sum over the parameters that have one is that
#   of the biases alone. None of them says anything. After prune.remove they are as usual.
# Run: PYTHON=python bash findings/mask-hooks.sh   (a Python with requirements.txt)
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
"${PYTHON:-python3}" -m pip install --quiet --no-deps --target "$site" \
    nngeometry==0.4 backpack-for-pytorch==1.7.1 curvlinops-for-pytorch==3.0.1 einops==0.8.2 \
    einconv==0.1.0 unfoldNd==0.2.3
PYTHONPATH=$site "${PYTHON:-python3}" -W ignore - <<'END'
import backpack, curvlinops, torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatDiag
from torch import nn
from torch.nn.utils import prune

torch.manual_seed(0)
x, y = 3 * torch.randn(1, 6), torch.tensor([1])  # of one image KFAC is exact
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y))

def network(p):  # p: the fraction of its weights that is masked, or None for no mask
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    if p is not None:
        prune.l1_unstructured(model[0], "weight", p)
    model(x)
    return model

def by_hand(p):  # softmax regression: the mean over images of Tr(diag(p) - pp') |x|^2
    probabilities = network(p)(x).softmax(1)
    spread = 1 - probabilities.square().sum(1)
    mask = torch.ones(3, 6) if p is None else network(p)[0].weight_mask
    variance = probabilities * (1 - probabilities)
    masked = torch.einsum("nc,cd,nd->n", variance, mask, x.square())
    return [(spread * x.square().sum(1)).mean().item(), masked.mean().item(), spread.mean().item()]

def curvlinops_trace(p, kind, **options):
    model = network(p)
    operator = getattr(curvlinops, kind)(model, nn.CrossEntropyLoss(), [*model.parameters()],
                                         [(x, y)], **options)
    return (operator @ torch.eye(operator.shape[1])).trace().item()

def backpack_trace(p):
    model, extension = backpack.extend(network(p)), backpack.extensions.DiagGGNExact()
    with backpack.backpack(extension):
        backpack.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    return sum(parameter.diag_ggn_exact.sum().item() for parameter in model.parameters()
               if hasattr(parameter, "diag_ggn_exact"))

def nngeometry_trace(p):
    model = network(p)
    return FIM(model=model, loader=loader, representation=PMatDiag, device="cpu",
               function=lambda *batch: model(batch[0]), variant="classif_logits").trace().item()

kfac = {"fisher_type": curvlinops.FisherType.TYPE2}
for p in (None, 0.0, 0.5):
    every, masked, bias = by_hand(p)
    found = {"GGN": curvlinops_trace(p, "GGNLinearOperator"),
             "KFAC": curvlinops_trace(p, "KFACLinearOperator", **kfac),
             "nngeometry": nngeometry_trace(p), "backpack": backpack_trace(p)}
    print("fraction masked", p, "by hand", masked + bias, found)
    expected = {"GGN": masked + bias, "KFAC": every + bias, "nngeometry": every + bias,
                "backpack": every + bias}
    if p is not None:
        expected |= {"KFAC": 6 * bias + bias, "backpack": bias}  # as if the 6 inputs were unit
    for name, value in expected.items():
        assert abs(found[name] - value) < 1e-4 * value, (name, value)
END
