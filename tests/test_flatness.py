"""Flatness: every measure against its definition, a closed form, or a full Hessian."""
import contextlib
import copy
import functools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import needs_gpu, tiny_model

import analyze
import appendix_figures
import train
from gst_ext import flatness, ops
from gst_ext.errors import UserError
from gst_ext.hessian import Convolution

NETWORKS = {"vgg11": 0.008, "vgg19": 0.005, "resnet18": 0.006, "resnet20": 0.04, "resnet56": 0.03}


def images_and_labels(n, classes=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 32, 32, dtype=torch.float64, generator=generator)
    return x, torch.arange(n) % classes


def small_network(name, pruned):
    """A network of train.py in float64, about a third of whose layers lost a filter."""
    model = tiny_model(name, width=NETWORKS[name]).double().eval()
    nn.init.normal_(model.linear.weight, 0, 0.3)
    for block in model.prunable[::3] if pruned else ():
        if len(block.mask) > 1:
            train.prune_filters(block, torch.tensor([0]))
    return model


def full_hessian(model, x, y):
    """The Hessian (n, n) by autograd alone, without anything of gst_ext.flatness."""
    params = list(model.parameters())
    gradient = flatness.flat(torch.autograd.grad(F.cross_entropy(model(x), y), params,
                                                 create_graph=True))
    grad = functools.partial(torch.autograd.grad, gradient, params, retain_graph=True)
    units = torch.eye(len(gradient), dtype=x.dtype)
    try:
        rows = [grad(some, is_grads_batched=True) for some in units.split(100)]
        return torch.cat([torch.cat([g.flatten(1) for g in block], 1) for block in rows])
    except RuntimeError:  # PyTorch 2.11 cannot batch the second derivative of max-pools
        return torch.stack([flatness.flat(grad(unit)) for unit in units])


def image_gradients(model, x, labels):
    return torch.stack([flatness.flat(torch.autograd.grad(
        F.cross_entropy(model(image[None]), label[None]), list(model.parameters())))
        for image, label in zip(x, labels)])


def by_magnitude(values):
    return np.array(sorted(values, key=abs, reverse=True))


class MatrixOperator(flatness.HessianOperator):
    """A HessianOperator of a matrix with these eigenvalues."""

    def __init__(self, values, seed=0):
        generator = torch.Generator().manual_seed(seed)
        n = len(values)
        q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        self.matrix = q * torch.tensor(values, dtype=torch.float64) @ q.T
        self.shape, self.products = (n, n), 0
        self.dtype, self.device = self.matrix.dtype, self.matrix.device

    def matvec(self, v):
        self.products += 1
        return self.matrix @ v


def residuals(matrix, pairs):
    values = torch.from_numpy(pairs.values)
    return (pairs.vectors @ matrix - values[:, None] * pairs.vectors).norm(dim=1).numpy()


@pytest.fixture(scope="module")
def small():
    """A pruned VGG11 of some 1,000 parameters, its images and labels, and its full Hessian."""
    model = small_network("vgg11", True)
    x, y = images_and_labels(9)
    return model, x, y, full_hessian(model, x, y).numpy()


# The theorem: diag(H) = diag(F)

@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pruned", [False, True])
def test_the_diagonal_and_trace_of_the_hessian_are_the_fisher_s(name, pruned):
    model = small_network(name, pruned)
    x, y = images_and_labels(2)
    diagonal, found = full_hessian(model, x, y).diagonal(), flatness.hessian_diagonal(model, x)
    assert torch.allclose(found, diagonal, rtol=1e-10, atol=1e-12 * float(diagonal.max()))
    for scale in (1, flatness.weight_scale(model)):
        trace, fisher = (float((d * scale ** 2).sum()) for d in (diagonal, found))
        assert fisher == pytest.approx(trace, rel=1e-10) and trace > 0


@pytest.mark.parametrize("layer, kind", [
    (nn.ReLU(), True), (nn.LeakyReLU(0.1), True), (nn.GELU(), False), (nn.Tanh(), False),
    (nn.Softplus(), False), (nn.SiLU(), False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_check_asks_the_network_itself(layer, kind, dtype):
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3),
            layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).to(dtype).eval()
        x = torch.randn(4, 3, 12, 12, dtype=dtype)
        assert flatness.linear_in_each_weight(model, x) == kind
        if not kind:
            with pytest.raises(ValueError, match="ReLU"):
                flatness.hessian_diagonal(model, x)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_check_accepts_float32_and_takes_a_product_a_layer(name, monkeypatch):
    model, x, products = tiny_model(name).eval(), images_and_labels(4)[0].float(), []
    matvec = flatness.HessianOperator.matvec
    monkeypatch.setattr(flatness.HessianOperator, "matvec",
                        lambda self, v: products.append(self.num_images) or matvec(self, v))
    assert flatness.linear_in_each_weight(model, x)
    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert products == [2] * len(layers)


def test_the_trace_of_a_smooth_network_is_estimated_within_its_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3
    hessian = full_hessian(model, x, y)
    operator = flatness.HessianOperator(model, x, y)
    pairs = flatness.eigenpairs(operator, 10)
    found = np.array([flatness.estimate_trace(operator, pairs, 8, seed) for seed in range(30)])
    scores = (found[:, 0] - float(hessian.trace())) / found[:, 1]
    assert abs(scores.mean()) < 0.7 and 0.7 < scores.std() < 1.7
    measured = flatness.measure(model, x, y, num_eigs=10)
    assert not measured["trace_exact"] and measured["trace_se"] > 0
    assert abs(measured["trace"] - float(hessian.trace())) < 4 * measured["trace_se"]
    assert abs(measured["tr_f"] / float(hessian.trace()) - 1) > 1e-3


# Products and eigenpairs

@pytest.mark.parametrize("geometry", [
    ((1, 1), (1, 1), (1, 1), False, (0, 0), 1), ((2, 1), (0, 1), (1, 2), False, (0, 0), 2)])
@pytest.mark.parametrize("images", [False, True])
def test_derivatives_of_convolutions(geometry, images):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=not images)
    weight = torch.randn(6, 4 // geometry[-1], 3, 3, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(Convolution.apply, (x, weight, *geometry))
    assert torch.equal(Convolution.apply(x, weight, *geometry),
                       F.conv2d(x, weight, None, *geometry[:3], geometry[-1]))


def test_products_are_the_full_hessian_s_whatever_memory_they_get_and_are_counted(small):
    model, x, y, hessian = small
    v = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for memory, sizes in ((4, [9]), (5e-4, [4, 4, 1]), (1e-4, [1] * 9)):
        ticks = []
        operator = flatness.HessianOperator(model, x, y, None, memory, lambda: ticks.append(0))
        assert [len(part) for part, _ in operator.parts] == sizes
        assert operator.shape == hessian.shape
        for scale in (None, flatness.weight_scale(model)):
            operator.scale, d = scale, 1 if scale is None else scale.numpy()
            expected = d * (hessian @ (d * v.numpy()))
            assert operator.matvec(v).numpy() == pytest.approx(expected, abs=1e-12)
        assert operator.products == len(ticks) == 2


@pytest.mark.parametrize("eigensolver, k", [("lanczos", 15), ("power", 2)])
def test_softmax_regression_in_closed_form(eigensolver, k):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.arange(40) % 3
    p, z = model(x).softmax(1).detach(), torch.cat([x, torch.ones(40, 1).double()], 1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("icd,ij,ik->cjdk", curvature, z, z).reshape(15, 15) / 40
    expected, accuracy = by_magnitude(np.linalg.eigvalsh(hessian))[:k], 1e-10 if k == 15 else 1e-3
    pairs = flatness.eigenpairs(flatness.HessianOperator(model, x, y), k, eigensolver)
    assert pairs.values == pytest.approx(expected, abs=accuracy * expected[0])
    products = pairs.vectors @ pairs.vectors.T
    assert torch.allclose(products, torch.eye(k).double(), atol=10 * accuracy)
    assert float(flatness.hessian_diagonal(model, x).sum()) == pytest.approx(float(hessian.trace()))
    assert len(flatness.eigenpairs(flatness.HessianOperator(model, x, y), 100).values) == 15


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("tolerance", [1e-9, 1e-3])
def test_leading_eigenpairs_of_a_pruned_network_and_their_residuals(small, adaptive, tolerance):
    model, x, y, hessian = small
    scale = flatness.weight_scale(model) if adaptive else torch.ones(len(hessian)).double()
    matrix = scale.numpy()[:, None] * hessian * scale.numpy()
    operator = flatness.HessianOperator(model, x, y, scale)
    pairs = flatness.eigenpairs(operator, 20, tolerance=tolerance)
    expected = by_magnitude(np.linalg.eigvalsh(matrix))
    assert expected[:20].min() < 0 and pairs.converged.all() and pairs.products == operator.products
    true = residuals(torch.from_numpy(matrix), pairs)
    assert pairs.residuals == pytest.approx(true, abs=1e-7 * expected[0])
    assert true.max() <= 1.01 * tolerance * abs(expected[0])
    assert np.abs(pairs.values - expected[:20]).max() <= tolerance * abs(expected[0])


@pytest.mark.parametrize("values, k", [
    ([5, 5, 5, -3, -3, 1] + [0] * 34, 8),  # multiple, and fewer than k that are not 0
    (list(np.repeat(np.arange(30, 0, -1.0), 3)), 10),  # each three times
    ([9, -9 + 1e-9, 9 - 1e-9] + list(np.linspace(-1, 1, 60)), 3),  # a cluster and its mirror image
    ([0] * 12, 4), ([1.0], 1), (list(np.linspace(-1, 1, 31)), 31)])
def test_multiple_zero_and_all_eigenvalues(values, k):
    operator = MatrixOperator(values)
    pairs = flatness.eigenpairs(operator, k, tolerance=1e-10)
    assert np.abs(pairs.values) == pytest.approx(np.abs(by_magnitude(values))[:k], abs=1e-8)
    assert residuals(operator.matrix, pairs).max() < 1e-7 and pairs.converged.all()
    assert torch.allclose(pairs.vectors @ pairs.vectors.T, torch.eye(k).double(), atol=1e-10)


def test_no_leading_pair_is_missed_that_comes_later_than_smaller_ones():
    values = [(-1) ** (i % 3 == 0) / (2 + i / 2) for i in range(400)]
    expected, operator = by_magnitude(values)[:30], MatrixOperator(values)
    for seed in range(20):  # a search that ends with 30 converged pairs misses one once
        pairs = flatness.eigenpairs(operator, 30, seed=seed, block=1)
        assert np.abs(pairs.values - expected).max() < 1e-3 * abs(expected[0])


@pytest.mark.parametrize("eigensolver", ["lanczos", "power"])
def test_no_pair_is_called_converged_that_is_not_an_eigenpair(eigensolver):
    # eigenvalues 1e-4 apart at a tolerance of 1e-7: both methods run out of products
    values = [*(1 + 1e-4 * np.arange(40)), *np.linspace(-0.9, 0.9, 1000), 3.0]
    operator = MatrixOperator(values)
    pairs = flatness.eigenpairs(operator, 8, eigensolver, 1e-7)
    true = residuals(operator.matrix, pairs)
    assert ((true <= 3e-7) == pairs.converged).all() and len(pairs.values) == 8
    assert pairs.values[0] == pytest.approx(3, rel=1e-4) and not pairs.converged.all()
    if eigensolver == "lanczos":
        assert pairs.converged[0] and pairs.products <= 6 * 8 + 102


# The spectral density

def test_the_spectral_density_is_that_of_the_full_spectrum(small):
    model, x, y, hessian = small
    operator, values = flatness.HessianOperator(model, x, y), np.linalg.eigvalsh(hessian)
    pairs = flatness.eigenpairs(operator, 0, block=6, steps=40)
    found = {k: np.array(v) for k, v in flatness.spectral_density(pairs.quadrature, 0.02).items()}
    grid, width = found["grid"], found["width"]
    assert (found["probes"], found["steps"], operator.products) == (6, 40, 240)
    assert width == pytest.approx(0.02 * (values[-1] - values[0]), rel=1e-3)
    assert found["density"].sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-3)
    expected = scipy.stats.norm.pdf(grid, values[:, None], width).mean(0)
    assert found["density"] == pytest.approx(expected, abs=0.05 * expected.max())
    seen = expected > 1e-3 * expected.max()
    assert np.abs((found["density"] - expected)[seen] / found["se"][seen]).mean() < 2


# Tr(C), Tr(F)

@pytest.mark.parametrize("name", NETWORKS)
def test_covariance_and_fisher_diagonals_are_their_definitions(name):
    model = small_network(name, True)
    x, y = images_and_labels(3)
    p = model(x).softmax(1).detach()
    gradients = [image_gradients(model, x, torch.full((3,), c)) for c in range(4)]
    fisher = sum(p[:, c] @ g ** 2 for c, g in enumerate(gradients)) / 3
    for memory in (4, 1e-9):
        found = flatness.covariance_diagonal(model, x, y, memory)
        assert torch.allclose(found, (image_gradients(model, x, y) ** 2).mean(0), rtol=1e-10)
        assert torch.allclose(flatness.fisher_diagonal(model, x, memory), fisher, rtol=1e-10)


def test_measures_are_those_of_another_library():
    import curvlinops
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3

    def theirs(operator):
        linear = operator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(x, y)],
                          check_deterministic=False)
        return (linear @ torch.eye(linear.shape[1], dtype=x.dtype)).numpy()
    hessian = theirs(curvlinops.HessianLinearOperator)
    ours = flatness.measure(model, x, y, num_eigs=10)
    expected = by_magnitude(np.linalg.eigvalsh(hessian))[:6]
    pairs = flatness.eigenpairs(flatness.HessianOperator(model, x, y), 6, tolerance=1e-7)
    assert pairs.values == pytest.approx(expected, rel=1e-5)
    assert ours["trace"] == ours["tr_f"] == pytest.approx(np.trace(hessian), rel=1e-6)
    assert ours["tr_f"] == pytest.approx(np.trace(theirs(curvlinops.GGNLinearOperator)), rel=1e-6)
    # the empirical Fisher information is the uncentred covariance of the gradients
    assert ours["tr_c"] == pytest.approx(np.trace(theirs(curvlinops.EFLinearOperator)), rel=1e-6)


# Networks that are refused

class Once(torch.autograd.Function):
    """x², with a backward pass that may be used once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Detached(Once):
    """x², whose second derivative autograd takes for 0."""

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0].detach() * g


class Halved(Once):
    """x², whose second derivative is half of what it should be."""

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0]
        return (x + x.detach()) * g


class Squared(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("function", [Once, Detached, Halved])
def test_layers_without_right_second_derivatives_are_refused_wherever_they_are(function, place):
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    layers = [nn.Linear(5, 4), nn.Linear(4, 3)]
    layers.insert(place, Squared(function.apply))
    if place:  # before it lies a parameter
        with pytest.raises(ValueError, match="plain PyTorch"):
            flatness.HessianOperator(nn.Sequential(*layers), x, y)
    else:
        flatness.HessianOperator(nn.Sequential(*layers), x, y)
    layers[place] = Squared(torch.square)
    flatness.HessianOperator(nn.Sequential(*layers), x, y)


@pytest.mark.skipif(not ops.available, reason="the extension is not built")
@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_the_extension_s_backend_is_refused(name):
    model, x, y = tiny_model(name).eval(), torch.randn(4, 3, 32, 32), torch.arange(4) % 4
    train.set_backend(model, "ext")
    with pytest.raises(ValueError, match="plain PyTorch"):
        flatness.measure(model, x, y, 2)
    flatness.HessianOperator(train.set_backend(model, "eager"), x, y)


def test_training_mode_and_frozen_parameters_are_refused_and_running_statistics_stay():
    model, x, y = tiny_model("vgg11"), torch.randn(4, 3, 32, 32), torch.arange(4) % 4
    before = copy.deepcopy(model.state_dict())
    for training in (model, nn.Sequential(nn.Dropout(), model)):
        model.train(training is model)
        for measure, *more in ((flatness.measure, x, y), (flatness.rescaled, x, 2),
                               (flatness.fisher_diagonal, x), (flatness.hessian_diagonal, x)):
            with pytest.raises(ValueError, match=r"model\.eval"):
                measure(training, *more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dropout = Squared(lambda x: F.dropout(x, 0.5, True))
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), dropout)
    with pytest.raises(ValueError, match="dropout is in training mode"):
        flatness.HessianOperator(hidden, x, y)
    model.linear.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad_\(True\)"):
        flatness.HessianOperator(model.eval(), x, y)


def test_networks_of_other_layers_and_unused_parameters_are_measured():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, padding="same", bias=False), nn.BatchNorm2d(6, affine=False),
        nn.ReLU(), nn.Conv2d(6, 5, (1, 3), dilation=2), nn.GroupNorm(1, 5), nn.Flatten(),
        nn.Linear(160, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    model[1].running_mean.uniform_(), model[7].running_var.uniform_(0.5, 2)
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    expected, n = full_hessian(model, x, y), len(flatness.weight_scale(model))
    squares = (image_gradients(model, x, y) ** 2).mean(0)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    assert torch.allclose(flatness.covariance_diagonal(model, x, y)[2:], squares, rtol=1e-10)
    v = torch.randn(n + 2, dtype=torch.float64)
    product = flatness.HessianOperator(model, x, y).matvec(v)
    assert torch.allclose(product[2:], expected @ v[2:], atol=1e-12) and not product[:2].any()


# Directions, and what scale does

def test_rises_of_functions_known_in_closed_form():
    def rise(function, by=0.1):
        return flatness.first_rise(function, by, tolerance=1e-12)
    assert rise(lambda e: 2 + 5 * e ** 2) == pytest.approx(math.sqrt(0.02), rel=1e-9)
    assert rise(lambda e: 2 - 0.05 * e) == pytest.approx(2, rel=1e-9)  # the negative side
    assert rise(lambda e: math.sin(20 * e), 0.5) == pytest.approx(math.asin(0.5) / 20, rel=1e-9)
    assert rise(lambda e: 0.0) is None
    assert rise(lambda e: e if e < 0.05 else math.nan) == pytest.approx(0.05)


def test_the_rise_along_an_eigenvector_is_the_first_crossing_of_a_fine_grid(small):
    model, x, y, hessian = small
    direction = torch.from_numpy(np.linalg.eigh(hessian)[1][:, -1].copy())
    loss, moved = flatness.loss_along(model, x, y, direction, batch_size=4), copy.deepcopy(model)
    epsilon = flatness.first_rise(loss, tolerance=1e-12)
    grid = [i * epsilon / 100 for i in range(-100, 101)]
    assert max(map(loss, grid)) == pytest.approx(loss(0.0) + 0.1, abs=1e-8)
    assert max(loss(epsilon), loss(-epsilon)) == max(map(loss, grid))
    weights = flatness.flat(model.parameters()).detach() + 0.03 * direction
    nn.utils.vector_to_parameters(weights, moved.parameters())
    assert loss(0.03) == pytest.approx(F.cross_entropy(moved(x), y).item(), rel=1e-12)


def invariants(model, x, y, adaptive):
    """What a symmetry must leave alone: eigenvalues, traces, ε."""
    scale = flatness.weight_scale(model) ** int(adaptive)
    pairs = flatness.eigenpairs(flatness.HessianOperator(model, x, y, scale), 2, tolerance=1e-9)
    loss = flatness.loss_along(model, x, y, scale * pairs.vectors[0])
    diagonals = flatness.covariance_diagonal(model, x, y), flatness.fisher_diagonal(model, x)
    return [*pairs.values, *(float((d * scale ** 2).sum()) for d in diagonals),
            flatness.first_rise(loss, tolerance=1e-10)]


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
@pytest.mark.parametrize("pruned", [False, True])
def test_adaptive_measures_do_not_change_where_the_function_does_not(name, pruned):
    model, (x, y) = small_network(name, pruned), images_and_labels(2)
    plain, adaptive = invariants(model, x, y, False), invariants(model, x, y, True)
    batch_norm_twin, relu_twin = flatness.rescaled(model, x, 0.25), copy.deepcopy(model)
    first, second = relu_twin.prunable[-2:]
    with torch.no_grad():
        first.bn.weight *= 3
        first.bn.bias *= 3
        second.conv.weight /= 3
    for twin in (batch_norm_twin, relu_twin):
        assert torch.allclose(twin(x), model(x), rtol=1e-10)
        assert invariants(twin, x, y, True) == pytest.approx(adaptive, rel=1e-6)
        assert invariants(twin, x, y, False) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
def test_rescaling_moves_a_filter_s_block_of_the_hessian_by_the_inverse_square(name):
    model, (x, y), start = small_network(name, True), images_and_labels(2), 0
    twin = flatness.rescaled(model, x, 3)
    before, after = full_hessian(model, x, y), full_hessian(twin, x, y)
    assert torch.allclose(model(x), twin(x), rtol=1e-10)
    for (key, p), q in zip(model.named_parameters(), twin.parameters()):
        block = slice(start, start := start + p.numel())
        factor = 3 if p.ndim == 4 or key.endswith("conv.bias") else 1
        assert torch.allclose(q, factor * p)
        assert torch.allclose(after[block, block] * factor ** 2, before[block, block], atol=1e-9)
    with pytest.raises(ValueError, match="batch norm follows"):
        flatness.rescaled(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)).double(), x, 2)


def test_the_control_tells_what_rescaling_moves(small, monkeypatch):
    model, x, y, _ = small
    monkeypatch.setattr(flatness, "LINE", [0.0])
    flat = {"control": flatness.rescaling_control(model, x, y, 2, images=4)}
    assert list(flat["control"]) == ["1", "0.5", "2"]
    assert appendix_figures.moved_by_rescaling(flat, "adaptive_tr_c", "adaptive_trace") < 1e-3
    assert appendix_figures.moved_by_rescaling(flat, "trace", "adaptive_trace") > 0.01
    assert appendix_figures.moved_by_rescaling({}, "tr_c") is None


# The whole measurement, and readers of its file

FIELDS = {"eigenvalues", "residuals", "converged", "eig_products", "trace_eigs", "trace",
          "trace_se", "trace_exact", "tr_c", "tr_f", "tr_f_se", "tic", "tic_trace", "c_over_f",
          "epsilon", "epsilon_min"}


def test_measure_has_every_field_and_they_agree(small):
    model, x, y, hessian = small
    found = flatness.measure(model, x, y, num_eigs=12)
    assert set(found) == FIELDS | {"line", "density", "adaptive", "products"}
    assert set(found["adaptive"]) == FIELDS and json.loads(json.dumps(found)) == found
    d = flatness.weight_scale(model).numpy()
    for fields, matrix in ((found, hessian), (found["adaptive"], d[:, None] * hessian * d)):
        assert fields["trace"] == fields["tr_f"] == pytest.approx(np.trace(matrix), rel=1e-10)
        assert fields["trace_exact"] and fields["trace_se"] == fields["tr_f_se"] == 0
        expected = by_magnitude(np.linalg.eigvalsh(matrix))[:12]
        assert fields["eigenvalues"] == pytest.approx(expected, abs=1e-3 * abs(expected[0]))
        assert fields["trace_eigs"] == pytest.approx(sum(fields["eigenvalues"]))
        assert fields["tic"] == pytest.approx(fields["tr_c"] / fields["trace_eigs"])
        assert fields["tic_trace"] == fields["c_over_f"] == fields["tr_c"] / fields["tr_f"]
        assert fields["epsilon_min"] == min(filter(None, fields["epsilon"]))
        assert len(fields["epsilon"]) == 10
    loss = F.cross_entropy(model(x), y).item()
    assert [line[40] for line in found["line"]["loss"]] == pytest.approx([loss] * 10)
    assert found["line"]["epsilon"] == pytest.approx(np.arange(-40, 41) / 100)
    assert (found["density"]["probes"], len(found["density"]["grid"])) == (3, 256)
    stages = []

    @contextlib.contextmanager
    def stage(name):
        stages.append(name)
        yield
    power = flatness.measure(model, x, y, 2, "power", stage=stage)
    assert power["eigenvalues"][0] == pytest.approx(found["eigenvalues"][0], rel=0.01)
    assert len(stages) == len(set(stages)) == 7


@needs_gpu
def test_every_measure_on_cuda_is_the_cpus(small):
    model, x, y, _ = small
    cpu = flatness.measure(model, x, y, num_eigs=5)
    cuda = flatness.measure(copy.deepcopy(model).cuda(), x.cuda(), y.cuda(), num_eigs=5)
    for ours, theirs in ((cpu, cuda), (cpu["adaptive"], cuda["adaptive"])):
        for name in FIELDS - {"residuals", "eig_products"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-8)
    for name in ("grid", "density"):
        assert cuda["density"][name] == pytest.approx(cpu["density"][name], rel=1e-5, abs=1e-8)


def test_pairs_that_were_asked_for_and_not_found_have_not_converged():
    flat = {"eigs": 4, "parameters": 9, "eigenvalues": [3.0, 2.0], "converged": [True, False],
            "images": 8, "adaptive": {"converged": []}}
    assert appendix_figures.share_converged(flat, "trace_eigs") == 0.25
    assert appendix_figures.share_converged(flat, "epsilon_min") == 0.25
    assert appendix_figures.share_converged(flat, "top") == 1
    assert appendix_figures.share_converged(flat, "trace") == 1
    assert appendix_figures.share_converged(flat, "adaptive_top") == 0
    assert appendix_figures.share_converged(flat | {"parameters": 2}, "trace_eigs") == 0.5
    assert appendix_figures.measure_of(flat, "top") == 3
    assert not appendix_figures.measure_of(flat, "adaptive_top")
    whole = flat | {"converged": [True] * 4, "eigenvalues": [1.0] * 4}
    assert appendix_figures.describe_flatness([whole, flat], 4) == (
        "2 eigenpairs (4 asked), 62.5% converged, on 8 test images")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_live_part_has_every_row_of_the_hessian_that_is_not_0(name):
    model, (x, y) = small_network(name, True), images_and_labels(2)
    live, places = appendix_figures.live_part(model)
    whole, part = full_hessian(model, x, y), full_hessian(live, x, y)
    assert len(places) < len(whole)
    assert torch.equal(flatness.flat(live.parameters()), flatness.flat(model.parameters())[places])
    assert torch.allclose(whole[places][:, places], part, atol=1e-12)
    whole[places[:, None], places] = 0
    assert not whole.any()
    model.prunable[0].mask[0] = False  # its batch norm stays
    model.prunable[0].bn_mask[0] = True
    same, places = appendix_figures.live_part(model)
    assert same is model and torch.equal(places, torch.arange(len(whole)))


@pytest.fixture
def trained(run, directory):
    """A finished run on the tiny data, two of whose layers were pruned; epoch 2 of 3 was kept."""
    more = "--epochs 3 --save-epoch 2 --target S --s 0x2 --e 1x2 --p 0.5x2 --r 1".split()
    assert run(*more) == 0
    return directory(*more)


def test_a_run_s_flatness_is_measured_once_for_each_setting(trained, capsys, monkeypatch):
    monkeypatch.setattr(flatness, "DIRECTIONS", 1)
    command = ["--flatness", str(trained), "--eigs", "2", "--images", "8"]
    path = trained / "flatness.json"
    assert analyze.main(command) == 0
    first, found = path.read_bytes(), json.loads(path.read_text())
    assert (found["checkpoint"], found["epoch"], found["images"]) == ("epoch2.pt", 2, 8)
    assert FIELDS <= set(found) and found["trace_exact"] and FIELDS <= set(found["adaptive"])
    log = [json.loads(line) for line in (trained / "epochs.jsonl").read_text().splitlines()]
    assert found["parameters"] == log[1]["parameters"] < log[0]["parameters"]
    assert found["line"]["loss"][0][40] == pytest.approx(found["loss"], rel=1e-5)
    capsys.readouterr()
    assert analyze.main(command) == 0
    assert "measured already" in capsys.readouterr().out and path.read_bytes() == first
    assert analyze.main([*command, "--images", "4", "--split", "train"]) == 0
    other = json.loads((trained / "flatness-train.json").read_text())
    assert (other["images"], other["split"]) == (4, "train") and other["loss"] != found["loss"]
    assert "flat" in analyze.read_flatness(trained, "test", None, 8)
    problem = analyze.read_flatness(trained, "test", None, 16)["problem"]
    assert "8 images, not 16" in problem and "measure it again" in problem


def test_a_run_finds_its_own_data_from_another_folder(tiny, run, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    more = ("--dataset", tiny.name, "--epochs", 1, "--lrs")
    assert run(*more) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, data, _ = appendix_figures.load_network(directory(*more))
    assert len(data["test"][1]) == 64
    tiny.rename(tmp_path / "moved.npz")
    train.load_arrays.cache_clear()
    with pytest.raises(UserError, match=str(tiny)):
        appendix_figures.load_network(directory(*more))
