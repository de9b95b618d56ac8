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
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F

EIGEN_TOLERANCE = 1e-3  # a pair has converged if its residual is at most this times |λ_1|
POWER_STEPS, POWER_TOLERANCE = 100, 1e-4  # E.2
LINE = [round(0.01 * i, 2) for i in range(-40, 41)]  # ε of Figure E.4
RISE, DIRECTIONS = 0.1, 10  # of the loss (E.3); eigenvectors along which it is taken
FARTHEST = 10.0  # the largest |ε| tried: a third or more of a trained network's weight vector
PROBES, STEPS, WIDTH, GRID = 3, 30, 0.01, 256  # of the spectral density
TRACE_SAMPLES = 30


class Eigenpairs(NamedTuple):
    values: np.ndarray  # (k,), of largest magnitude, ordered by it
    vectors: torch.Tensor  # (k, n)
    residuals: np.ndarray  # (k,) ||Hv - λv||
    converged: np.ndarray  # (k,) bool
    products: int  # Hessian-vector products of the search
    quadrature: tuple | None  # of block_lanczos


def flat(tensors):
    """Concatenates tensors into a vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def weight_scale(model):
    """Returns |w| (n,), the scale of the adaptive forms."""
    return flat(p.detach().abs() for p in model.parameters())


class AffineBatchNorm(torch.overrides.TorchFunctionMode):
    """Computes batch norm as a scale and a shift, which makes Hessian-vector products a quarter
    faster; raises ValueError for functions in training mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("training"):
            raise ValueError(f"{function.__name__} is in training mode: call model.eval()")
        if function is not F.batch_norm or args[1] is None:
            return function(*args, **kwargs)
        (x, mean, var), weight, bias = args, kwargs["weight"], kwargs["bias"]
        scale = (var + kwargs["eps"]).rsqrt() * (1 if weight is None else weight)
        shift = (0 if bias is None else bias) - mean * scale
        shape = -1, *[1] * (x.ndim - 2)
        return x * scale.view(shape) + shift.view(shape)


def logits_of(model, x):
    """Returns the logits of a network; raises ValueError if it is not ready to be measured."""
    # a forward pass in training mode would change batch norm's counters
    if any(m.training for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)):
        raise ValueError("the network is in training mode: call model.eval()")
    if not all(p.requires_grad for p in model.parameters()):
        raise ValueError("some parameters are frozen: call model.requires_grad_(True)")
    with AffineBatchNorm():
        return model(x)


def loss_gradient(model, x, y, divisor):
    """Returns the gradient (n,), with its graph, of the summed loss over `divisor`."""
    loss = F.cross_entropy(logits_of(model, x), y, reduction="sum") / divisor
    return flat(torch.autograd.grad(loss, list(model.parameters()), create_graph=True,
                                    materialize_grads=True))


def images_that_fit(model, x, y, memory_gb):
    """Returns for how many images the gradient's graph takes half of memory_gb."""
    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()
    sizes = []
    for images in (1, 2):
        held = {}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss_gradient(model, x[:images], y[:images], images)
        sizes.append(sum(held.values()))
    return max(1, int(memory_gb * 2**29 / max(1, sizes[1] - sizes[0])))


def check_second_derivatives(model, x):
    """Raises ValueError unless the product of a small step with the Hessian is the change of the
    gradient, for one image, in float64, where the two agree to 1e-7."""
    twin, x = copy.deepcopy(model).double(), x[:1].double()
    params, y = list(twin.parameters()), logits_of(twin, x).argmin(1)  # so that the loss is not 0
    step = torch.randn(len(flat(params)), generator=torch.Generator().manual_seed(0))
    step = 1e-8 * weight_scale(twin) * step.to(x)
    try:
        before = loss_gradient(twin, x, y, 1)
        product = flat(torch.autograd.grad(before, params, step, materialize_grads=True))
        nn.utils.vector_to_parameters(flat(params).detach() + step, params)
        change = loss_gradient(twin, x, y, 1).detach() - before.detach()
        wrong = (product - change).norm() > 1e-3 * change.norm() + 1e-12 * before.norm()
    except RuntimeError:
        wrong = True
    if wrong:
        raise ValueError("a layer of this network has no second derivative, or a wrong one: use a "
                         "plain PyTorch implementation of that layer")


class HessianOperator:
    """Products with the Hessian H of the mean loss, or with D H D, D = diag(scale).

    The gradient's graph is kept if it fits memory_gb, else built anew in each product, for one part
    of the images after another. `scale` may be replaced; on_product() is called after each product.
    """

    def __init__(self, model, x, y, scale=None, memory_gb=4, on_product=None):
        self.model, self.scale, self.on_product, self.products = model, scale, on_product, 0
        self.params, self.num_images = list(model.parameters()), len(x)
        self.shape = (sum(p.numel() for p in self.params),) * 2
        size = images_that_fit(model, x, y, memory_gb)
        check_second_derivatives(model, x)
        self.parts = list(zip(x.split(size), y.split(size)))
        self.graph = loss_gradient(model, x, y, len(x)) if size >= len(x) else None

    def matvec(self, v):
        """Returns the product with v (n,)."""
        v = v if self.scale is None else self.scale * v
        result, keep = torch.zeros_like(v), self.graph is not None
        for x, y in self.parts:
            gradient = self.graph if keep else loss_gradient(self.model, x, y, self.num_images)
            result += flat(torch.autograd.grad(gradient, self.params, v, keep,
                                               materialize_grads=True))
        self.products += 1
        if self.on_product:
            self.on_product()
        return result if self.scale is None else self.scale * result

    def random_signs(self, generator, m):
        """Returns random signs (m, n), the same on every device."""
        signs = 2 * torch.randint(0, 2, (m, self.shape[0]), generator=generator) - 1
        return signs.to(self.params[0])


def inner_products(a, b):
    """Returns a @ b.T for rows (m, n), summed in pieces: one float32 sum has errors of 1e-5."""
    pieces = a.shape[1] // 4096
    first, second = (rows[:, :pieces * 4096].reshape(len(rows), pieces, 4096).transpose(0, 1)
                     for rows in (a, b))
    return torch.bmm(first, second.mT).sum(0) + a[:, pieces * 4096:] @ b[:, pieces * 4096:].T


def remove_span(w, basis):
    """Makes the rows of w (b, n) orthogonal to blocks of orthonormal rows, in place; returns the
    components (b, m) that were removed."""
    removed = []
    for rows in basis:
        removed.append(inner_products(w, rows))
        w.addmm_(removed[-1], rows, alpha=-1)
    return torch.cat(removed, 1).double().cpu().numpy()


def orthonormal(w):
    """Returns orthonormal rows that span those of w (b, n), and the norms (b,) of the rows of w
    without what those before them span."""
    q, r = torch.linalg.qr(w.T.double())
    return q.T.to(w), r.diagonal().abs()


def block_lanczos(operator, k, generator, tolerance, block, steps):
    """Finds the k eigenpairs of largest magnitude by the block Lanczos method.

    It starts from `block` vectors of random signs, so it sees as many copies of a multiple
    eigenvalue, and ends after at least `steps` steps, when k pairs have converged or 6 k + 100
    products are done. It keeps one vector for each product, on the parameters' device.

    Returns:
        values (k,), vectors (k, n), residuals (k,), and a quadrature: nodes (m,) and weights
        (block, m); weights[i] @ f(nodes) approximates z'f(H)z / n for the i-th starting vector z.
    """
    n, m, basis, projected = operator.shape[0], 0, [], np.zeros((0, 0))
    k = min(k, n)
    start = operator.random_signs(generator, min(block, n))
    q, _ = orthonormal(start)
    start = inner_products(start, q).double().cpu().numpy()
    while True:
        images = torch.stack([operator.matvec(v) for v in q])
        basis.append(q)
        rows = remove_span(images, basis[-2:])  # H q has no part in earlier blocks
        projected = np.pad(projected, (0, len(q)))  # H between the vectors of the basis
        near = len(projected) - rows.shape[1]
        projected[m:, near:], projected[near:, m:] = rows, rows.T
        old, m = m, m + len(q)
        outside = inner_products(images, images).double().cpu().numpy()
        rounding = 100 * torch.finfo(q.dtype).eps * np.abs(projected).max()
        images = images[:n - m]
        lost = orthonormal(images)[1] <= rounding
        if lost.any():  # random rows replace those that depend on others
            images[lost] = operator.random_signs(generator, len(images))[lost]
        q, _ = orthonormal(images)
        remove_span(q, basis)  # rounding left a part in all blocks
        q, _ = orthonormal(q)
        if m < k:
            continue
        values, vectors = np.linalg.eigh(projected)
        leading, last = np.argsort(-np.abs(values), kind="stable")[:k], vectors[old:]
        residuals = np.sqrt(((outside @ last) * last).sum(0).clip(0))[leading] * (m < n)
        done = (residuals <= tolerance * np.abs(values).max()).all() or m >= 6 * k + 100
        if m == n or done and m >= block * steps:
            turn = torch.from_numpy(vectors[:, leading].T).to(q)
            ritz = q.new_empty(k, n)  # filled by columns, without a second copy of the basis
            for *part, columns in zip(*(rows.split(2 ** 16, 1) for rows in (*basis, ritz))):
                columns.copy_(turn @ torch.cat(part))
            quadrature = values, (start @ vectors[:len(start)]) ** 2 / n
            return values[leading], ritz, residuals, quadrature


def power_method(operator, k, generator):
    """Finds k eigenpairs by the power method with deflation, as pytorch-hessian-eigenthings (E.2);
    returns values (k,), vectors (k, n) and residuals (k,)."""
    n, like = operator.shape[0], operator.params[0]
    values, vectors = np.zeros(0), like.new_empty(0, n)
    for _ in range(min(k, n)):
        w, value = torch.randn(n, generator=generator).to(like), 0.0
        for _ in range(POWER_STEPS):
            v, old = w / w.norm(), value
            w = operator.matvec(v)
            w -= vectors.T @ (torch.from_numpy(values).to(like) * (vectors @ v))
            value = float(v @ w)
            if abs(value - old) < POWER_TOLERANCE * abs(value) or not w.any():
                break
        values, vectors = np.append(values, value), torch.cat([vectors, v[None]])
    order = np.argsort(-np.abs(values), kind="stable")
    values, vectors = values[order], vectors[torch.from_numpy(order)]
    residuals = [float((operator.matvec(v) - a * v).norm()) for a, v in zip(values, vectors)]
    return values, vectors, np.array(residuals)


def eigenpairs(operator, k=100, eigensolver="lanczos", tolerance=EIGEN_TOLERANCE, seed=0,
               block=PROBES, steps=0):
    """Returns the min(k, n) Eigenpairs of largest magnitude, by "lanczos", see `block_lanczos`, or
    by "power", the paper's method (E.2)."""
    generator, before = torch.Generator().manual_seed(seed), operator.products
    if eigensolver == "power":
        found, quadrature = power_method(operator, k, generator), None
    else:
        *found, quadrature = block_lanczos(operator, k, generator, tolerance, block, steps)
    converged = found[2] <= tolerance * np.abs(found[0]).max(initial=0)
    return Eigenpairs(*found, converged, operator.products - before, quadrature)


def spectral_density(quadrature, width=WIDTH):
    """Returns the density of all eigenvalues of H by stochastic Lanczos quadrature, for JSON.

    The smoothing Gaussian has a deviation of `width` times the distance of the outermost nodes; the
    field width is in units of λ, se the standard error over the probes.
    """
    nodes, weights = quadrature
    sigma = width * float(nodes[-1] - nodes[0]) or 1.0
    grid = np.linspace(nodes[0] - 5 * sigma, nodes[-1] + 5 * sigma, GRID)
    each = weights @ scipy.stats.norm.pdf(grid, nodes[:, None], sigma)
    return {"probes": len(each), "steps": len(nodes) // len(each), "width": sigma,
            "grid": grid.tolist(), "density": each.mean(0).tolist(),
            "se": scipy.stats.sem(each).tolist()}


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
    signs = operator.random_signs(torch.Generator().manual_seed(seed), samples)
    basis = torch.linalg.qr(pairs.vectors.T)[0].T
    remove_span(signs, [basis])
    exact, found = ([float(v @ operator.matvec(v)) for v in rows] for rows in (basis, signs))
    return sum(exact) + np.mean(found), scipy.stats.sem(found)


def line_loss(model, x, y, direction, batch_size=128):
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
            stage=contextlib.nullcontext, evaluate=None):
    """Returns every measure of a network as a dict for JSON; docs/flatness.md explains the fields.

    stage(name) is a context manager that is entered around each part of the work. `evaluate` is a
    network of the same parameters and outputs that is faster; it needs no derivatives.
    """
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
            losses = [line_loss(evaluate or model, x, y, v * scale)
                      for v in pairs.vectors[:DIRECTIONS]]
            # the grid's step, or a quarter of where a parabola of this curvature has risen so far
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


SETTINGS = "version", "images", "eig", "epoch", "eigs"  # equal in measurements that are pooled
PAIRS_USED = {"trace_eigs": math.inf, "tic": math.inf, "epsilon_min": DIRECTIONS, "top": 1}


def measure_of(flat, name):
    """Returns a measure of flatness.json's dict, or None: "top" is the leading eigenvalue,
    "adaptive_..." the adaptive form."""
    if name.startswith("adaptive_"):
        return measure_of(flat.get("adaptive", {}), name.removeprefix("adaptive_"))
    return next(iter(flat.get("eigenvalues", ())), None) if name == "top" else flat.get(name)


def num_pairs_asked(flat):
    """Returns how many of the existing eigenpairs were asked for."""
    return min(flat.get("eigs", len(flat["converged"])), flat.get("parameters", math.inf))


def share_converged(flat, name):
    """Returns the share of converged pairs among the eigenpairs asked for that a measure is made
    of, 1 if it is made of none."""
    kind = name.removeprefix("adaptive_")
    if kind not in PAIRS_USED:
        return 1.0
    used = min(num_pairs_asked(flat), PAIRS_USED[kind])
    return sum(measure_of(flat, name.replace(kind, "converged"))[:used]) / max(1, used)


def moved_by_rescaling(flat, *names):
    """Returns the largest relative change of these measures in the rescaling control, or None."""
    control = flat.get("control", {})
    changes = [abs(value / own - 1) for name in names for a in control
               for own, value in [(measure_of(control["1"], name), measure_of(control[a], name))]
               if own and value is not None]
    return max(changes, default=None)


def describe(found, asked):
    """Describes the dicts of several networks, of each of which `asked` pairs are wanted."""
    first, k = found[0], min(len(flat["eigenvalues"]) for flat in found)
    share = sum(sum(flat["converged"]) for flat in found) / max(1, sum(map(num_pairs_asked, found)))
    method = " by the power method" * (first.get("eig") == "power")
    return (f"{k} eigenpairs{method}" + f" ({asked} asked)" * (asked != k) + f", {100 * share:.3g}%"
            f" converged, on {first['images']} {first.get('split', 'test')} images")
