"""Flatness (E): Hessian, gradient covariance, Fisher information, loss along directions.

The functions take a torch module in eval mode whose output is logits, images x and int64 labels y.
H is the Hessian of the mean cross-entropy (nats) over all n parameters. Vectors are flat, (n,), in
the order of model.parameters(). The adaptive form of a measure is of D H D, D = diag(|w|)
(docs/flatness.md). ValueErrors say what the user can change.
"""
import contextlib
import copy
import functools
import itertools
import math

import numpy as np
import scipy.optimize
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F

from .eigensolvers import PROBES, eigenpairs, random_signs, remove_span, spectral_density
from .hessian import HessianOperator, flat, logits_of, weight_scale

LINE = [round(0.01 * i, 2) for i in range(-40, 41)]  # ε of Figure E.4
RISE, DIRECTIONS = 0.1, 10  # of the loss (E.3); eigenvectors along which it is taken
FARTHEST = 10.0  # the largest |ε| tried: a third or more of a trained network's weight vector
STEPS = 30  # of Lanczos for the spectral density
TRACE_SAMPLES = 30


def squared_gradients(model, x, directions, memory_gb):
    """Returns the mean over images of the summed squares (n,) of the rows of directions(i, p) @ J.

    J (classes, n) is the Jacobian of the logits of image i, p are its probabilities.
    """
    params = list(model.parameters())
    totals = [torch.zeros_like(p) for p in params]
    size = max(1, int(memory_gb * 2**28 / sum(p.nbytes for p in params)))
    for i, image in enumerate(x.split(1)):
        logits = logits_of(model, image)
        for part in directions(i, logits.detach()[0].softmax(0)).split(size):
            products = torch.autograd.grad(logits, params, part[:, None], retain_graph=True,
                                           is_grads_batched=True, materialize_grads=True)
            for total, rows in zip(totals, products):
                for row in rows:  # faster than a sum of their squares
                    total.addcmul_(row, row)
    return flat(totals) / len(x)


def covariance_diagonal(model, x, y, memory_gb=4):
    """Returns the diagonal (n,) of C, the uncentred covariance of images' gradients (E.1)."""
    return squared_gradients(
        model, x, lambda i, p: (p - F.one_hot(y[i], len(p)))[None], memory_gb)


def fisher_diagonal(model, x, memory_gb=4):
    """Returns the diagonal (n,) of F, the Fisher information under the model's own labels (E.3)."""
    return squared_gradients(
        model, x, lambda i, p: p.sqrt()[:, None] * (p - torch.eye(len(p)).to(p)), memory_gb)


def linear_in_each_weight(model, x):
    """Tells whether logits are linear in each single weight, so that diag(H) = diag(F), by one
    weight of every layer and two images with their least likely labels."""
    x, y, end = x[:2], logits_of(model, x[:2]).argmin(1), 0
    operator, generator = HessianOperator(model, x, y), torch.Generator().manual_seed(0)
    fisher, squares = fisher_diagonal(model, x), covariance_diagonal(model, x, y)
    for _, layer in itertools.groupby(model.named_parameters(), lambda p: p[0].rpartition(".")[0]):
        start, end = end, end + sum(p.numel() for _, p in layer)
        shares = squares[start:end].cumsum(0)  # draws in proportion to them, so no dead weight
        drawn = torch.rand(1, generator=generator).to(shares) * shares[-1]
        i = min(start + int(torch.searchsorted(shares, drawn)), end - 1)
        unit = torch.zeros_like(fisher)
        unit[i] = 1
        if abs(operator.matvec(unit)[i] - fisher[i]) > 1e-3 * fisher[i] + 1e-5 * squares[i]:
            return False
    return True


def hessian_diagonal(model, x, memory_gb=4):
    """Returns diag(H) (n,) of a network with logits linear in each single weight."""
    if not linear_in_each_weight(model, x):
        raise ValueError("the diagonal is known only where logits are linear in each single "
                         "weight: use ReLU in place of smooth activations")
    return fisher_diagonal(model, x, memory_gb)


def estimate_trace(operator, pairs, samples=TRACE_SAMPLES, seed=0):
    """Estimates the trace of a HessianOperator: Hutch++ (Meyer et al. 2021) with its Eigenpairs in
    the place of a random sketch. Returns the estimate and its standard error."""
    signs = random_signs(operator, torch.Generator().manual_seed(seed), samples)
    basis = torch.linalg.qr(pairs.vectors.T)[0].T
    remove_span(signs, [basis])
    exact, found = ([float(v @ operator.matvec(v)) for v in rows] for rows in (basis, signs))
    return sum(exact) + np.mean(found), scipy.stats.sem(found)


def loss_along(model, x, y, direction, batch_size=128):
    """Returns the function ε → mean loss at w + ε direction."""
    params = dict(model.named_parameters())
    pieces = [torch.empty_like(p).copy_(piece.view_as(p))  # in the parameter's memory format
              for piece, p in zip(direction.split([p.numel() for p in params.values()]),
                                  params.values())]

    @functools.cache
    @torch.no_grad()
    def loss(epsilon):
        moved = {k: torch.add(p, piece, alpha=epsilon)
                 for (k, p), piece in zip(params.items(), pieces)}
        logits = torch.cat([torch.func.functional_call(model, moved, (images,))
                            for images in x.split(batch_size)])
        return float(F.cross_entropy(logits, y))
    return loss


def first_rise(loss, rise=RISE, step=0.01, tolerance=1e-6):
    """Returns the smallest |ε| where loss(ε) exceeds loss(0) by `rise`, or None (E.3).

    The loss need not be monotone, so both sides are searched outward together in steps of `step`,
    later of ε / 20, up to FARTHEST; then Brent's method finds ε to `tolerance`.
    """
    def excess(epsilon):  # bounded, because Brent's method cannot interpolate infinities
        return float(np.clip(np.nan_to_num(loss(epsilon) - loss(0.0), nan=np.inf) - rise, -9, 9))
    inner = 0.0
    while inner < FARTHEST:
        outer = min(FARTHEST, round(inner + max(step, inner / 20), 10))
        crossed = [abs(scipy.optimize.brentq(excess, side * inner, side * outer, xtol=tolerance))
                   for side in (1, -1) if excess(side * outer) > 0]
        if crossed:
            return min(crossed)
        inner = outer
    return None


def measure(model, x, y, num_eigs=100, eigensolver="lanczos", seed=0, memory_gb=4, on_product=None,
            stage=contextlib.nullcontext, line_loss=None):
    """Returns every measure of a network as a dict for JSON; docs/flatness.md explains the fields.

    stage(name) is a context manager that is entered around each part of the work. line_loss
    (direction) may be given in place of `loss_along(model, x, y, direction)`.
    """
    line_loss = line_loss or functools.partial(loss_along, model, x, y)
    operator, result = HessianOperator(model, x, y, None, memory_gb, on_product), {}
    with stage("traces"):
        linear = linear_in_each_weight(model, x)
        diagonals = (covariance_diagonal(model, x, y, memory_gb),
                     fisher_diagonal(model, x, memory_gb))
    for form, scale in (("", 1), ("adaptive ", weight_scale(model))):
        operator.scale = scale if form else None
        with stage(f"{form}eigenpairs"):  # those of H give the spectral density too
            pairs = eigenpairs(operator, num_eigs, eigensolver, seed=seed,
                               block=1 if form else PROBES, steps=0 if form else STEPS)
        tr_c, tr_f = (float((d * scale ** 2).sum(dtype=torch.float64)) for d in diagonals)
        with stage(f"{form}trace"):
            trace, error = (tr_f, 0.0) if linear else estimate_trace(operator, pairs, seed=seed)
        with stage(f"{form}line"):
            losses = [line_loss(v * scale) for v in pairs.vectors[:DIRECTIONS]]
            # the grid's step, or a quarter of where a parabola of this curvature rises by RISE
            steps = [min(0.5, math.sqrt(RISE / 8 / max(abs(a), 1e-9))) if form else 0.01
                     for a in pairs.values]
            epsilon = [first_rise(loss, RISE, step) for loss, step in zip(losses, steps)]
            if not form:
                result["line"] = {"epsilon": LINE, "loss": [list(map(f, LINE)) for f in losses]}
                quadrature = pairs.quadrature or eigenpairs(operator, 0, steps=STEPS).quadrature
                result["density"] = spectral_density(quadrature)
        trace_eigs = float(pairs.values.sum())
        ratios = {"tic": trace_eigs, "tic_trace": trace, "c_over_f": tr_f}
        fields = {"eigenvalues": pairs.values.tolist(), "residuals": pairs.residuals.tolist(),
                  "converged": pairs.converged.tolist(), "eig_products": pairs.products,
                  "trace_eigs": trace_eigs, "trace": float(trace), "trace_se": float(error),
                  "trace_exact": linear, "tr_c": tr_c, "tr_f": tr_f, "tr_f_se": 0.0,
                  **{name: tr_c / by if by else None for name, by in ratios.items()},
                  "epsilon": epsilon, "epsilon_min": min(filter(None, epsilon), default=None)}
        result |= {"adaptive": fields} if form else fields
    return result | {"products": operator.products}


def rescaled(model, x, a):
    """Returns a copy that computes the same function, with each convolution that batch norm follows
    multiplied by a. Raises ValueError if the logits of an image change."""
    twin, pairs = copy.deepcopy(model), 0
    for conv, norm in itertools.pairwise(twin.modules()):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            for tensor in (*conv.parameters(), norm.running_mean):
                tensor.data *= a
            norm.running_var *= a * a
            norm.eps *= a * a
            pairs += 1
    before, after = logits_of(model, x[:1]), logits_of(twin, x[:1])
    if not pairs or (before - after).abs().max() > 1e-3 * before.abs().max():
        raise ValueError("the rescaling control needs convolutions that batch norm follows")
    return twin


def rescaling_control(model, x, y, num_eigs=5, images=32, **options):
    """Returns {"1": ..., "0.5": ..., "2": ...}: `measure` of the network rescaled by each factor,
    on the first images."""
    return {f"{a:g}": measure(rescaled(model, x, a), x[:images], y[:images], num_eigs, **options)
            for a in (1, 0.5, 2)}
