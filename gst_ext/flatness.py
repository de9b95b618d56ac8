"""Flatness (E) of any network: the Hessian's spectrum, gradient covariance, Fisher information, loss along directions.

A network is a torch module in eval mode whose output is logits. Losses are mean cross-entropies in nats. Vectors in
parameter space are flat: model.parameters() in order, each in its logical (NCHW) order, (n,) for n parameters. x are
images as the network takes them, y (images,) int64 labels.
"""
import functools
import math

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
import torch.nn.functional as F

POWER_STEPS, POWER_TOLERANCE = 100, 1e-4  # E.2
LINE, RISE, LINES = [round(0.01 * i, 2) for i in range(-40, 41)], 0.1, 10  # E.3, Figure E.4
FAR = 10.0  # the largest |epsilon| tried: a third and more of a trained network's whole weight vector
TRACE_PRODUCTS, EIGEN_TOLERANCE = 90, 1e-3
CHUNK = 128  # images whose gradients are taken together: enough to be fast, few enough to stay near the cache
EXACT_CLASSES = LABEL_DRAWS = 10  # Tr(F): every label of so few classes, else so many drawn labels an image


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def in_chunks(model, x, y, memory_gb, most=None):
    """[(x, y) …] so small that the graph of one's gradient, and as much again to go back through it, fits memory_gb.

    What autograd keeps for an image is not guessed: it is what a second image adds to what it keeps for one. With
    `most`, so many images at most, and the graph is only that of their loss, with thrice as much again to fit.
    """
    def kept_bytes(images):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graph = F.cross_entropy(model(x[:images]), y[:images])
            if not most:
                graph = torch.autograd.grad(graph, list(model.parameters()), create_graph=True, materialize_grads=True)
        return sum(kept.values())
    size = min(most or len(x), int(memory_gb * 2**(28 if most else 29) / max(1, kept_bytes(2) - kept_bytes(1))))
    return list(zip(x.split(max(1, size)), y.split(max(1, size))))


def hessian_product(model, x, y, memory_gb=4, tick=None):
    """The function v (n,) → Hv, H the Hessian of the mean loss. Its `products` counts the calls; tick() follows each.

    The graph of the gradient is built once and gone through again for every product, which measured a quarter faster
    than forward over reverse, and a third faster than building it anew; that happens where it does not fit memory_gb.
    """
    params = list(model.parameters())
    parts = in_chunks(model, x, y, memory_gb)

    def gradient(x_part, y_part):
        loss = F.cross_entropy(model(x_part), y_part, reduction="sum") / len(x)
        return torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)

    kept = gradient(*parts[0]) if len(parts) == 1 else None

    def product(v):
        pieces = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in params]), params)]
        result = torch.zeros_like(v)
        for part in parts:
            pairs = [(g, piece) for g, piece in zip(kept or gradient(*part), pieces) if g.requires_grad]
            result += flat(torch.autograd.grad([g for g, _ in pairs], params, [piece for _, piece in pairs],
                                               retain_graph=kept is not None, materialize_grads=True))
        product.products += 1
        if tick:
            tick()
        return result
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


def lanczos(product, n, k, tol, draw):
    """The k eigenpairs of largest magnitude of a symmetric operator: values (k,) float64 and orthonormal rows (k, n).

    product: v (n,) → Hv; draw: () → random (n,) where the vectors are to live; tol: residual / |λ_1|.

    Lanczos with full reorthogonalisation, as a sequence of chains. A chain runs until all its pairs among the k
    largest have residuals, estimated by beta |s_m|, of at most tol |λ_1|; or until its space is invariant (beta = 0),
    or as large as memory should hold. These pairs are set aside, and the next chain starts orthogonally to them: from
    the sum of the ones that are not there yet, else at random. Since one chain sees one vector only of a multiple
    eigenvalue, the search ends when a random chain of 20 steps has met none beyond |λ_k| + tol |λ_1|. It also ends
    after 30 k + 200 products, and then returns what it has.
    """
    values, vectors = np.zeros(0), draw()[None, :][:0]
    start, left = draw(), 30 * k + 200
    while len(values) < n and left:
        q = orthogonalise(start, vectors)
        q /= q.norm()
        blocks, alpha, beta = [], [], []
        room = min(4 * k + 100, n - len(values))
        while True:
            m = len(alpha)
            if m % 32 == 0:
                blocks.append(torch.zeros(min(32, room - m), n, dtype=q.dtype, device=q.device))
            blocks[-1][m % 32] = q
            w = product(q)
            left -= 1
            alpha.append(float(q @ w))
            beta.append(float(orthogonalise(w, vectors, *blocks).norm()))
            invariant = beta[-1] <= 10 * torch.finfo(q.dtype).eps * max(map(abs, alpha + beta))
            over = invariant or len(alpha) == room or not left
            if over or len(alpha) >= 20 and len(alpha) % 5 == 0:
                theta, s = scipy.linalg.eigh_tridiagonal(alpha, beta[:-1])
                sizes = np.abs(np.concatenate([values, theta]))
                # 0.8 since the true residual has rounding in it too, a third of 1e-3 in float32
                close = beta[-1] * np.abs(s[-1]) <= 0.8 * tol * sizes.max()
                close |= invariant or len(alpha) == n - len(values)
                wanted = np.isin(np.arange(len(sizes)), np.argsort(-sizes, kind="stable")[:k])[len(values):]
                if len(values) == k:
                    wanted &= np.abs(theta) > np.abs(values).min() + tol * sizes.max()
                if over or len(sizes) >= k and close[wanted].all():
                    break
            q = w / beta[-1]

        def combine(weights):  # (m, …) → the combinations of the chain's vectors
            weights = torch.from_numpy(np.ascontiguousarray(weights.T)).to(q)
            return sum(part @ block[:part.shape[-1]] for part, block in zip(weights.split(32, -1), blocks))
        rest = wanted & ~close
        start = combine(s[:, rest].sum(1)) if rest.any() else draw()
        chosen = wanted & close if left else wanted
        values, vectors = largest(np.concatenate([values, theta[chosen]]),
                                  torch.cat([vectors, combine(s[:, chosen])]), k)
        if not wanted.any():
            break
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


def hessian_eigs(model, x, y, k=100, method="lanczos", tol=EIGEN_TOLERANCE, seed=0, memory_gb=4, tick=None):
    """Eigenpairs of the Hessian of the mean loss over all n parameters, of largest magnitude, ordered by it (E.2).

    model in eval mode; method "lanczos" or "power" (the paper's); k at most n pairs are returned: eigenvalues (k,)
    float64, eigenvectors (k, n) orthonormal rows (in CPU memory where the device's does not hold them), residuals (k,)
    ||Hv - λv||, each computed by a product of its own, converged (k,) residual <= tol |λ_1|, and products, the number
    of Hessian-vector products, those for the residuals included.
    """
    n, like = sum(p.numel() for p in model.parameters()), next(model.parameters())
    k, store = min(k, n), like.device
    product = hessian_product(model, x, y, memory_gb, tick)
    if store.type == "cuda" and torch.cuda.mem_get_info(store)[0] < 2 * (6 * k + 100) * n * like.element_size():
        store = torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)

    def apply(v):
        return product(v.to(like.device)).to(v.device)

    def draw():
        return torch.randn(n, generator=generator, dtype=like.dtype).to(store)
    found = lanczos(apply, n, k, tol, draw) if method == "lanczos" else power_method(apply, n, k, draw)
    values, vectors = largest(*found, k)
    residuals = np.array([float((apply(v) - value * v).norm()) for value, v in zip(values.tolist(), vectors)])
    return {"eigenvalues": values, "eigenvectors": vectors, "residuals": residuals,
            "converged": residuals <= tol * np.abs(values).max(), "products": product.products}


def hessian_trace(model, x, y, products=TRACE_PRODUCTS, seed=0, memory_gb=4, tick=None):
    """Tr(H) by Hutch++ (Meyer et al. 2021): (estimate, standard error), from `products` Hessian-vector products.

    A third of them spans a sketch HS, S random signs, with orthonormal basis Q; a third gives Tr(Q'HQ) exactly; g
    Hutchinson samples z'(I-QQ')H(I-QQ')z estimate the rest. For any Q the sum is unbiased, so all its variance is
    that of the samples, and the standard error is their standard deviation over sqrt(g). Exact where n <= products / 3.
    """
    like, generator = next(model.parameters()), torch.Generator().manual_seed(seed)
    product = hessian_product(model, x, y, memory_gb, tick)
    n = sum(p.numel() for p in model.parameters())
    third = min(products // 3, n)

    def signs():
        return (2.0 * torch.randint(0, 2, (n,), generator=generator) - 1).to(like)
    q = torch.linalg.qr(torch.stack([product(signs()) for _ in range(third)], 1))[0].T.contiguous()
    exact = sum(float(v @ product(v)) for v in q)
    if third == n:
        return exact, 0.0
    rest = [orthogonalise(signs(), q) for _ in range(third)]
    samples = np.array([float(z @ product(z)) for z in rest])
    return exact + samples.mean(), samples.std(ddof=1) / math.sqrt(third)


class LayerTap(torch.overrides.TorchFunctionMode):
    """While it is entered, see(function, args, kwargs, output) is told of each convolution, batch norm and linear map.

    Blocks call these functions with masked parameters, so no hook on a module would see them.
    """

    def __init__(self, see):
        super().__init__()
        self.see = see

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.conv2d, F.batch_norm, F.linear):
            self.see(function, args, kwargs, output)
        return output


def mask_factors(model, x):
    """For each layer that LayerTap sees, in order: what its weight and its bias come multiplied by, (c, 1) or None.

    Raises ValueError unless the layers are all of the network's parameters, and its batch norms are in eval mode.
    """
    params, factors, covered = list(model.parameters()), [], 0

    def factor(tensor):
        nonlocal covered
        if tensor is not None:
            covered += tensor.numel()
            gradients = torch.autograd.grad(tensor.sum(), params, retain_graph=True, allow_unused=True)
            return next(g for g in gradients if g is not None).reshape(len(tensor), -1)[:, :1]

    def see(function, args, kwargs, output):
        if function is F.batch_norm and kwargs["training"]:
            raise ValueError("per-sample gradients need batch norm in eval mode: call model.eval()")
        weight, bias = (kwargs["weight"], kwargs["bias"]) if function is F.batch_norm else args[1:3]
        factors.append((factor(weight), factor(bias)))

    with LayerTap(see):
        model(x[:1])
    if covered != sum(p.numel() for p in params):
        raise ValueError(f"per-sample gradients cover {covered} of {sum(p.numel() for p in params)} parameters")
    return factors


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
    patches = F.pad(x.contiguous(), pad).unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
    patches = patches.permute(0, 1, 4, 5, 2, 3).reshape(len(x), -1, positions)
    return (patches @ flat_g.mT).square().sum((1, 2))


def layer_norms(g, function, args, kwargs, weight_factor, bias_factor):
    """Squared norms (images,) of the gradients of a layer that LayerTap saw; g (images, c, …) is its output's."""
    x, total = args[0].detach(), g.flatten(2).sum(2) if g.ndim > 2 else g
    if function is torch.conv2d:
        norms = kernel_norms(x, g * weight_factor[:, :, None], args[1].shape[2:], *args[3:5])
    elif function is F.batch_norm:
        mean, deviation = args[1], (args[2] + kwargs["eps"]).sqrt()
        slope = ((g * x).sum((2, 3)) - mean * total) / deviation
        norms = (slope * weight_factor.T).square().sum(1)
    else:
        norms = (g * weight_factor.T).square().sum(1) * x.square().sum(1)
    return norms if bias_factor is None else norms + (total * bias_factor.T).square().sum(1)


def gradient_norms(model, x, y, memory_gb):
    """For each part of the images: (logits, the function labels → squared norms of its images' gradients, labels y).

    Layer by layer, without forming the gradients of all layers at once: one pass back to the layers' outputs gives
    what the parameters' gradients are products of.
    """
    factors = mask_factors(model, x)
    for part, labels in in_chunks(model, x, y, memory_gb, CHUNK):
        edges, layers = [], []

        def see(function, args, kwargs, output):
            edges.append(torch.autograd.graph.get_gradient_edge(output))
            layers.append((function, args, kwargs, *factors[len(layers)]))

        def norms(labels):
            loss = F.cross_entropy(logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, edges, retain_graph=True)
            return sum(layer_norms(g, *layer).double() for g, layer in zip(gradients, layers))

        with LayerTap(see):
            logits = model(part)
        yield logits.detach(), norms, labels


def gradient_covariance_trace(model, x, y, memory_gb=4):
    """Tr(C), C the uncentred gradient covariance: the mean squared norm of the images' own gradients (E.1, E.2)."""
    return sum(float(norms(labels).sum()) for _, norms, labels in gradient_norms(model, x, y, memory_gb)) / len(x)


def fisher_trace(model, x, y, seed=0, memory_gb=4):
    """Tr(F), F the Fisher information under the model's own labels (E.3): (value, standard error).

    The mean over images of the sum over labels c of p(c) ||grad log p(c)||^2: exact, with standard error 0, for up to
    10 classes; for more, 10 labels are drawn per image, and the standard error is that of the draws. y is not used.
    """
    generator, total, variance = torch.Generator().manual_seed(seed), 0.0, 0.0
    for logits, norms, _ in gradient_norms(model, x, y, memory_gb):
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


def first_rise(loss, rise):
    """The smallest |ε| at which loss(ε) exceeds loss(0) by `rise`, on either side; None if there is none up to 10.

    Both sides are searched outward together in steps of 0.01, from 0.2 on of a twentieth of ε, since the loss need
    not be monotone; then Brent's method. Only a rise and fall within one step can be missed.
    """
    def excess(epsilon):  # bounded, since Brent's method cannot interpolate infinities
        return float(np.clip(np.nan_to_num(loss(epsilon), nan=np.inf) - loss(0.0) - rise, -1e3, 1e3))
    inner = 0.0
    while inner < FAR:
        outer = min(FAR, round(inner + max(0.01, inner / 20), 10))
        crossed = [side for side in (1, -1) if excess(side * outer) > 0]
        if crossed:
            return min(scipy.optimize.brentq(lambda e: excess(side * e), inner, outer, xtol=1e-12) for side in crossed)
        inner = outer
    return None


def loss_rise_epsilon(model, x, y, direction, rise=RISE, memory_gb=4):
    """The smallest |ε| along the unit vector direction (n,) that raises the mean loss by `rise` (E.3; first_rise)."""
    return first_rise(line_loss(model, x, y, direction, memory_gb), rise)
