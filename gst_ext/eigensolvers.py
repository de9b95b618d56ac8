"""Eigenpairs and spectral density of a large symmetric matrix H that is known by its products.

An operator has `shape` (n, n), `dtype`, `device`, `products`, the number of products so far, and
matvec(v), the product with a vector (n,), as gst_ext.hessian.HessianOperator does.
"""
from typing import NamedTuple

import numpy as np
import scipy.stats
import torch

TOLERANCE = 1e-3  # a pair has converged if its residual is at most this times |λ_1|
POWER_STEPS, POWER_TOLERANCE = 100, 1e-4  # E.2
PROBES, WIDTH, GRID = 3, 0.01, 256  # of the spectral density


class Eigenpairs(NamedTuple):
    values: np.ndarray  # (k,), of largest magnitude, ordered by it
    vectors: torch.Tensor  # (k, n)
    residuals: np.ndarray  # (k,) ||Hv - λv||
    converged: np.ndarray  # (k,) bool
    products: int  # products with H that the search took
    quadrature: tuple | None  # of block_lanczos


def random_signs(operator, generator, m):
    """Returns random signs (m, n), the same on every device."""
    signs = 2 * torch.randint(0, 2, (m, operator.shape[0]), generator=generator) - 1
    return signs.to(operator.device, operator.dtype)


def inner_products(a, b):
    """Returns a @ b.T for rows (m, n), summed in pieces: one float32 sum has errors of 1e-5."""
    pieces = a.shape[1] // 4096
    first, second = (rows[:, :pieces * 4096].reshape(len(rows), pieces, 4096).transpose(0, 1)
                     for rows in (a, b))
    return torch.bmm(first, second.mT).sum(0) + a[:, pieces * 4096:] @ b[:, pieces * 4096:].T


def remove_span(rows, basis):
    """Makes rows (b, n) orthogonal to blocks of orthonormal rows, in place; returns the components
    (b, m) that were removed."""
    removed = []
    for block in basis:
        removed.append(inner_products(rows, block))
        rows.addmm_(removed[-1], block, alpha=-1)
    return torch.cat(removed, 1).double().cpu().numpy()


def orthonormal(rows):
    """Returns orthonormal rows that span those given (b, n), and the norms (b,) of the given rows
    without what those before them span."""
    q, r = torch.linalg.qr(rows.T.double())
    return q.T.to(rows), r.diagonal().abs()


def block_lanczos(operator, k, generator, tolerance, block, steps):
    """Finds the k eigenpairs of largest magnitude by the block Lanczos method.

    It starts from `block` vectors of random signs, so it sees as many copies of a multiple
    eigenvalue. It ends after at least `steps` steps, when 6 k + 100 products are done or some more
    than k pairs (the largest need not converge first) have residuals up to `tolerance` |λ_1|.
    It keeps one vector for each product, on the operator's device.

    Returns:
        values (k,), vectors (k, n), residuals (k,), and a quadrature: nodes (m,) and weights
        (block, m); weights[i] @ f(nodes) approximates z'f(H)z / n for the i-th starting vector z.
    """
    n, m, basis, projected = operator.shape[0], 0, [], np.zeros((0, 0))
    k = min(k, n)
    enough = min(k + k // 10 + 2, n) if k else 0
    start = random_signs(operator, generator, min(block, n))
    q, _ = orthonormal(start)
    start = inner_products(start, q).double().cpu().numpy()
    while True:
        products = torch.stack([operator.matvec(v) for v in q])
        basis.append(q)
        rows = remove_span(products, basis[-2:])  # H q has no part in earlier blocks
        projected = np.pad(projected, (0, len(q)))  # H between the vectors of the basis
        near = len(projected) - rows.shape[1]
        projected[m:, near:], projected[near:, m:] = rows, rows.T
        old, m = m, m + len(q)
        # products are now H q outside the basis
        outside = inner_products(products, products).double().cpu().numpy()
        rounding = 100 * torch.finfo(q.dtype).eps * np.abs(projected).max()
        products = products[:n - m]
        q, lengths = orthonormal(products)
        lost = lengths <= rounding
        if lost.any():  # random rows replace those that depend on others
            products[lost] = random_signs(operator, generator, len(products))[lost]
            q, _ = orthonormal(products)
        remove_span(q, basis)  # rounding left a part in all blocks
        q, _ = orthonormal(q)
        if m < enough:
            continue
        values, vectors = np.linalg.eigh(projected)
        leading, last = np.argsort(-np.abs(values), kind="stable")[:enough], vectors[old:]
        residuals = np.sqrt(((outside @ last) * last).sum(0).clip(0))[leading] * (m < n)
        done = (residuals <= tolerance * np.abs(values).max()).all() or m >= 6 * k + 100
        if m == n or done and m >= block * steps:
            leading = leading[:k]
            turn = torch.from_numpy(vectors[:, leading].T).to(q)
            ritz = q.new_empty(k, n)  # filled by columns, without a second copy of the basis
            for *part, columns in zip(*(rows.split(2 ** 16, 1) for rows in (*basis, ritz))):
                columns.copy_(turn @ torch.cat(part))
            quadrature = values, (start @ vectors[:len(start)]) ** 2 / n
            return values[leading], ritz, residuals[:k], quadrature


def power_method(operator, k, generator):
    """Finds k eigenpairs by the power method with deflation, as pytorch-hessian-eigenthings (E.2);
    returns values (k,), vectors (k, n) and residuals (k,)."""
    n, values = operator.shape[0], np.zeros(0)
    vectors = torch.empty(0, n, dtype=operator.dtype, device=operator.device)
    for _ in range(min(k, n)):
        w, value = torch.randn(n, generator=generator).to(vectors), 0.0
        for _ in range(POWER_STEPS):
            v, old = w / w.norm(), value
            w = operator.matvec(v)
            w -= vectors.T @ (torch.from_numpy(values).to(w) * (vectors @ v))
            value = float(v @ w)
            if abs(value - old) < POWER_TOLERANCE * abs(value) or not w.any():
                break
        values, vectors = np.append(values, value), torch.cat([vectors, v[None]])
    order = np.argsort(-np.abs(values), kind="stable")
    values, vectors = values[order], vectors[torch.from_numpy(order)]
    residuals = [float((operator.matvec(v) - a * v).norm()) for a, v in zip(values, vectors)]
    return values, vectors, np.array(residuals)


def eigenpairs(operator, k=100, eigensolver="lanczos", tolerance=TOLERANCE, seed=0, block=PROBES,
               steps=0):
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
