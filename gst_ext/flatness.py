"""Flatness (E) of any network: the Hessian's spectrum, gradient covariance, Fisher information, loss along directions.

A network is a torch module in eval mode whose output is logits. Losses are mean cross-entropies in nats. Vectors in
parameter space are flat: model.parameters() in order, each in its logical (NCHW) order, (n,) for n parameters. x are
images as the network takes them, y (images,) int64 labels.

A measure's adaptive form takes it in coordinates relative to the weights: D H D in place of H, D = diag(scale), scale
(n,) = weight_scale(model) = |w|. It does not change where the same function is written with other weight norms.

Functions that need second derivatives, or every image's own gradient, raise ValueError with the cure for a network in
training mode and for layers that do not have them.
"""
import contextlib
import copy
import functools
import inspect
import math

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.sparse.linalg
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F

POWER_STEPS, POWER_TOLERANCE = 100, 1e-4  # E.2
LINE, RISE, LINES = [round(0.01 * i, 2) for i in range(-40, 41)], 0.1, 10  # E.3, Figure E.4
FAR = 10.0  # the largest |epsilon| tried: a third and more of a trained network's whole weight vector
TRACE_PRODUCTS, EIGEN_TOLERANCE = 90, 1e-3
CHUNK = 128  # images whose gradients are taken together: enough to be fast, few enough to stay near the cache
ENTRIES = 2**23  # of gradients held at once where each image's own is formed
EXACT_CLASSES = LABEL_DRAWS = 10  # Tr(F): every label of so few classes, else so many drawn labels an image
TRACE_SAMPLES = 30  # of the traces beside eigenvectors, which do a sketch's work
CONTROL = {"factors": (1, 0.5, 2), "images": 32, "eigs": 5, "samples": 10}  # of the first images
SEEDED = {"rng": 0} if "rng" in inspect.signature(scipy.sparse.linalg.eigsh).parameters else {}  # from SciPy 1.17 on
PROBE = 10  # steps that look for an eigenvalue that was missed
PROBES, STEPS, WIDTH, GRID = 3, 30, 0.01, 256  # of the spectral density; the width in parts of the spectrum's
NO_DERIVATIVE = "Error", "DelayedError", "NotImplemented", "WarnNotImplemented"  # nodes of autograd's graph
MODAL = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RReLU, nn.RNNBase, nn.MultiheadAttention)


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def weight_scale(model):
    """|w| (n,), the scale of the adaptive forms."""
    return flat(p.detach().abs() for p in model.parameters())


def require_eval(model):
    """ValueError where training mode would change what the network computes, or its running statistics."""
    training = any(module.training for module in model.modules())
    if training and any(isinstance(module, MODAL) for module in model.modules()):
        raise ValueError("the network is in training mode, in which its loss is another function: call model.eval()")
    if not all(p.requires_grad for p in model.parameters()):
        raise ValueError("some parameters are frozen: call model.requires_grad_(True)")


class Folding(torch.overrides.TorchFunctionMode):
    """While it is entered, a convolution and the batch norm of its output are one convolution of folded weights.

    It is the same function, and a Hessian-vector product, which need not go through batch norm's maps any more, takes
    a third less time. A function called with training=True, by whatever module, raises ValueError before it runs.
    """

    def __init__(self):
        super().__init__()
        self.last = None, 0, {}  # the last convolution's output, its version, and its arguments

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("training"):
            raise ValueError(f"{function.__name__} is called in training mode: call model.eval()")
        output, version, conv = self.last
        if function is F.batch_norm and args[0] is output and output._version == version and args[1] is not None:
            (_, mean, var), weight, bias = args, kwargs["weight"], kwargs["bias"]
            scale = (var + kwargs["eps"]).rsqrt() if weight is None else weight / (var + kwargs["eps"]).sqrt()
            shift = (0 if conv["bias"] is None else conv["bias"]) - mean
            folded = {"weight": conv["weight"] * scale.view(-1, 1, 1, 1),
                      "bias": shift * scale if bias is None else shift * scale + bias}
            return torch.conv2d(**conv | folded)
        output = function(*args, **kwargs)
        if function is torch.conv2d:
            self.last = output, output._version, named(function, args, kwargs)
        return output


def named(function, args, kwargs):
    """The arguments of a layer's function by their names."""
    names = {torch.conv2d: "input weight bias stride padding dilation groups", F.linear: "input weight bias",
             F.batch_norm: "input running_mean running_var weight bias training momentum eps"}[function].split()
    return {"bias": None} | dict(zip(names, args)) | kwargs


def in_chunks(model, x, y, memory_gb, most=None):
    """[(x, y) …] so small that the graph of one's gradient, and as much again to go back through it, fits memory_gb.

    What autograd keeps for an image is not guessed: it is what a second image adds to what it keeps for one. With
    `most`, so many images at most, and the graph is only that of their loss, with thrice as much again to fit.
    """
    require_eval(model)

    def kept_bytes(images):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Folding():
            graph = F.cross_entropy(model(x[:images]), y[:images])
            if not most:
                graph = torch.autograd.grad(graph, list(model.parameters()), create_graph=True, allow_unused=True)
        return sum(kept.values())
    size = min(most or len(x), int(memory_gb * 2**(28 if most else 29) / max(1, kept_bytes(2) - kept_bytes(1))))
    return list(zip(x.split(max(1, size)), y.split(max(1, size))))


def require_differentiable(model, x, y):
    """ValueError unless autograd knows the second derivatives of the loss: of these images, of which a few will do.

    A parameter's gradient is a function of the logits, so one that needs no gradient was cut off from them on its way.
    One by a once_differentiable backward pass does not show it: it leads to a node that raises only if gone through,
    which autograd does not, since nothing lies behind it. And a Hessian that is not symmetric is none.
    """
    params = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True, allow_unused=True)
    pairs = [(g, p) for g, p in zip(gradients, params) if g is not None]
    nodes, seen = [g.grad_fn for g, _ in pairs], set()
    while nodes:
        node = nodes.pop()
        if node is None or type(node).__name__ in NO_DERIVATIVE:
            raise ValueError("a layer of this network has no second derivative, so its Hessian would lack parts: "
                             "compute it by plain PyTorch (this project's networks: train.use_backend(model, "
                             "\"eager\"))")
        if node not in seen:
            seen.add(node)
            nodes += [after for after, _ in node.next_functions if after is not None]
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator).to(p) for _, p in pairs] for _ in range(2))

    def product(v):
        return torch.autograd.grad([g for g, _ in pairs], [p for _, p in pairs], v, retain_graph=True,
                                   materialize_grads=True)
    hu, hv = product(u), product(v)
    difference = abs(float(sum((a * b).sum() for a, b in zip(u, hv)) - sum((a * b).sum() for a, b in zip(v, hu))))
    if difference > 1e-3 * float(torch.maximum(flat(hu).norm(), flat(hv).norm())):
        raise ValueError("the Hessian of this network does not come out symmetric, so a layer's second derivative is "
                         "wrong: compute that layer by other operations")


def hessian_product(model, x, y, memory_gb=4, tick=None):
    """The function (v (n,), scale=None) → Hv, H the Hessian of the mean loss, or D H D v with D = diag(scale).

    Its `products` counts the calls; tick() follows each. The graph of the gradient is built once and gone through
    again for every product, which measured a quarter faster than forward over reverse, and a third faster than
    building it anew; that happens where it does not fit memory_gb. Raises ValueError: see the module.
    """
    params = list(model.parameters())
    parts = in_chunks(model, x, y, memory_gb)
    require_differentiable(model, x[:2], y[:2])

    def gradient(x_part, y_part):
        with Folding():
            loss = F.cross_entropy(model(x_part), y_part, reduction="sum") / len(x)
        return torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)

    kept = gradient(*parts[0]) if len(parts) == 1 else None

    def product(v, scale=None):
        v = v if scale is None else scale * v
        pieces = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in params]), params)]
        result = torch.zeros_like(v)
        for part in parts:
            pairs = [(g, piece) for g, piece in zip(kept or gradient(*part), pieces) if g is not None]
            result += flat(torch.autograd.grad([g for g, _ in pairs], params, [piece for _, piece in pairs],
                                               retain_graph=kept is not None, materialize_grads=True))
        product.products += 1
        if tick:
            tick()
        return result if scale is None else scale * result
    product.products = 0
    return product


def orthogonalise(w, *bases):
    """w (n,) without its part in the span of the orthonormal rows of each basis (m, n), in place; twice is enough."""
    for _ in range(2):
        for basis in bases:
            w.addmv_(basis.T, basis @ w, alpha=-1)
    return w


def largest(values, vectors, k):
    """The k pairs of largest magnitude, ordered by it."""
    order = np.argsort(-np.abs(values), kind="stable")[:k]
    return values[order], vectors[torch.from_numpy(order).to(vectors.device)]


def quadrature(product, start, steps):
    """Nodes and weights (m,) of the Gauss quadrature of start'f(H)start / start'start: `steps` Lanczos steps, or fewer
    where the space is invariant, with full reorthogonalisation."""
    rows, q, alpha, beta = start.new_empty(min(steps, len(start)), len(start)), start / start.norm(), [], []
    while True:
        rows[len(alpha)] = q
        w = product(q)
        alpha.append(float(q @ w))
        beta.append(float(orthogonalise(w, rows[:len(alpha)]).norm()))
        if len(alpha) == len(rows) or beta[-1] <= 10 * torch.finfo(q.dtype).eps * max(map(abs, alpha + beta)):
            nodes, vectors = scipy.linalg.eigh_tridiagonal(alpha, beta[:-1])
            return nodes, vectors[0] ** 2
        q = w / beta[-1]


def lanczos(product, n, k, tol, draw):
    """The k eigenpairs of largest magnitude of a symmetric operator: values (k,) float64 and orthonormal rows (k, n).

    product: v (n,) → Hv; draw: () → random (n,) in CPU memory, where the vectors live, as do 2k + 1 more; tol: of a
    residual over |λ|. ARPACK's implicitly restarted Lanczos method; where n is not above its 2k + 1 vectors, the whole
    matrix. Pairs that have not converged after 10 k + 200 products are left out, so there may be fewer than k.

    A chain of vectors sees one vector only of a multiple eigenvalue. So PROBE steps from a random vector orthogonal to
    the pairs found follow, and if they meet a value beyond |λ_k|, the search is repeated there.
    """
    chain, start = max(2 * k + 1, 20), draw()
    if n <= chain:
        matrix = torch.stack([product(row) for row in torch.eye(n, dtype=start.dtype)]).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        return largest(values.numpy(), vectors.T.to(start), k)
    chain = min(chain, (2**31 - 1) // n)  # ARPACK's indices are of 32 bits
    if chain < k + 2:
        raise ValueError(f"{k} eigenpairs of {n} parameters are more than ARPACK can hold: ask for {chain - 2}")
    # ARPACK's tolerance is absolute for small eigenvalues, so it gets an operator of the size of 1
    size = float(product(start).norm() / start.norm())
    if not size:  # H = 0, or else a random vector would not be in its null space
        return np.zeros(k), torch.eye(k, n, dtype=start.dtype)
    values, vectors = np.zeros(0), start.new_empty(0, n)

    def beside(v):  # H on what is orthogonal to the pairs found
        return orthogonalise(product(orthogonalise(v.clone(), vectors)), vectors)
    operator = scipy.sparse.linalg.LinearOperator(
        (n, n), lambda v: (beside(torch.from_numpy(v.reshape(n))) / size).numpy(), dtype=start.numpy().dtype)
    while True:
        try:
            found = scipy.sparse.linalg.eigsh(operator, k, which="LM", v0=start.numpy(), ncv=chain, tol=tol,
                                              maxiter=math.ceil((10 * k + 200 - chain) / (chain - k)), **SEEDED)
        except scipy.sparse.linalg.ArpackNoConvergence as error:
            found = error.eigenvalues, error.eigenvectors
        values, vectors = largest(np.concatenate([values, size * found[0].astype(np.float64)]),
                                  torch.cat([vectors, torch.from_numpy(found[1].T)]), k)
        if len(values) < k:
            return values, vectors
        start = orthogonalise(draw(), vectors)
        nodes, _ = quadrature(beside, start, PROBE)
        if np.abs(nodes).max() <= np.abs(values).min() + tol * np.abs(values).max():
            return values, vectors


def power_method(product, n, k, draw, residual=None):
    """k eigenpairs, one after the other, by the power method on H minus those found: values (k,) and rows (k, n).

    As in pytorch-hessian-eigenthings v1 (E.2): 100 steps at most, stopping where the eigenvalue changes by less than
    1e-4 of itself. With residual=r a pair goes on, ten times as long at most, until ||Hv - λv|| <= r |λ_1|.
    """
    values, vectors = torch.zeros_like(draw()[:0]), draw()[None, :][:0]
    for _ in range(k):
        v, old = draw(), 0.0
        v /= v.norm()
        for _ in range(POWER_STEPS * (1 if residual is None else 10)):
            w = product(v)
            w.addmv_(vectors.T, values * (vectors @ v), alpha=-1)
            value = float(v @ w)
            change = abs(value - old)
            if residual is None:
                done = change < POWER_TOLERANCE * abs(value)
            else:  # the change too, since a random vector has a small residual
                largest = max([abs(value), *values.abs().tolist()])
                done = change < 0.01 * abs(value) and (w - value * v).norm() <= residual * largest
            if not w.any():
                break
            v, old = w / w.norm(), value
            if done:
                break
        values, vectors = torch.cat([values, values.new_tensor([value])]), torch.cat([vectors, v[None]])
    return values.double().cpu().numpy(), vectors


def hessian_eigs(model, x, y, k=100, method="lanczos", tol=EIGEN_TOLERANCE, seed=0, memory_gb=4, tick=None,
                 scale=None, product=None):
    """Eigenpairs of the Hessian of the mean loss over all n parameters, of largest magnitude, ordered by it (E.2).

    method "lanczos" or "power" (the paper's); k at most n pairs are returned, by Lanczos those that converged:
    eigenvalues (k,) float64, eigenvectors (k, n) orthonormal rows in CPU memory, residuals (k,) ||Hv - λv||, each
    computed by a product of its own, converged (k,) residual <= tol |λ_1|, and products, the number of Hessian-vector
    products, those for the residuals included. scale (n,): of D H D. product: hessian_product's, to share its graph.
    Memory beside memory_gb: 4.3 k vectors of n numbers, 15 GiB for k = 100 and n = 9.2 million in float32.
    """
    n, like = sum(p.numel() for p in model.parameters()), next(model.parameters())
    product = product or hessian_product(model, x, y, memory_gb, tick)
    k, generator, before = min(k, n), torch.Generator().manual_seed(seed), product.products

    def draw():
        return torch.randn(n, generator=generator, dtype=like.dtype)

    def apply(v):
        return product(v.to(like.device), scale).to(v.device)
    if method == "lanczos":
        values, vectors = lanczos(apply, n, k, tol, draw)
    else:
        values, vectors = largest(*power_method(apply, n, k, lambda: draw().to(like.device)), k)
    residuals = np.array([float((apply(v) - value * v).norm()) for value, v in zip(values.tolist(), vectors)])
    return {"eigenvalues": values, "eigenvectors": vectors.cpu(), "residuals": residuals,
            "converged": residuals <= tol * np.abs(values).max(initial=0), "products": product.products - before}


def hessian_trace(model, x, y, products=TRACE_PRODUCTS, seed=0, memory_gb=4, tick=None, scale=None, product=None,
                  eigs=None):
    """Tr(H) by Hutch++ (Meyer et al. 2021): (estimate, standard error), from `products` Hessian-vector products.

    A third of them spans a sketch HS, S random signs, with orthonormal basis Q; a third gives Tr(Q'HQ) exactly; g
    Hutchinson samples z'(I-QQ')H(I-QQ')z estimate the rest. For any Q the sum is unbiased, so all its variance is
    that of the samples, and the standard error is their standard deviation over sqrt(g). Exact where n <= products / 3.
    eigs: what hessian_eigs found by Lanczos; its vectors are Q, its values' sum Tr(Q'HQ), and all products samples.
    scale (n,): Tr(D H D). product: hessian_product's, to share its graph.
    """
    like, generator = next(model.parameters()), torch.Generator().manual_seed(seed)
    product = product or hessian_product(model, x, y, memory_gb, tick)
    n = sum(p.numel() for p in model.parameters())

    def apply(v):
        return product(v.to(like.device), scale).to(v.device)

    def signs():
        return (2.0 * torch.randint(0, 2, (n,), generator=generator) - 1).to(like.dtype)
    if eigs:
        q, exact, samples = eigs["eigenvectors"], float(eigs["eigenvalues"].sum()), products
    else:
        samples = min(products // 3, n)
        q = torch.linalg.qr(torch.stack([apply(signs()) for _ in range(samples)], 1))[0].T.contiguous()
        exact = sum(float(v @ apply(v)) for v in q)
    if len(q) == n:
        return exact, 0.0
    rest = [orthogonalise(signs(), q) for _ in range(samples)]
    found = np.array([float(z @ apply(z)) for z in rest])
    return exact + found.mean(), found.std(ddof=1) / math.sqrt(samples)


def spectral_density(model, x, y, probes=PROBES, steps=STEPS, width=WIDTH, seed=0, memory_gb=4, tick=None,
                     product=None):
    """The density of all n eigenvalues of H by stochastic Lanczos quadrature, smoothed by a Gaussian.

    Each of `probes` random vectors of signs gives a quadrature of `steps` nodes; its deviation is `width` times the
    distance of the outermost nodes, and comes back in units of λ. Returns a dict: probes, steps, width, grid (GRID,)
    evenly spaced λ, density (GRID,), whose integral is 1, and se (GRID,), its standard error over the probes.
    """
    like, generator = next(model.parameters()), torch.Generator().manual_seed(seed)
    product = product or hessian_product(model, x, y, memory_gb, tick)
    n, found = sum(p.numel() for p in model.parameters()), []
    for _ in range(probes):
        signs = 2.0 * torch.randint(0, 2, (n,), generator=generator) - 1
        found.append(quadrature(product, signs.to(like), steps))
    low, high = min(nodes[0] for nodes, _ in found), max(nodes[-1] for nodes, _ in found)
    sigma = width * (high - low) or 1.0
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, GRID)
    each = np.array([scipy.stats.norm.pdf(grid[:, None], nodes, sigma) @ weights for nodes, weights in found])
    return {"probes": probes, "steps": steps, "width": sigma, "grid": grid, "density": each.mean(0),
            "se": each.std(0, ddof=1) / math.sqrt(probes)}


class LayerTap(torch.overrides.TorchFunctionMode):
    """While it is entered, see(function, arguments by name, output) is told of each layer whose gradients layer_norms
    knows: convolutions without groups or dilation, batch norms, linear maps, if they have parameters.

    Blocks call these functions with masked parameters, so no hook on a module would see them.
    """

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.conv2d, F.batch_norm, F.linear):
            arguments = named(function, args, kwargs or {})
            known = all(arguments.get(name, 1) in (1, (1, 1)) for name in ("groups", "dilation"))
            known &= arguments["weight"] is not None and arguments["weight"].requires_grad
            if known and not isinstance(arguments.get("padding"), str):
                self.see(function, arguments, output)
        return output


def parameter_of(tensor, params):
    """(index, factor (c, 1)) of the parameter that a layer's tensor (c, …) is, times a factor for each row."""
    gradients = torch.autograd.grad(tensor.sum(), params, retain_graph=True, allow_unused=True)
    index = next(i for i, g in enumerate(gradients) if g is not None)
    return index, gradients[index].reshape(len(tensor), -1)[:, :1]


def layer_factors(model, x, scale=None):
    """For each layer that LayerTap sees, in order: what the gradients of the tensors that its weight and its bias are
    come multiplied by, (c, 1), with a scale (n,) (c, …); None for a bias that is not there.

    Raises ValueError unless the layers are all of the network's parameters, each used once.
    """
    params, factors, covered = list(model.parameters()), [], 0
    pieces = scale.split([p.numel() for p in params]) if scale is not None else None

    def factor(tensor):
        nonlocal covered
        if tensor is not None and tensor.requires_grad:
            covered += tensor.numel()
            index, rows = parameter_of(tensor, params)
            return rows if scale is None else rows * pieces[index].view(len(rows), -1)

    def see(function, arguments, output):
        factors.append((factor(arguments["weight"]), factor(arguments["bias"])))

    with LayerTap(see):
        model(x[:1])
    if covered != sum(p.numel() for p in params):
        raise ValueError(f"per-sample gradients cover {covered} of {sum(p.numel() for p in params)} parameters: layers "
                         "have to be plain PyTorch's convolutions, batch norms and linear maps (this project's "
                         "networks: train.use_backend(model, \"eager\")), each used once")
    return factors


def as_pair(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def patches_of(x, kernel, stride, padding):
    """x (images, c_in, h, w) → (images, c_in kh kw, h' w'): what each output position of a convolution sees."""
    x = F.pad(x.contiguous(), (padding[1], padding[1], padding[0], padding[0]))
    patches = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).permute(0, 1, 4, 5, 2, 3)
    return patches.flatten(4).flatten(1, 3)


def scaled_kernel_norms(x, g, factor, kernel, stride, padding):
    """kernel_norms of the gradient times a factor (c_out, c_in kh kw) for each of its entries, which are formed."""
    squares, norms = factor.square().T.flatten(), []
    for x_part, g_part in zip(*(tensor.split(max(1, ENTRIES // factor.numel())) for tensor in (x, g.flatten(2)))):
        gradients = patches_of(x_part, kernel, stride, padding) @ g_part.mT
        norms.append(gradients.square_().flatten(1) @ squares)
    return torch.cat(norms)


def kernel_norms(x, g, kernel, stride, padding):
    """Squared norms (images,) of a kernel's gradients sum_p g_p a_p', a_p the patch of x that output position p sees.

    x (images, c_in, h, w), g (images, c_out, h', w'). Where there are few positions, as the sum over all p and q of
    (g_p'g_q)(a_p'a_q) instead, in which a_p'a_q sums x's own products between positions, one for each of the taps.
    """
    size, pad, flat_g = x.shape[2:], (padding[1], padding[1], padding[0], padding[0]), g.flatten(2)
    c_in, (c_out, positions) = x.shape[1], flat_g.shape[1:]
    # 64 is what the sums over taps and positions measure as, in products of channels
    if size.numel() ** 2 * (c_in + c_out + 64) < math.prod(kernel) * c_in * positions * c_out:
        products = (x.flatten(2).mT @ x.flatten(2)).unflatten(2, size).unflatten(1, size)
        products = F.pad(products, pad + pad)
        for axis in (1, 0):  # of the image; the taps are summed along one, then along the other
            last = stride[axis] * (g.shape[2 + axis] - 1) + 1
            taps = [slice(tap, tap + last, stride[axis]) for tap in range(kernel[axis])]
            products = sum(products[(slice(None),) * (1 + axis) + (tap, slice(None), tap)] for tap in taps)
        return (products.flatten(3).flatten(1, 2) * (flat_g.mT @ flat_g)).sum((1, 2))
    return (patches_of(x, kernel, stride, padding) @ flat_g.mT).square().sum((1, 2))


def layer_norms(g, function, arguments, weight_factor, bias_factor):
    """Squared norms (images,) of the gradients of a layer that LayerTap saw, each entry times its factor.

    g (images, c, …): the gradient of the layer's output.
    """
    def summed(tensor):  # over positions
        return tensor.flatten(2).sum(2) if tensor.ndim > 2 else tensor
    x = arguments["input"].detach()
    if function is torch.conv2d:
        stride, padding = as_pair(arguments.get("stride", 1)), as_pair(arguments.get("padding", 0))
        geometry = arguments["weight"].shape[2:], stride, padding
        if weight_factor.shape[1] == 1:
            norms = kernel_norms(x, g * weight_factor[:, :, None], *geometry)
        else:
            norms = scaled_kernel_norms(x, g, weight_factor, *geometry)
    elif function is F.batch_norm:
        mean, deviation = arguments["running_mean"], (arguments["running_var"] + arguments["eps"]).sqrt()
        slope = (summed(g * x) - mean * summed(g)) / deviation
        norms = (slope * weight_factor.T).square().sum(1)
    else:
        norms = (g.square() @ weight_factor.square() * x.square()).sum(1)
    return norms if bias_factor is None else norms + (summed(g) * bias_factor.T).square().sum(1)


def gradient_norms(model, x, y, memory_gb, scale=None):
    """For each part of the images: (logits, the function labels → squared norms of its images' gradients, labels y).

    Layer by layer, without forming the gradients of all layers at once: one pass back to the layers' outputs gives
    what the parameters' gradients are products of. scale (n,): of the gradients times scale. Raises ValueError for
    layers it does not know, and where one image's norm is not that of its gradient by autograd.
    """
    def tapped(part):
        edges, layers = [], []

        def see(function, arguments, output):
            edges.append(torch.autograd.graph.get_gradient_edge(output))
            layers.append((function, arguments, *factors[len(layers)]))

        def norms(labels):
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, edges, retain_graph=True)
            return sum(layer_norms(g, *layer).double() for g, layer in zip(gradients, layers))

        with LayerTap(see):
            logits = model(part)
        return logits, norms

    parts = in_chunks(model, x, y, memory_gb, CHUNK)
    factors = layer_factors(model, x, scale)
    logits, norms = tapped(x[:1])
    label = logits.argmin(1)  # the label whose gradient is the largest
    gradient = flat(torch.autograd.grad(F.cross_entropy(logits, label), list(model.parameters()), retain_graph=True))
    found, known = float(norms(label)), float((gradient if scale is None else scale * gradient).double().square().sum())
    if abs(found - known) > 0.01 * known:
        raise ValueError(f"per-sample gradients of this network cannot be had layer by layer: an image's has the "
                         f"squared norm {known:.4g}, its layers' {found:.4g}; is a parameter used outside its layer?")
    for part, labels in parts:
        logits, norms = tapped(part)
        yield logits.detach(), norms, labels


def gradient_covariance_trace(model, x, y, memory_gb=4, scale=None):
    """Tr(C), C the uncentred gradient covariance: the mean squared norm of the images' own gradients (E.1, E.2).

    scale (n,): Tr(D C D).
    """
    parts = gradient_norms(model, x, y, memory_gb, scale)
    return sum(float(norms(labels).sum()) for _, norms, labels in parts) / len(x)


def fisher_trace(model, x, y, seed=0, memory_gb=4, scale=None):
    """Tr(F), F the Fisher information under the model's own labels (E.3): (value, standard error).

    The mean over images of the sum over labels c of p(c) ||grad log p(c)||^2: exact, with standard error 0, for up to
    10 classes; for more, 10 labels are drawn per image, and the standard error is that of the draws. y is not used.
    scale (n,): Tr(D F D).
    """
    generator, total, variance = torch.Generator().manual_seed(seed), 0.0, 0.0
    for logits, norms, _ in gradient_norms(model, x, y, memory_gb, scale):
        p = logits.double().softmax(1)
        if p.shape[1] <= EXACT_CLASSES:
            each = torch.arange(p.shape[1], device=p.device)[:, None].expand(-1, len(p))
            total += float(sum((p_c * norms(labels)).sum() for p_c, labels in zip(p.T, each)))
        else:
            draws = torch.multinomial(p.cpu(), LABEL_DRAWS, True, generator=generator).T.to(p.device)
            drawn = torch.stack([norms(labels) for labels in draws])
            total += float(drawn.mean(0).sum())
            variance += float(drawn.var(0).sum()) / LABEL_DRAWS
    return total / len(x), math.sqrt(variance) / len(x)


def line_loss(model, x, y, direction, memory_gb=4):
    """The function ε → mean loss at w + ε direction, direction (n,); each value is computed once."""
    parts, params = in_chunks(model, x, y, memory_gb), dict(model.named_parameters())
    pieces = direction.to(x.device).split([p.numel() for p in params.values()])

    @functools.cache
    @torch.no_grad()
    def loss(epsilon):
        moved = {name: p + epsilon * piece.view_as(p) for (name, p), piece in zip(params.items(), pieces)}
        return sum(float(F.cross_entropy(torch.func.functional_call(model, moved, (part,)), labels, reduction="sum"))
                   for part, labels in parts) / len(x)
    return loss


def first_rise(loss, rise, step=0.01, tolerance=1e-12):
    """The smallest |ε| at which loss(ε) exceeds loss(0) by `rise`, on either side; None if there is none up to 10.

    Both sides are searched outward together in steps of `step`, from 20 of them on of a twentieth of ε, since the loss
    need not be monotone; then Brent's method, until ε is known to `tolerance`. Only a rise and fall within one step
    can be missed.
    """
    def excess(epsilon):  # bounded, since Brent's method cannot interpolate infinities
        return float(np.clip(np.nan_to_num(loss(epsilon), nan=np.inf) - loss(0.0) - rise, -1e3, 1e3))
    inner = 0.0
    while inner < FAR:
        outer = min(FAR, round(inner + max(step, inner / 20), 10))
        crossed = [side for side in (1, -1) if excess(side * outer) > 0]
        if crossed:
            return min(scipy.optimize.brentq(lambda e: excess(side * e), inner, outer, xtol=tolerance)
                       for side in crossed)
        inner = outer
    return None


def loss_rise_epsilon(model, x, y, direction, rise=RISE, memory_gb=4):
    """The smallest |ε| along the unit vector direction (n,) that raises the mean loss by `rise` (E.3; first_rise)."""
    return first_rise(line_loss(model, x, y, direction, memory_gb), rise)


def rescaled(model, x, a):
    """A copy of a network in eval mode that computes the same function with other weight norms (DESIGN, "Scale").

    The filter and bias of every convolution that batch norm follows, and its running mean, are multiplied by a, its
    running variance and epsilon by a². x: images, the first of which is passed through to see what follows what.
    Raises ValueError if logits do not agree to rounding, or no convolution is followed by batch norm.
    """
    require_eval(model)
    twin, made, pairs = copy.deepcopy(model), {}, []
    params, norms = list(twin.parameters()), [m for m in twin.modules() if hasattr(m, "running_mean")]

    def see(function, arguments, output):
        conv = made.get(id(arguments["input"]))
        if function is F.batch_norm and conv:
            pairs.append((conv[1], next(m for m in norms if m.running_mean is arguments["running_mean"])))
        if function is torch.conv2d:
            tensors = [arguments[name] for name in ("weight", "bias") if arguments[name] is not None]
            made[id(output)] = output, [params[parameter_of(tensor, params)[0]] for tensor in tensors]
    with LayerTap(see):
        twin(x[:1])
    with torch.no_grad():
        for tensors, norm in pairs:
            for tensor in (*tensors, norm.running_mean):
                tensor *= a
            norm.running_var *= a * a
            norm.eps *= a * a
        before, after = model(x[:1]), twin(x[:1])
    if not pairs or float((before - after).abs().max()) > 1e-3 * float(before.abs().max()):
        raise ValueError("this network is not the same function with rescaled filters: the control needs convolutions "
                         "that batch norm follows, and nothing else reads")
    return twin


def measures(model, x, y, eigs=100, method="lanczos", samples=None, seed=0, memory_gb=4, tick=None,
             stage=contextlib.nullcontext, full=False):
    """A dict, for JSON, of every measure (docs/flatness.md), and under "adaptive" the same of the adaptive forms.

    stage(name): a context manager entered around each step. full: also the loss on the grid LINE along each of the
    LINES leading eigenvectors (Figure E.4), as "line", and the spectral density.
    """
    product, result = hessian_product(model, x, y, memory_gb, tick), {}
    if full:
        with stage("density"):
            density = spectral_density(model, x, y, PROBES, STEPS, seed=seed, product=product)
        result["density"] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in density.items()}
    for scale, name in ((None, ""), (weight_scale(model), "adaptive ")):
        with stage(f"{name}eigs"):
            pairs = hessian_eigs(model, x, y, eigs, method, seed=seed, scale=scale, product=product)
        with stage(f"{name}trace"):
            before, basis = product.products, pairs if method == "lanczos" else None
            drawn = (samples or TRACE_SAMPLES) if basis else TRACE_PRODUCTS
            trace, trace_se = hessian_trace(model, x, y, drawn, seed, scale=scale, product=product, eigs=basis)
            products = product.products - before
        with stage(f"{name}covariance"):
            tr_c = gradient_covariance_trace(model, x, y, memory_gb, scale)
        with stage(f"{name}fisher"):
            tr_f, tr_f_se = fisher_trace(model, x, y, seed, memory_gb, scale)
        with stage(f"{name}line"):
            directions = [v.to(x.device) if scale is None else scale * v.to(x.device)
                          for v in pairs["eigenvectors"][:LINES]]
            losses, on_grid = [line_loss(model, x, y, v, memory_gb) for v in directions], full and scale is None
            lines = [[loss(epsilon) for epsilon in LINE] for loss in losses] if on_grid else None
            # a tenth of where a parabola of this curvature has risen; on the grid its steps, which are known
            steps = [min(0.5, math.sqrt(2 * RISE / max(abs(value), 1e-9)) / 10) for value in pairs["eigenvalues"]]
            # to 1e-6, since float32's rounding of the loss hides more
            rises = [first_rise(loss, RISE, 0.01 if on_grid else step, 1e-6) for loss, step in zip(losses, steps)]
        trace_eigs = float(pairs["eigenvalues"].sum())
        found = {**{k: pairs[k].tolist() for k in ("eigenvalues", "residuals", "converged")},
                 "eig_products": pairs["products"], "trace_eigs": trace_eigs, "trace": float(trace),
                 "trace_se": float(trace_se), "trace_products": products,
                 "tr_c": tr_c, "tr_f": tr_f, "tr_f_se": tr_f_se,
                 **{k: tr_c / by if by else None for k, by in (("tic", trace_eigs), ("tic_trace", float(trace)),
                                                               ("c_over_f", tr_f))},
                 "epsilon": rises, "epsilon_min": min((e for e in rises if e is not None), default=None)}
        result |= {"adaptive": found} if name else found
        if on_grid:
            result["line"] = {"epsilon": LINE, "loss": lines}
    return result | {"products": product.products}


def control(model, x, y, eigs=100, method="lanczos", seed=0, memory_gb=4, tick=None, stage=contextlib.nullcontext):
    """The rescaling control: `measures` of the network rescaled by 1, 1/2 and 2, {"1": …, "0.5": …, "2": …}.

    It takes fewer images, eigenvalues and samples of the traces than the measures themselves (CONTROL), so the factors
    are to be compared with "1", which is the network as it is. Raises ValueError as `rescaled` does.
    """
    x, y = x[:CONTROL["images"]], y[:CONTROL["images"]]
    with stage("control"):
        return {f"{a:g}": measures(rescaled(model, x, a), x, y, min(eigs, CONTROL["eigs"]), method, CONTROL["samples"],
                                   seed, memory_gb, tick) for a in CONTROL["factors"]}


SETTINGS = ("version", "images", "eig", "epoch", "eigs")  # measurements that differ in these are not put together
OF_EIGENPAIRS = ("trace_eigs", "tic", "epsilon_min", "top")  # the measures that need these to have converged


def measure_of(found, name):
    """A measure in a dict from `measures`, or None; "top" is the leading eigenvalue, "adaptive_*" the adaptive form."""
    if name.startswith("adaptive_"):
        return measure_of(found.get("adaptive", {}), name.removeprefix("adaptive_"))
    return next(iter(found.get("eigenvalues", ())), None) if name == "top" else found.get(name)


def pairs_asked(found, pairs):
    """How many eigenpairs were asked for, of which `pairs` were found: a network has no more than parameters."""
    return min(found.get("eigs", len(pairs)), found.get("parameters", math.inf))


def share_converged(found, name):
    """The share of converged pairs among those that a measure is made of, 1 for what is made of none. Pairs that were
    asked for and not found have not converged."""
    kind = name.removeprefix("adaptive_")
    if kind not in OF_EIGENPAIRS:
        return 1.0
    pairs = (found if kind == name else found["adaptive"])["converged"]
    asked = pairs_asked(found, pairs)
    of = min(asked, {"top": 1, "epsilon_min": LINES}.get(kind, asked))
    return sum(pairs[:of]) / of if of else 0.0


def moved_by_rescaling(found, *names):
    """The largest relative change of any of these measures over the scales of `control`, found["control"]; None where
    unknown."""
    control, changes = found.get("control", {}), []
    for name in names:
        own, *others = (measure_of(control.get(a, {}), name) for a in ("1", *(control.keys() - {"1"})))
        changes += [abs(value / own - 1) for value in others if own and value is not None]
    return max(changes, default=None)


def in_words(found, asked):
    """A line on dicts that `measures` gave of several networks, and `asked` eigenpairs were wanted of."""
    first, k = found[0], min(len(each["eigenvalues"]) for each in found)
    wanted = sum(pairs_asked(each, each["converged"]) for each in found)
    share, split = 100 * sum(sum(each["converged"]) for each in found) / max(1, wanted), first.get("split", "test")
    method = " by the power method" * (first.get("eig") == "power")
    return (f"{k} eigenpairs{method}" + f" ({asked} asked)" * (asked != k) +
            f", {share:.3g}% converged, on {first['images']} {split} images")
