"""Flatness: every measure against its definition, a closed form, or the full Hessian of a network that small."""
import argparse
import contextlib
import copy
import json
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import needs_gpu, tiny_model
from torch.func import functional_call

import analyze
import train
from gst_ext import flatness, ops


def operator(values, seed=0):
    """A symmetric matrix with these eigenvalues, as product, and random vectors for it: (matrix, product, draw)."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    matrix = q * torch.tensor(values, dtype=torch.float64) @ q.T
    return matrix, lambda v: matrix @ v, lambda: torch.randn(n, generator=generator, dtype=torch.float64)


def softmax_regression(classes=3, features=4, images=40):
    """A linear softmax in float64 at random weights; its Hessian is the mean of (diag p - pp') ⊗ zz', z = (x, 1)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, classes)).double()
    x, y = torch.randn(images, features, dtype=torch.float64), torch.arange(images) % classes
    return model, x, y


def closed_form_hessian(model, x):
    p = model(x).softmax(1).detach()
    z = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("icd,ij,ik->cjdk", curvature, z, z) / len(x)  # parameters as (class, feature or bias)
    classes, features = p.shape[1], x.shape[1]
    index = torch.arange(classes * (features + 1)).view(classes, features + 1)
    order = torch.cat([index[:, :features].flatten(), index[:, features]])  # weights, then biases
    return hessian.reshape(len(order), len(order))[order][:, order]


def by_magnitude(values):
    return values[np.argsort(-np.abs(values))]


@pytest.fixture(scope="module")
def small():
    """A convolutional network of 1,092 parameters in float64 with a pruned filter, its images, and its full Hessian."""
    model = tiny_model("vgg11", width=0.01).double().eval()
    with torch.no_grad():
        block = model.prunable[-1]
        for tensor in (block.conv.weight, block.conv.bias, block.bn.weight, block.bn.bias, block.mask, block.bn_mask):
            tensor[1] = 0
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(9, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(9) % 4
    params = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def loss(vector):
        pieces = (v.view(p.shape) for v, p in zip(vector.split(sizes), params.values()))
        return F.cross_entropy(functional_call(model, dict(zip(params, pieces)), (x,)), y)
    vector = torch.cat([p.reshape(-1) for p in params.values()])
    return model, x, y, torch.func.hessian(loss)(vector).numpy()


def sample_norms(model, x, labels, scale=None):
    """Squared norms of single images' gradients, each entry times its scale, one backward pass each."""
    gradients = (flatness.flat(torch.autograd.grad(F.cross_entropy(model(image[None]), label[None]),
                                                   list(model.parameters()))) for image, label in zip(x, labels))
    return [float((g if scale is None else scale * g).square().sum()) for g in gradients]


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_eigenpairs_of_softmax_regression_are_those_of_the_closed_form(method):
    model, x, y = softmax_regression()
    hessian = closed_form_hessian(model, x)
    k = 15 if method == "lanczos" else 2
    found = flatness.hessian_eigs(model, x, y, k, method, tol=1e-12 if method == "lanczos" else 0.1)
    expected = by_magnitude(np.linalg.eigvalsh(hessian))[:k]
    assert found["eigenvalues"] == pytest.approx(expected, abs=1e-10 if method == "lanczos" else 1e-3 * expected[0])
    for value, v, residual in zip(found["eigenvalues"], found["eigenvectors"], found["residuals"]):
        assert residual == pytest.approx(float((hessian @ v - value * v).norm()), abs=1e-14)
    v = found["eigenvectors"]
    assert torch.allclose(v @ v.T, torch.eye(k, dtype=v.dtype), atol=1e-10 if method == "lanczos" else 1e-2)


def test_a_network_smaller_than_the_number_asked_for_gives_all_its_eigenvalues():
    model, x, y = softmax_regression()
    found = flatness.hessian_eigs(model, x, y, 100)
    assert len(found["eigenvalues"]) == 15 and found["converged"].all()
    trace = float(closed_form_hessian(model, x).trace())
    assert found["eigenvalues"].sum() == pytest.approx(trace, rel=1e-10)
    assert flatness.hessian_trace(model, x, y) == (pytest.approx(trace, rel=1e-10), 0.0)


def test_leading_eigenpairs_of_a_pruned_convolutional_network(small):
    model, x, y, hessian = small
    expected = by_magnitude(np.linalg.eigvalsh(hessian))
    assert expected[:20].min() < 0 and (np.abs(hessian).sum(0) == 0).sum() > 40  # negative ones; pruned parameters
    found = flatness.hessian_eigs(model, x, y, 20, tol=1e-9)
    assert found["converged"].all() and found["residuals"].max() < 1e-9 * abs(expected[0])
    assert found["eigenvalues"] == pytest.approx(expected[:20], rel=1e-6)


def test_the_usual_tolerance_holds_for_every_pair_and_the_sum(small):
    model, x, y, hessian = small
    expected = by_magnitude(np.linalg.eigvalsh(hessian))
    found = flatness.hessian_eigs(model, x, y, 20)
    v = found["eigenvectors"].numpy()
    residuals = np.linalg.norm(v @ hessian - found["eigenvalues"][:, None] * v, axis=1)
    assert found["residuals"] == pytest.approx(residuals, abs=1e-12 * abs(expected[0]))
    assert residuals.max() <= 1e-3 * abs(expected[0]) and found["converged"].all()
    assert np.abs(found["eigenvalues"] - expected[:20]).max() <= 1e-3 * abs(expected[0])


def test_products_do_not_depend_on_the_memory_they_get_and_are_counted(small):
    model, x, y, hessian = small
    v = torch.randn(len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert len(flatness.in_chunks(model, x, y, 1e-4)) > 1 == len(flatness.in_chunks(model, x, y, 4))
    ticks = []
    for memory in (4, 1e-4):
        product = flatness.hessian_product(model, x, y, memory, lambda: ticks.append(memory))
        for _ in range(2):
            assert product(v).numpy() == pytest.approx(hessian @ v.numpy(), abs=1e-12 * np.abs(hessian).max())
        assert product.products == ticks.count(memory) == 2
    ticks.clear()
    found = flatness.hessian_eigs(model, x, y, 5, tick=lambda: ticks.append(0))
    assert found["products"] == len(ticks) > 20


@pytest.mark.parametrize("values, k", [
    ([5, 5, 5, -3, -3, 1] + [0] * 34, 8),  # multiple, and fewer than k that are not 0
    (list(np.repeat(np.arange(30, 0, -1.0), 3)), 10),  # every one three times: a chain of its own for each copy
    ([9, -9 + 1e-9, 9 - 1e-9] + list(np.linspace(-1, 1, 60)), 3),  # a cluster and its mirror image
    ([0] * 12, 4), (list(np.linspace(-1, 1, 30)), 30)])
def test_multiple_zero_and_all_eigenvalues(values, k):
    matrix, product, draw = operator(values)
    found, vectors = flatness.lanczos(product, len(values), k, 1e-10, draw)
    assert np.abs(found) == pytest.approx(np.abs(by_magnitude(np.array(values, float)))[:k], abs=1e-8)
    assert torch.allclose(vectors @ matrix, torch.from_numpy(found)[:, None] * vectors, atol=1e-8)
    assert torch.allclose(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), atol=1e-8)


def test_lanczos_restarts_within_the_memory_of_its_vectors():
    # the end of this spectrum is a cluster that 20 vectors do not resolve to 1e-6: restarts have to
    values = list(np.concatenate([1 + 0.004 * np.arange(8), np.linspace(-0.9, 0.99, 1000)]))
    matrix, product, draw = operator(values)
    counted = []
    found, vectors = flatness.lanczos(lambda v: counted.append(0) or product(v), len(values), 8, 1e-6, draw)
    assert found == pytest.approx(by_magnitude(np.array(values))[:8], abs=1e-6)
    assert torch.allclose(vectors @ matrix, torch.from_numpy(found)[:, None] * vectors, atol=1e-5)
    assert 20 + flatness.PROBE < len(counted) < 10 * 8 + 220


@pytest.mark.parametrize("classes", [2, 5])
def test_copies_of_an_eigenvalue_and_an_exact_null_space(classes):
    # at weights of 0, H = (I - 11'/c) / c ⊗ E[zz']: every eigenvalue is there c - 1 times, most are 0
    model, images = nn.Linear(200, classes).double(), 3
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    x = torch.zeros(images, 200, dtype=torch.float64)
    x[range(images), range(images)] = 4 * torch.arange(1.0, images + 1).double()
    z = np.c_[x.numpy(), np.ones(images)]
    expected = by_magnitude(np.linalg.eigvalsh(z @ z.T / images / classes))
    expected = np.r_[np.repeat(expected, classes - 1), np.zeros(2)]
    found = flatness.hessian_eigs(model, x, torch.zeros(images, dtype=torch.int64), len(expected))
    assert found["eigenvalues"] == pytest.approx(expected, abs=1e-9) and found["converged"].all()
    again = flatness.hessian_eigs(model, x, torch.zeros(images, dtype=torch.int64), len(expected))
    assert found["products"] == again["products"]


def test_a_hessian_of_zeros_has_eigenvalues_of_zero():
    model = nn.Linear(200, 1)  # a single class is always right
    found = flatness.hessian_eigs(model, torch.randn(3, 200), torch.zeros(3, dtype=torch.int64), 4)
    assert not found["eigenvalues"].any() and found["converged"].tolist() == [True] * 4
    assert torch.equal(found["eigenvectors"] @ found["eigenvectors"].T, torch.eye(4))


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_no_pair_is_called_converged_that_is_not_an_eigenpair(method, monkeypatch):
    # eigenvalues 1e-4 apart at a tolerance of 1e-7: both methods run out of products
    values = list(np.concatenate([1 + 1e-4 * np.arange(40), np.linspace(-0.9, 0.9, 1000), [3.0]]))
    matrix, product, _ = operator(values)

    def counted(v, scale):
        counted.products += 1
        return product(v)
    counted.products = 0
    monkeypatch.setattr(flatness, "hessian_product", lambda *arguments: counted)
    model = nn.Linear(len(values), 1, bias=False).double()
    found = flatness.hessian_eigs(model, None, None, 8, method, tol=1e-7)
    vectors, size = found["eigenvectors"], max(values)
    residuals = (vectors @ matrix - torch.from_numpy(found["eigenvalues"])[:, None] * vectors).norm(dim=1).numpy()
    assert (found["converged"] == (residuals <= 1e-7 * size)).all()
    distances = np.abs(found["eigenvalues"][:, None] - np.array(values)).min(1)
    assert (distances[found["converged"]] <= 1e-7 * size).all()
    if method == "lanczos":  # what has not converged is left out
        assert 1 <= len(found["eigenvalues"]) < 8 and found["converged"].all()
        assert found["eigenvalues"][0] == pytest.approx(3)
    else:
        assert len(found["eigenvalues"]) == 8 and not found["converged"].all()


def test_power_method_stops_as_the_paper_s_and_needs_more_products_than_lanczos():
    values = [16, -8, 4, 2, 1] + [0.01] * 20
    _, product, draw = operator(values)
    counted = []
    found, _ = flatness.power_method(lambda v: counted.append(0) or product(v), 25, 4, draw)
    assert found == pytest.approx(values[:4], rel=1e-3)
    assert len(counted) < 4 * 20  # halved errors: well below 100 steps each
    _, product, draw = operator([1, 0.999, 0.998] + [0.5] * 5)
    counted.clear()
    flatness.power_method(lambda v: counted.append(0) or product(v), 8, 1, draw, residual=1e-4)
    assert len(counted) == 1000  # ratios of 0.999 take thousands


def test_power_method_at_a_residual_goes_on_until_it_is_reached():
    matrix, product, draw = operator([10, 9, -8, 7, 1, 0])
    values, vectors = flatness.power_method(product, 6, 3, draw, residual=1e-4)
    assert values == pytest.approx([10, 9, -8], abs=1e-3)
    residual = (vectors @ matrix - torch.from_numpy(values)[:, None] * vectors).norm(dim=1)
    assert 1e-9 < residual.max() < 2e-3


def test_trace_is_within_its_error_which_is_honest(small):
    model, x, y, hessian = small
    estimates = np.array([flatness.hessian_trace(model, x, y, products=18, seed=seed) for seed in range(20)])
    scores = (estimates[:, 0] - np.trace(hessian)) / estimates[:, 1]
    assert np.abs(scores).mean() < 1.5  # 0.8 for a normal, 0.87 for Student's t of 7
    spread = estimates[:, 0].std(ddof=1)
    assert spread / 1.6 < math.sqrt((estimates[:, 1] ** 2).mean()) < 1.6 * spread
    estimate, error = flatness.hessian_trace(model, x, y)
    assert abs(estimate - np.trace(hessian)) < 3 * error + 1e-9 and error < np.abs(scores).mean() * spread


@pytest.mark.parametrize("name, keeps_bn", [("vgg11", False), ("vgg11", True), ("resnet18", False), ("resnet18", None),
                                            ("resnet20", True), ("vgg19", None), ("resnet56", None)])
def test_covariance_and_fisher_traces_are_their_definitions_plain_and_adaptive(name, keeps_bn):
    model = tiny_model(name, width=0.05).double().eval()
    for block in model.prunable[::3] if keeps_bn is not None else ():
        block.mask[0], block.bn_mask[0] = False, keeps_bn
        with torch.no_grad():
            block.conv.weight[1:] *= 1.5  # a masked filter's weights need not be 0 for this
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(3) % 4
    p = model(x).softmax(1).detach()
    for scale in (None, flatness.weight_scale(model)):
        for memory in (4, 1e-3):
            trace = flatness.gradient_covariance_trace(model, x, y, memory, scale)
            assert trace == pytest.approx(np.mean(sample_norms(model, x, y, scale)), rel=1e-10)
        expected = sum(p[:, c].numpy() @ sample_norms(model, x, torch.full((3,), c), scale) for c in range(4)) / 3
        assert flatness.fisher_trace(model, x, y, scale=scale) == (pytest.approx(expected, rel=1e-10), 0)


@pytest.mark.parametrize("c_in, c_out, size, kernel, stride, padding", [
    (3, 4, (9, 7), (3, 3), (1, 1), (1, 1)), (4, 5, (12, 12), (3, 3), (2, 2), (1, 1)),  # by patches
    (40, 50, (4, 3), (3, 3), (2, 2), (1, 1)), (60, 90, (4, 5), (3, 2), (1, 2), (2, 0)),  # by products of positions
    (90, 120, (2, 2), (1, 1), (2, 2), (0, 0)), (60, 60, (2, 2), (3, 3), (1, 1), (1, 1))])
def test_kernel_norms_are_those_of_each_image_s_gradient(c_in, c_out, size, kernel, stride, padding, monkeypatch):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, c_in, *size, dtype=torch.float64, generator=generator)
    weight = torch.randn(c_out, c_in, *kernel, dtype=torch.float64, generator=generator).requires_grad_()
    output = F.conv2d(x, weight, stride=stride, padding=padding)
    g = torch.randn(output.shape, dtype=torch.float64, generator=generator)
    expected = [float(torch.autograd.grad((output[i] * g[i]).sum(), weight, retain_graph=True)[0].square().sum())
                for i in range(3)]
    for layout in (torch.contiguous_format, torch.channels_last):
        found = flatness.kernel_norms(x.contiguous(memory_format=layout), g.contiguous(memory_format=layout), kernel,
                                     stride, padding)
        assert found.tolist() == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr(flatness, "ENTRIES", 2 * weight.numel())  # two images at a time
    factor = torch.rand(c_out, weight[0].numel(), dtype=torch.float64, generator=generator)
    expected = [float((factor.view_as(weight) * torch.autograd.grad(
        (output[i] * g[i]).sum(), weight, retain_graph=True)[0]).square().sum()) for i in range(3)]
    found = flatness.scaled_kernel_norms(x, g, factor, kernel, stride, padding)
    assert found.tolist() == pytest.approx(expected, rel=1e-10)


def test_fisher_trace_of_softmax_regression_is_the_trace_of_its_hessian_and_drawn_labels_estimate_it():
    model, x, y = softmax_regression(classes=4)
    trace = float(closed_form_hessian(model, x).trace())
    assert flatness.fisher_trace(model, x, y)[0] == pytest.approx(trace, rel=1e-10)
    model, x, y = softmax_regression(classes=15, images=60)
    exact = float(closed_form_hessian(model, x).trace())
    drawn = np.array([flatness.fisher_trace(model, x, y, seed=seed) for seed in range(40)])
    scores = (drawn[:, 0] - exact) / drawn[:, 1]
    assert abs(scores.mean()) < 0.6 and 0.7 < scores.std() < 1.4


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


class Hidden(Once):
    """The same with one that autograd does not see into."""

    @staticmethod
    def backward(ctx, g):
        return (2 * ctx.saved_tensors[0] * g).detach()


class Skewed(Once):
    """The same with one whose own derivative is another function's."""

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        return 2 * x * g + (x.roll(1, 1) - x.roll(1, 1).detach()) * g


class Squared(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [Once.apply, Hidden.apply])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_layers_without_second_derivatives_are_refused_wherever_they_are(function, place):
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    layers = [nn.Linear(5, 4), nn.Linear(4, 3)]
    layers.insert(place, Squared(function))
    model = nn.Sequential(*layers)
    measured = [flatness.hessian_product, flatness.hessian_eigs, flatness.hessian_trace, flatness.spectral_density]
    if place == 0:  # no parameter lies before it, so nothing is missing
        assert flatness.hessian_eigs(model, x, y, 2)["converged"].all()
    else:
        for function in measured:
            with pytest.raises(ValueError, match="plain PyTorch"):
                function(model, x, y)
    layers[place] = Squared(Skewed.apply)
    with pytest.raises(ValueError, match="symmetric") if place else contextlib.nullcontext():
        flatness.hessian_product(nn.Sequential(*layers), x, y)
    layers[place] = Squared(torch.square)
    assert flatness.hessian_eigs(nn.Sequential(*layers), x, y, 2)["converged"].all()


@pytest.mark.skipif(not ops.available, reason="the extension is not built")
@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_the_extension_s_backend_is_refused_and_the_eager_one_is_the_cure(name):
    model, x, y = tiny_model(name).eval(), torch.randn(4, 3, 32, 32), torch.arange(4) % 4
    train.use_backend(model, "ext")
    with pytest.raises(ValueError, match="use_backend"):
        flatness.hessian_eigs(model, x, y, 2)
    with pytest.raises(ValueError, match="use_backend"):
        flatness.gradient_covariance_trace(model, x, y)
    flatness.hessian_product(train.use_backend(model, "eager"), x, y)


def test_parameters_without_second_derivatives_of_their_own_count_as_zeros():
    model, x, y = softmax_regression()
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    found = flatness.hessian_eigs(model, x, y, 17)
    expected = by_magnitude(np.linalg.eigvalsh(closed_form_hessian(model, x)))
    assert found["eigenvalues"] == pytest.approx(np.r_[expected, 0, 0], abs=1e-12)


def every_measure(model, x, y):
    yield lambda: flatness.hessian_eigs(model, x, y, 2)
    yield lambda: flatness.hessian_trace(model, x, y)
    yield lambda: flatness.spectral_density(model, x, y)
    yield lambda: flatness.gradient_covariance_trace(model, x, y)
    yield lambda: flatness.fisher_trace(model, x, y)
    yield lambda: flatness.line_loss(model, x, y, torch.zeros(1))
    yield lambda: flatness.rescaled(model, x, 2)


def test_a_network_in_training_mode_is_refused_and_its_running_statistics_stay():
    model, x, y = tiny_model("vgg11"), torch.randn(4, 3, 32, 32), torch.arange(4) % 4
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (model, nn.Sequential(nn.Dropout(), model)):
        model.eval() if training is not model else model.train()
        for measure in every_measure(training, x, y):
            with pytest.raises(ValueError, match=r"model\.eval"):
                measure()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), Squared(lambda x: F.dropout(x, 0.5, True)))
    with pytest.raises(ValueError, match="dropout is called in training mode"):
        flatness.hessian_product(hidden, x, y)
    model.linear.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"requires_grad_\(True\)"):
        flatness.hessian_product(model.eval(), x, y)


@pytest.mark.parametrize("layers", [
    (nn.Conv2d(3, 6, 3, groups=3),), (nn.Conv2d(3, 6, 3, dilation=2),), (nn.Conv2d(3, 6, 3, padding="same"),),
    (nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)), (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),)])
def test_layers_whose_images_gradients_are_not_known_are_refused(layers):
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
    x, y = torch.randn(5, 3, 8, 8), torch.arange(5) % 3
    with pytest.raises(ValueError, match="per-sample gradients"):
        flatness.gradient_covariance_trace(model, x, y)


def test_a_parameter_used_twice_or_outside_its_layer_is_refused():
    class Tied(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.first, self.twice = nn.Linear(4, 4), twice

        def forward(self, x):
            x = self.first(x)
            return self.first(x) if self.twice else x + self.first.weight.sum(1)
    x, y = torch.randn(5, 4), torch.arange(5) % 4
    with pytest.raises(ValueError, match="cover 40 of 20"):
        flatness.gradient_covariance_trace(Tied(True), x, y)
    with pytest.raises(ValueError, match="outside its layer"):
        flatness.gradient_covariance_trace(Tied(False), x, y)


def test_other_networks_of_plain_layers_are_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4, affine=False),
                          nn.Tanh(), nn.Conv2d(4, 5, (1, 3)), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(40, 6),
                          nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double().eval()
    x, y = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    with torch.no_grad():
        model[1].running_mean.uniform_(), model[4].running_var.uniform_(0.5, 2)
    for scale in (None, flatness.weight_scale(model)):
        assert flatness.gradient_covariance_trace(model, x, y, scale=scale) == pytest.approx(
            np.mean(sample_norms(model, x, y, scale)), rel=1e-10)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    product, params = flatness.hessian_product(model, x, y)(v), list(model.parameters())
    gradient = flatness.flat(torch.autograd.grad(F.cross_entropy(model(x), y), params, create_graph=True))
    expected = flatness.flat(torch.autograd.grad(gradient, params, v, materialize_grads=True))
    assert torch.allclose(product, expected, rtol=1e-9, atol=1e-12)


def test_the_rise_is_the_first_crossing_of_a_fine_grid(small):
    model, x, y, hessian = small
    direction = torch.from_numpy(np.linalg.eigh(hessian)[1][:, -1].copy())
    loss = flatness.line_loss(model, x, y, direction)
    epsilon = flatness.loss_rise_epsilon(model, x, y, direction)
    grid = [i * epsilon / 100 for i in range(-100, 101)]
    assert max(loss(e) for e in grid) == pytest.approx(loss(0.0) + 0.1, abs=1e-8)
    assert min(abs(e) for e in grid if loss(e) > loss(0.0) + 0.1 - 1e-8) == pytest.approx(epsilon)
    pieces = direction.split([p.numel() for p in model.parameters()])
    with torch.no_grad():  # the same by moving the parameters themselves
        for p, piece in zip(model.parameters(), pieces):
            p += 0.03 * piece.view(p.shape)
        moved = float(F.cross_entropy(model(x), y))
        for p, piece in zip(model.parameters(), pieces):
            p -= 0.03 * piece.view(p.shape)
    assert loss(0.03) == pytest.approx(moved, rel=1e-12)


def test_rises_of_functions_known_in_closed_form():
    assert flatness.first_rise(lambda e: 2 + 5 * e**2, 0.1) == pytest.approx(math.sqrt(0.02), rel=1e-9)
    assert flatness.first_rise(lambda e: 2 - 0.05 * e, 0.1) == pytest.approx(2, rel=1e-9)  # the negative side
    assert flatness.first_rise(lambda e: math.sin(20 * e), 0.5) == pytest.approx(math.asin(0.5) / 20, rel=1e-9)
    assert flatness.first_rise(lambda e: 0.0, 0.1) is None
    assert flatness.first_rise(lambda e: e if e < 0.05 else math.nan, 0.1) == pytest.approx(0.05)


def test_adaptive_eigenpairs_and_trace_are_those_of_the_scaled_hessian(small):
    model, x, y, hessian = small
    scale = flatness.weight_scale(model)
    assert torch.equal(scale, torch.cat([p.detach().abs().flatten() for p in model.parameters()]))
    scaled = scale.numpy()[:, None] * hessian * scale.numpy()
    found = flatness.hessian_eigs(model, x, y, 8, tol=1e-9, scale=scale)
    assert found["eigenvalues"] == pytest.approx(by_magnitude(np.linalg.eigvalsh(scaled))[:8], rel=1e-6)
    assert found["converged"].all()
    trace, error = flatness.hessian_trace(model, x, y, scale=scale)
    assert abs(trace - np.trace(scaled)) < 4 * error
    for s, matrix in ((None, hessian), (scale, scaled)):  # the eigenvectors in place of a sketch
        pairs = flatness.hessian_eigs(model, x, y, 15, scale=s)
        drawn = np.array([flatness.hessian_trace(model, x, y, 10, seed, scale=s, eigs=pairs) for seed in range(6)])
        scores = (drawn[:, 0] - np.trace(matrix)) / drawn[:, 1]
        assert abs(scores.mean()) < 1 and np.abs(scores).mean() < 1.6
    one = flatness.hessian_product(model, x, y)
    shared = flatness.hessian_eigs(model, x, y, 3, scale=scale, product=one)
    assert shared["eigenvalues"] == pytest.approx(found["eigenvalues"][:3], rel=1e-2)
    assert shared["products"] == one.products


def conv_before_norm(model):
    """The convolutions that batch norm follows, and that batch norm, found by their places in the modules."""
    modules = list(model.modules())
    return [(a, b) for a, b in zip(modules, modules[1:]) if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)]


def prunable_network(name, pruned):
    model = tiny_model(name, width=0.02).double().eval()
    if pruned:
        for block in model.prunable[::2]:
            train.prune_block(block, torch.tensor([0]))
    generator = torch.Generator().manual_seed(4)
    return model, torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(2)


def leading(model, x, y, adaptive, k=2):
    """What a symmetry must leave alone: eigenvalues, traces, ε."""
    scale = flatness.weight_scale(model) if adaptive else None
    pairs = flatness.hessian_eigs(model, x, y, k, tol=1e-9, scale=scale)
    direction = pairs["eigenvectors"][0] if scale is None else scale * pairs["eigenvectors"][0]
    return [*pairs["eigenvalues"], flatness.hessian_trace(model, x, y, 10, scale=scale, eigs=pairs)[0],
            flatness.gradient_covariance_trace(model, x, y, scale=scale),
            flatness.fisher_trace(model, x, y, scale=scale)[0], flatness.loss_rise_epsilon(model, x, y, direction)]


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
@pytest.mark.parametrize("pruned", [False, True])
def test_adaptive_measures_do_not_change_where_the_function_does_not(name, pruned):
    model, x, y = prunable_network(name, pruned)
    plain, adaptive = leading(model, x, y, False), leading(model, x, y, True)
    twin = flatness.rescaled(model, x, 0.25)
    assert torch.allclose(twin(x), model(x), rtol=1e-10)
    assert leading(twin, x, y, True) == pytest.approx(adaptive, rel=1e-6)
    moved = np.array(leading(twin, x, y, False)) / plain
    assert (np.abs(moved - 1) > 0.05).sum() >= 4
    # ReLU: what one block gives times 3, what the next one makes of it by a third
    twin = flatness.rescaled(model, x, 1)
    first, second = twin.prunable[-2:]
    with torch.no_grad():
        first.bn.weight *= 3
        first.bn.bias *= 3
        second.conv.weight /= 3
    assert torch.allclose(twin(x), model(x), rtol=1e-10)
    assert leading(twin, x, y, True) == pytest.approx(adaptive, rel=1e-6)
    assert leading(twin, x, y, False) != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
@pytest.mark.parametrize("a", [0.5, 2, 3])
def test_rescaling_moves_a_filter_s_block_of_the_hessian_by_the_inverse_square(name, a):
    model, x, y = prunable_network(name, True)
    twin = flatness.rescaled(model, x, a)
    before, after = model(x).detach(), twin(x).detach()
    assert torch.allclose(before, after, rtol=1e-11) and not twin.training
    pairs = list(zip(conv_before_norm(model), conv_before_norm(twin)))
    assert len(pairs) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for (conv, norm), (conv2, norm2) in pairs:
        for one, two, factor in ((conv.weight, conv2.weight, a), (norm.running_mean, norm2.running_mean, a),
                                 (norm.running_var + norm.eps, norm2.running_var + norm2.eps, a * a),
                                 (norm.weight, norm2.weight, 1), (norm.bias, norm2.bias, 1)):
            assert torch.allclose(one * factor, two, rtol=1e-12)
    index = [i for i, (key, _) in enumerate(model.named_parameters()) if key.endswith("conv.weight")][1]
    block = slice(*np.cumsum([0, *(p.numel() for p in model.parameters())])[index:index + 2])

    def of_block(net):  # the largest eigenvalue of one convolution's block
        product = flatness.hessian_product(net, x, y)
        n = block.stop - block.start
        rows = []
        for i in range(n):
            v = torch.zeros(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
            v[block.start + i] = 1
            rows.append(product(v)[block])
        return by_magnitude(np.linalg.eigvalsh(torch.stack(rows).numpy()))[0]
    assert of_block(twin) == pytest.approx(of_block(model) / a**2, rel=1e-8)


def test_a_network_that_rescaling_changes_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(ValueError, match="rescaled filters"):
        flatness.rescaled(model, torch.randn(2, 3, 2, 2), 2)


def smoothed(values, grid, width):
    return np.mean([np.exp(-(grid - v) ** 2 / (2 * width**2)) for v in values], 0) / (width * math.sqrt(2 * math.pi))


def test_the_spectral_density_is_that_of_the_full_spectrum(small):
    model, x, y, hessian = small
    values = np.linalg.eigvalsh(hessian)
    found = flatness.spectral_density(model, x, y, probes=6, steps=40, width=0.02)
    grid, step = found["grid"], found["grid"][1] - found["grid"][0]
    assert found["width"] == pytest.approx(0.02 * (values[-1] - values[0]), rel=1e-3)
    assert found["density"].sum() * step == pytest.approx(1, abs=1e-3)
    expected = smoothed(values, grid, found["width"])
    assert found["density"] == pytest.approx(expected, abs=0.05 * expected.max())
    seen = expected > 1e-3 * expected.max()
    scores = (found["density"] - expected)[seen] / found["se"][seen]
    assert np.abs(scores).mean() < 2


def test_quadrature_is_exact_where_its_steps_reach_every_eigenvalue():
    matrix, product, draw = operator([3, 1, 1, 0, 0, 0, -2])
    start = draw()
    nodes, weights = flatness.quadrature(product, start, 7)
    assert nodes == pytest.approx([-2, 0, 1, 3], abs=1e-7) and weights.sum() == pytest.approx(1)
    q = np.linalg.eigh(matrix.numpy())[1].T @ start.numpy()  # eigenvalues ascend: -2, 0, 0, 0, 1, 1, 3
    parts = [(q[i] ** 2).sum() / (q**2).sum() for i in ([0], [1, 2, 3], [4, 5], [6])]
    assert weights == pytest.approx(parts, abs=1e-7)
    assert len(flatness.quadrature(product, start, 2)[0]) == 2


@needs_gpu
def test_every_measure_on_cuda_is_the_cpus(small):
    model, x, y, _ = small
    cpu, cuda = (flatness.measures(network, x.to(device), y.to(device), eigs=5, samples=6, full=True)
                 for network, device in ((model, "cpu"), (copy.deepcopy(model).cuda(), "cuda")))

    def numbers(found):
        for name, value in found.items():
            if name == "adaptive":
                yield from numbers(value)
            elif name not in ("residuals", "eig_products", "products", "trace_products"):
                value = list(value.values()) if isinstance(value, dict) else value
                yield from np.ravel(np.asarray(value, dtype=object))

    pairs = list(zip(numbers(cpu), numbers(cuda), strict=True))
    assert len(pairs) > 25
    for a, b in pairs:
        assert np.asarray(b, float) == pytest.approx(np.asarray(a, float), rel=1e-5, abs=1e-8, nan_ok=True)


def test_eigenvalues_trace_and_density_are_those_of_another_library():
    import curvlinops
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3
    params = list(model.parameters())
    other = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [(x, y)], check_deterministic=False)
    v = torch.randn(other.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    assert torch.allclose(flatness.hessian_product(model, x, y)(v), other @ v, rtol=1e-9, atol=1e-12)
    values = by_magnitude(scipy.sparse.linalg.eigsh(other.to_scipy(), 6, which="LM", return_eigenvectors=False))
    assert flatness.hessian_eigs(model, x, y, 6, tol=1e-9)["eigenvalues"] == pytest.approx(values, rel=1e-6)
    torch.manual_seed(0)
    theirs = np.array([float(curvlinops.hutchpp_trace(other, 30)) for _ in range(6)])
    trace, error = flatness.hessian_trace(model, x, y, 30)
    assert abs(trace - theirs.mean()) < 4 * math.hypot(error, theirs.std(ddof=1) / math.sqrt(6))
    ends = np.linalg.eigvalsh((other @ torch.eye(len(v), dtype=v.dtype)).numpy())[[0, -1]]
    grid, density = curvlinops.lanczos_approximate_spectrum(other, 20, num_points=256, num_repeats=10, margin=0.1,
                                                            boundaries=tuple(ends), kappa=1.05)
    half = (1 + 0.1) * (ends[1] - ends[0]) / 2  # which it makes 1; its Gaussians' deviation is then this:
    width = half * 2 / 19 / math.sqrt(8 * math.log(1.05))
    found = flatness.spectral_density(model, x, y, 10, 20, float(width / (ends[1] - ends[0])))
    ours = np.interp(grid, found["grid"], found["density"])
    assert ours == pytest.approx(np.asarray(density), abs=0.15 * ours.max())


PLAIN = {"eigenvalues", "residuals", "converged", "eig_products", "trace_eigs", "trace", "trace_se", "trace_products",
         "tr_c", "tr_f", "tr_f_se", "tic", "tic_trace", "c_over_f", "epsilon", "epsilon_min", "line"}


@pytest.fixture
def trained(run, directory, monkeypatch):
    """A finished run on the tiny data whose epoch 2 of 3 was kept, and two of whose layers were pruned; its flatness
    is measured by fewer lines, probes and samples."""
    for name, value in {"LINES": 2, "PROBES": 2, "STEPS": 4, "TRACE_SAMPLES": 4}.items():
        monkeypatch.setattr(flatness, name, value)
    monkeypatch.setattr(flatness, "CONTROL", {"factors": (1, 0.5, 2), "images": 4, "eigs": 1, "samples": 2})
    more = "--epochs 3 --save-epoch 2 --target S --s 0x2 --e 1x2 --p 0.5x2 --r 1".split()
    assert run(*more) == 0
    return directory(*more)


def test_a_run_s_flatness_is_measured_once_for_each_setting(trained, capsys, monkeypatch):
    options = ["--flatness", str(trained), "--eigs", "2", "--images", "8"]
    assert analyze.main(options) == 0
    out, path = capsys.readouterr().out, trained / "flatness.json"
    assert "2 of 2 pairs converged" in out
    first, found = path.read_bytes(), json.loads(path.read_text())
    assert (found["checkpoint"], found["epoch"], found["mode"], found["images"]) == ("epoch2.pt", 2, "eval", 8)

    model, data, _ = analyze.load_network(trained, "data", torch.device("cpu"))
    x, y = train.normalise(data["test"][0][:8], data), data["test"][1][:8]
    assert any(not block.mask.all() for block in model.prunable) and not model.training
    assert found["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    assert found["accuracy"] == pytest.approx(100 * float((model(x).argmax(1) == y).float().mean()))
    assert found["tr_c"] == pytest.approx(np.mean(sample_norms(model, x, y)), rel=1e-4)
    assert found["trace_eigs"] == pytest.approx(sum(found["eigenvalues"]))
    assert found["tic"] == pytest.approx(found["tr_c"] / found["trace_eigs"])
    assert found["tic_trace"] == pytest.approx(found["tr_c"] / found["trace"])
    assert found["c_over_f"] == pytest.approx(found["tr_c"] / found["tr_f"])
    assert len(found["line"]["loss"]) == len(found["epsilon"]) == 2
    assert {len(line) for line in found["line"]["loss"]} == {len(found["line"]["epsilon"])} == {81}
    assert all(line[40] == pytest.approx(found["loss"], rel=1e-5) for line in found["line"]["loss"])
    assert found["epsilon_min"] == min(e for e in found["epsilon"] if e is not None)
    assert len(found["density"]["grid"]) == len(found["density"]["se"]) == 256
    scale, adaptive, keys = flatness.weight_scale(model), found["adaptive"], PLAIN - {"line"}
    assert PLAIN < set(found) and set(adaptive) == keys
    assert adaptive["tr_c"] == pytest.approx(np.mean(sample_norms(model, x, y, scale)), rel=1e-4)
    assert adaptive["tic"] == pytest.approx(adaptive["tr_c"] / sum(adaptive["eigenvalues"]))
    v = flatness.hessian_eigs(model, x, y, 2, scale=scale)["eigenvectors"][0]
    assert adaptive["epsilon"][0] == pytest.approx(flatness.loss_rise_epsilon(model, x, y, scale * v), rel=1e-3)
    assert list(found["control"]) == ["1", "0.5", "2"]
    for control in found["control"].values():
        assert keys < set(control) and set(control["adaptive"]) == keys
        for key in ("trace_eigs", "trace", "tr_c", "tr_f", "epsilon_min"):
            expected = found["control"]["1"]["adaptive"][key]
            assert control["adaptive"][key] == pytest.approx(expected, rel=0.01)
    plain = [found["control"][a]["tr_f"] for a in ("0.5", "1", "2")]
    assert plain[0] > 1.05 * plain[1] > 1.05**2 * plain[2]

    for name, value in {"LINES": 1, "LINE": [0.0], "FAR": 0.1}.items():
        monkeypatch.setattr(flatness, name, value)
    monkeypatch.setitem(flatness.CONTROL, "factors", (1,))
    assert analyze.main(options) == 0
    assert "measured already" in capsys.readouterr().out and path.read_bytes() == first
    for key, value in (("images", 4), ("eigs", 1)):
        assert analyze.main([*options, f"--{key}", str(value)]) == 0
        assert json.loads(path.read_text())[key] == value != found[key]
    assert analyze.main([*options, "--split", "train"]) == 0
    other = json.loads((trained / "flatness-train.json").read_text())
    assert other["split"] == "train" and other["loss"] != found["loss"]
    x, y = train.normalise(data["train"][0][:8], data), data["train"][1][:8]
    assert other["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    path.write_text("{")
    assert analyze.main(options) == 0 and json.loads(path.read_text())["eigenvalues"] == found["eigenvalues"]


def test_without_a_kept_epoch_the_last_one_of_a_finished_run_is_measured(trained):
    (trained / "epoch2.pt").unlink()
    found = analyze.measure_flatness(trained, argparse.Namespace(
        split="test", images=4, eigs=3, eig="lanczos", memory_gb=4, data_dir="data"))
    assert (found["checkpoint"], found["epoch"]) == ("checkpoint.pt", 3)
    assert len(found["line"]["loss"]) == len(found["epsilon"]) == 2 < len(found["eigenvalues"]) == 3


def cut(path):
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize("damage, word", [
    (lambda d: cut(d / "epoch2.pt"), "epoch2.pt is missing or damaged"),
    (lambda d: (d / "epoch2.pt").write_bytes((d / "checkpoint.pt").read_bytes().replace(b"stem", b"stam")), "damaged"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json is missing or damaged"),
    (lambda d: [(d / "epoch2.pt").unlink(), (d / "done.json").unlink()], "is not finished, and has no epoch2.pt"),
    (lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace('"test_x": ', '"test_x": 1')),
     "was trained on other data")])
def test_a_damaged_run_is_one_line(trained, capsys, damage, word):
    damage(trained)
    capsys.readouterr()
    assert analyze.main(["--flatness", str(trained), "--eigs", "2", "--images", "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error
    assert not (trained / "flatness.json").exists()


@pytest.mark.parametrize("wrong, word", [
    (["--eigs", "0"], "--eigs 0"), (["--images", "-3"], "--images -3"), (["--memory-gb", "0"], "--memory-gb 0"),
    (["--memory-gb", "nan"], "--memory-gb nan"), (["--eig", "qr"], "--eig"), (["--images", "1.5"], "--images"),
    (["--images", "65"], "there are 64 test images"), (["--flatness", "nowhere"], "nowhere/config.json")])
def test_bad_options_are_one_line(trained, capsys, wrong, word):
    capsys.readouterr()
    assert analyze.main(["--flatness", str(trained), *wrong]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and word in error


def test_pairs_that_were_asked_for_and_not_found_have_not_converged():
    found = {"eigs": 4, "parameters": 9, "eigenvalues": [3.0, 2.0], "converged": [True, False], "images": 8,
             "adaptive": {"converged": []}}
    assert flatness.share_converged(found, "trace_eigs") == 0.25 and flatness.share_converged(found, "top") == 1
    assert flatness.share_converged(found, "epsilon_min") == 0.25 and flatness.share_converged(found, "trace") == 1
    assert [flatness.share_converged(found, f"adaptive_{name}") for name in ("trace_eigs", "top")] == [0, 0]
    assert flatness.share_converged(found | {"parameters": 2}, "trace_eigs") == 0.5, "there are no more pairs"
    assert flatness.in_words([found | {"converged": [True] * 4, "eigenvalues": [1.0] * 4}, found], 4) == (
        "2 eigenpairs (4 asked), 62.5% converged, on 8 test images")
