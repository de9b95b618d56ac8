"""Flatness: every measure against its definition, a closed form, or the full Hessian of a network that small."""
import json
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.func import functional_call

import analyze
import train
from gst_ext import flatness


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
    model = torch.nn.Sequential(torch.nn.Linear(features, classes)).double()
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


def sample_norms(model, x, labels):
    """Squared norms of single images' gradients, one backward pass each."""
    return [sum(float(g.square().sum()) for g in torch.autograd.grad(
        F.cross_entropy(model(image[None]), label[None]), list(model.parameters()))) for image, label in zip(x, labels)]


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
    route = scipy.sparse.linalg.eigsh(scipy.sparse.linalg.LinearOperator(
        hessian.shape, lambda v: flatness.hessian_product(model, x, y)(torch.from_numpy(v.ravel().copy())).numpy(),
        dtype=np.float64), 20, which="LM", tol=1e-10)[0]
    assert found["eigenvalues"] == pytest.approx(by_magnitude(route), rel=1e-6)


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
    assert len(flatness.in_chunks(model, x, y, 1e-3)) > 1 == len(flatness.in_chunks(model, x, y, 4))
    ticks = []
    for memory in (4, 1e-3):
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


def test_lanczos_goes_on_when_its_vectors_fill_the_memory_meant_for_them():
    # the end of this spectrum is a cluster that the 132 vectors of a chain do not resolve to 1e-6: restarts have to
    values = list(np.concatenate([1 + 0.004 * np.arange(8), np.linspace(-0.9, 0.99, 1000)]))
    matrix, product, draw = operator(values)
    counted = []
    found, _ = flatness.lanczos(lambda v: counted.append(0) or product(v), len(values), 8, 1e-6, draw)
    assert found == pytest.approx(by_magnitude(np.array(values))[:8], abs=1e-6)
    assert 4 * 8 + 100 < len(counted) < 30 * 8 + 200


@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_no_pair_is_called_converged_that_is_not_an_eigenpair(method, monkeypatch):
    # eigenvalues 1e-4 apart at a tolerance of 1e-7: both methods run out of products, and have wrong pairs to tell
    values = list(np.concatenate([1 + 1e-4 * np.arange(40), np.linspace(-0.9, 0.9, 1000), [3.0]]))
    matrix, product, _ = operator(values)

    def counted(v):
        counted.products += 1
        return product(v)
    counted.products = 0
    monkeypatch.setattr(flatness, "hessian_product", lambda *arguments: counted)
    model = torch.nn.Linear(len(values), 1, bias=False).double()
    found = flatness.hessian_eigs(model, None, None, 8, method, tol=1e-7)
    vectors, size = found["eigenvectors"], max(values)
    residuals = (vectors @ matrix - torch.from_numpy(found["eigenvalues"])[:, None] * vectors).norm(dim=1).numpy()
    assert (found["converged"] == (residuals <= 1e-7 * size)).all() and not found["converged"].all()
    distances = np.abs(found["eigenvalues"][:, None] - np.array(values)).min(1)
    assert (distances[found["converged"]] <= 1e-7 * size).all()
    if method == "lanczos":
        assert torch.allclose(vectors @ vectors.T, torch.eye(8, dtype=torch.float64), atol=1e-8)
        assert counted.products > 30 * 8 + 200 and found["converged"][0]


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
    estimates = np.array([flatness.hessian_trace(model, x, y, products=24, seed=seed) for seed in range(40)])
    scores = (estimates[:, 0] - np.trace(hessian)) / estimates[:, 1]
    assert np.abs(scores).mean() < 1.5  # 0.8 for a normal, 0.87 for Student's t of 7
    spread = estimates[:, 0].std(ddof=1)
    assert spread / 1.6 < math.sqrt((estimates[:, 1] ** 2).mean()) < 1.6 * spread
    estimate, error = flatness.hessian_trace(model, x, y)
    assert abs(estimate - np.trace(hessian)) < 3 * error + 1e-9 and error < np.abs(scores).mean() * spread


@pytest.mark.parametrize("name, keeps_bn", [("vgg11", False), ("vgg11", True), ("resnet18", False), ("resnet20", True)])
def test_covariance_and_fisher_traces_are_their_definitions(name, keeps_bn):
    model = tiny_model(name, width=0.05).double().eval()
    for block in model.prunable[::3]:
        block.mask[0], block.bn_mask[0] = False, keeps_bn
        with torch.no_grad():
            block.conv.weight[1:] *= 1.5  # a masked filter's weights need not be 0 for this
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(5) % 4
    for memory in (4, 1e-3):
        trace = flatness.gradient_covariance_trace(model, x, y, memory)
        assert trace == pytest.approx(np.mean(sample_norms(model, x, y)), rel=1e-10)
    p = model(x).softmax(1).detach()
    expected = sum(p[:, c].numpy() @ sample_norms(model, x, torch.full((5,), c)) for c in range(4)) / 5
    assert flatness.fisher_trace(model, x, y) == (pytest.approx(expected, rel=1e-10), 0)


@pytest.mark.parametrize("c_in, c_out, size, kernel, stride, padding", [
    (3, 4, (9, 7), (3, 3), (1, 1), (1, 1)), (4, 5, (12, 12), (3, 3), (2, 2), (1, 1)),  # by patches
    (40, 50, (4, 3), (3, 3), (2, 2), (1, 1)), (60, 90, (4, 5), (3, 2), (1, 2), (2, 0)),  # by products of positions
    (90, 120, (2, 2), (1, 1), (2, 2), (0, 0)), (60, 60, (2, 2), (3, 3), (1, 1), (1, 1))])
def test_kernel_norms_are_those_of_each_image_s_gradient(c_in, c_out, size, kernel, stride, padding):
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


def test_fisher_trace_of_softmax_regression_is_the_trace_of_its_hessian_and_drawn_labels_estimate_it():
    model, x, y = softmax_regression(classes=4)
    trace = float(closed_form_hessian(model, x).trace())
    assert flatness.fisher_trace(model, x, y)[0] == pytest.approx(trace, rel=1e-10)
    model, x, y = softmax_regression(classes=15, images=60)
    exact = float(closed_form_hessian(model, x).trace())
    drawn = np.array([flatness.fisher_trace(model, x, y, seed=seed) for seed in range(40)])
    scores = (drawn[:, 0] - exact) / drawn[:, 1]
    assert abs(scores.mean()) < 0.6 and 0.7 < scores.std() < 1.4


def test_parameters_that_the_layers_do_not_cover_are_refused_and_so_is_batch_norm_in_training():
    model, x, y = softmax_regression()
    model.scale = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="cover 15 of 17"):
        flatness.gradient_covariance_trace(model, x, y)
    with pytest.raises(ValueError, match="eval mode"):
        flatness.mask_factors(tiny_model("vgg11").train(), torch.randn(4, 3, 32, 32))


def test_the_rise_is_the_first_crossing_of_a_fine_grid(small):
    model, x, y, hessian = small
    direction = torch.from_numpy(np.linalg.eigh(hessian)[1][:, -1].copy())
    loss = flatness.line_loss(model, x, y, direction)
    epsilon = flatness.loss_rise_epsilon(model, x, y, direction)
    grid = [i * epsilon / 500 for i in range(-500, 501)]
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


@pytest.fixture
def trained(run, directory, tmp_path):
    """A finished run on the tiny data whose epoch 2 of 3 was kept, and two of whose layers were pruned."""
    more = "--epochs 3 --save-epoch 2 --target S --s 0x2 --e 1x2 --p 0.5x2 --r 1".split()
    assert run(*more) == 0
    return directory(*more)


def test_a_run_s_flatness_is_measured_once_for_each_setting(trained, capsys):
    options = ["--flatness", str(trained), "--eigs", "4", "--images", "16"]
    assert analyze.main(options) == 0
    out, path = capsys.readouterr().out, trained / "flatness.json"
    assert "4 of 4 pairs converged" in out
    first, found = path.read_bytes(), json.loads(path.read_text())
    assert (found["checkpoint"], found["epoch"], found["mode"], found["images"]) == ("epoch2.pt", 2, "eval", 16)

    model, data, _ = analyze.load_network(trained, "data", torch.device("cpu"))
    x, y = train.normalise(data["test"][0][:16], data), data["test"][1][:16]
    assert any(not block.mask.all() for block in model.prunable) and not model.training
    assert found["loss"] == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    assert found["accuracy"] == pytest.approx(100 * float((model(x).argmax(1) == y).float().mean()))
    assert found["tr_c"] == pytest.approx(np.mean(sample_norms(model, x, y)), rel=1e-4)
    assert found["trace_eigs"] == pytest.approx(sum(found["eigenvalues"]))
    assert found["tic"] == pytest.approx(found["tr_c"] / found["trace_eigs"])
    assert found["tic_trace"] == pytest.approx(found["tr_c"] / found["trace"])
    assert found["c_over_f"] == pytest.approx(found["tr_c"] / found["tr_f"])
    assert len(found["line"]["loss"]) == len(found["epsilon"]) == 4
    assert {len(line) for line in found["line"]["loss"]} == {len(found["line"]["epsilon"])} == {81}
    assert all(line[40] == pytest.approx(found["loss"], rel=1e-5) for line in found["line"]["loss"])
    assert found["epsilon_min"] == min(e for e in found["epsilon"] if e is not None)

    assert analyze.main(options) == 0
    assert "measured already" in capsys.readouterr().out and path.read_bytes() == first
    for key, value in (("images", 8), ("eigs", 1), ("eig", "power")):
        assert analyze.main([*options, f"--{key}", str(value)]) == 0
        assert json.loads(path.read_text())[key] == value != found[key]
    path.write_text("{")
    assert analyze.main(options) == 0 and json.loads(path.read_text())["eigenvalues"] == found["eigenvalues"]


def test_without_a_kept_epoch_the_last_one_of_a_finished_run_is_measured(trained):
    (trained / "epoch2.pt").unlink()
    found = analyze.measure_flatness(trained, eigs=11, images=4)
    assert (found["checkpoint"], found["epoch"]) == ("checkpoint.pt", 3)
    assert len(found["line"]["loss"]) == len(found["epsilon"]) == 10


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
