"""gst_ext's masked convolution, bn_act and the fused block, alone and in whole networks."""
import copy
import itertools
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_model, weights, without_seconds
from test_ext import DEVICES

from gst_ext import errors, networks, ops
import train

CHANNELS_LAST = torch.channels_last
LAYOUTS = [torch.contiguous_format, CHANNELS_LAST]
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-11),
             torch.float32: dict(rtol=1e-4, atol=2e-5),
             torch.bfloat16: dict(rtol=4e-2, atol=4e-2)}


def covering(**factors):
    """Cases (dicts) that hold every pair of levels of two factors, fewer than all products."""
    products = list(itertools.product(*(range(len(levels)) for levels in factors.values())))
    random.Random(0).shuffle(products)
    held, cases = set(), []
    for case in products:
        pairs = set(itertools.combinations(enumerate(case), 2))
        if not pairs <= held:
            held |= pairs
            cases.append({k: factors[k][i] for k, i in zip(factors, case)})
    return cases


def draw(seed, *shape, device="cpu", dtype=torch.float64):
    """Standard normal numbers, channels-last if they are a map."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)
    return values.contiguous(memory_format=CHANNELS_LAST) if len(shape) == 4 else values


def index(values, device="cpu"):
    return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)


def fresh(case):
    """Clones of a case's tensors, since statistics are updated in place."""
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in case.items()}


def double(case):
    return {k: v.double() if v is not None and v.is_floating_point() else v
            for k, v in case.items()}


def gradients(function, tensors, grad):
    """function's output and its gradients for those of `tensors` that are not None."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    given = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, given, grad(out))]


def assert_close(got, want, label="", **tolerance):
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m: f"{label} {k}: {m}")


# Masked convolution

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", covering(
    dtype=[torch.float64, torch.float32], layout=LAYOUTS,
    conv=[(1, (5, 7), 3, 1, True), (3, (5, 7), 3, 2, False), (33, (9, 12), 1, 2, False),
          (33, (4, 4), 3, 1, True), (40, (4, 2), 3, 1, False), (2, (1, 1), 3, 1, True)],
    live=[(None, None), ([0, 3, 4, 6], None), ([2], [0, 4]), ([], None), (None, [])]), ids=str)
def test_masked_conv2d_agrees_with_its_reference(device, case):
    (n, size, kernel, stride, bias), dtype = case["conv"], case["dtype"]
    live_out, live_in = (index(live, device) for live in case["live"])
    x = draw(0, n, 5 if live_in is None else len(live_in), *size, device=device)
    tensors = x, draw(1, 7, 5, kernel, kernel, device=device), draw(2, 7, device=device)
    # The reference in float64, since the library is not safe in float32.
    got, want = (gradients(lambda *t: f(*t, live_out, live_in, stride, kernel // 2),
                           [t.to(type_, memory_format=case["layout"]) if t.dim() == 4 else
                            t.to(type_) if bias else None for t in tensors],
                           lambda out: draw(3, *out.shape, device=device).to(type_))
                 for f, type_ in ((ops.masked_conv2d, dtype),
                                  (ops.masked_conv2d_ref, torch.float64)))
    assert_close([t.double() for t in got], want, **TOLERANCE[dtype])
    pruned = torch.ones(7, dtype=torch.bool, device=device)
    pruned[slice(None) if live_out is None else live_out] = False
    assert not got[2][pruned].any()


def whole_numbers(*arguments):
    """Small ones, which Winograd's transforms turn into quarters at the least: no rounding."""
    return draw(*arguments, dtype=torch.float32).mul(2).round()


def winograd_case(n, c_in, c_out, size, live_out=None, live_in=None, draw=whole_numbers):
    """x, weight, live_out, live_in, grad; the live convolution and its gradients in float64."""
    live_out, live_in = (None if r is None else torch.arange(*r) for r in (live_out, live_in))
    x = draw(0, n, c_in if live_in is None else len(live_in), *size)
    weight = draw(1, c_out, c_in, 3, 3)
    grad = draw(2, n, c_out if live_out is None else len(live_out), *size)
    want = gradients(lambda *t: ops.masked_conv2d_ref(*t, None, live_out, live_in, 1, 1),
                     (x.double(), weight.double()), lambda out: grad.double())
    return (x, weight, live_out, live_in, grad), want


def winograd(x, weight, live_out, live_in, grad):
    gst = torch.ops.gst
    filters = [gst.winograd_filters(weight, live_out, live_in, *x.shape[2:], flipped)
               for flipped in (False, True)]
    return [gst.winograd_conv2d(x, filters[0], grad.shape[1], None, None, False),
            gst.winograd_conv2d(grad, filters[1], x.shape[1], None, None, False),
            gst.winograd_weight_gradient(grad, x, weight, live_out, live_in)]


@pytest.mark.parametrize("case", [
    (1, 1, 1, (1, 1)), (3, 5, 7, (2, 2)), (2, 33, 50, (1, 2)), (1, 19, 33, (5, 7)),
    (1, 16, 17, (3, 1)), (9, 70, 90, (2, 2), (1, 90, 2), (3, 70, 4)),
    (1, 70, 90, (6, 3), (40, 41), (0, 70, 3)), (40, 80, 8, (16, 15), (0, 8, 3), (5, 80))], ids=str)
def test_winograd_s_convolution_and_gradients_are_exact_in_whole_numbers(case):
    arguments, want = winograd_case(*case)
    for got, exact in zip(winograd(*arguments), want, strict=True):
        assert torch.equal(got.double(), exact)


def test_winograd_s_convolution_adds_bias_and_shortcut_before_relu_in_any_memory_layout():
    (x, weight, *live, _), (want, *_) = winograd_case(3, 21, 35, (5, 6))
    bias, residual = whole_numbers(3, 35), whole_numbers(4, 3, 35, 5, 6)
    filters = torch.ops.gst.winograd_filters(weight.contiguous(), *live, 5, 6, False)
    convolve = torch.ops.gst.winograd_conv2d
    wide = torch.zeros(3, 42, 6, 5).transpose(2, 3)
    wide[:, ::2] = x
    for given in (x, x.contiguous(), wide[:, ::2]):
        got = convolve(given, filters, 35, bias, residual, True)
        assert torch.equal(got.double(), (want + bias.view(-1, 1, 1) + residual).relu())
    assert convolve(x * torch.nan, filters, 35, bias, residual, True).isnan().all()
    with pytest.raises(RuntimeError, match="do not fit"):
        convolve(x[:, 1:], filters, 35, bias, residual, True)


def with_threads(number, function):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", [
    (64, 256, 256, (2, 2)), (1, 39, 45, (31, 33)), (5, 90, 80, (10, 7), (0, 80, 2), (7, 90, 2))],
    ids=str)
def test_winograd_rounds_as_a_direct_sum_does_for_any_number_of_threads(case):
    arguments, want = winograd_case(*case, draw=lambda *a: draw(*a, dtype=torch.float32))
    got = winograd(*arguments)
    assert all(map(torch.equal, got, with_threads(3, lambda: winograd(*arguments))))
    x, weight, *live, grad = arguments
    served = gradients(lambda *t: ops.masked_conv2d(*t, None, *live, 1, 1), (x, weight),
                       lambda out: grad)
    for a, b, exact in zip(got, served, want, strict=True):
        assert max((a - exact).abs().max(), (b - exact).abs().max()) <= 3e-6 * exact.abs().max()
        assert not a[exact == 0].any() and not b[exact == 0].any()  # a pruned filter's gradient
    if torch.ops.gst.winograd_pays(x, weight, grad.shape[1], 1, 1):
        assert all(map(torch.equal, got, served))


# Matrix products in bf16

@pytest.mark.parametrize("live", [(None, None), ((0, 300, 1), (3, 290, 1))], ids=str)
@pytest.mark.parametrize("size, kernel, stride, padding", [
    ((2, 2), 3, 1, 1), ((4, 3), 3, 1, 1), ((1, 1), 3, 1, 1), ((8, 8), 3, 2, 1), ((8, 7), 3, 1, 1),
    ((4, 4), 2, 2, 0), ((2, 2), 3, 1, 3), ((1, 4), 5, 1, 2), ((9, 6), 3, 3, 1)])
def test_products_in_bf16_are_exact_in_small_whole_numbers(size, kernel, stride, padding, live):
    live_out, live_in = (None if r is None else torch.arange(*r) for r in live)
    bf16 = torch.bfloat16
    x = draw(0, 33, 290 if live_in is None else len(live_in), *size).round().clamp(-1, 1)
    weight = draw(1, 310, 290, kernel, kernel).div(4).round().clamp(-1, 1)  # most are 0
    got, want = (gradients(lambda *t: f(*t, None, live_out, live_in, stride, padding),
                           (x.to(type_), weight.to(type_)),
                           lambda out: draw(2, *out.shape).div(2).round().clamp(-1, 1).to(type_))
                 for f, type_ in ((ops.masked_conv2d, bf16),
                                  (ops.masked_conv2d_ref, torch.float64)))
    for a, exact in zip(got, want, strict=True):
        assert exact.any() and exact.abs().max() <= 256  # which bf16 holds
        assert torch.equal(a.double(), exact)


def test_products_in_bf16_round_once_and_add_a_bias():
    like = dict(dtype=torch.bfloat16)
    tensors = draw(0, 32, 256, 4, 4, **like), draw(1, 270, 256, 3, 3, **like), draw(2, 270, **like)
    for bias in (False, True):
        got, want = (gradients(
            lambda x, w, *b: f(x, w, *(b or [None]), None, None, 1, 1),
            [t.to(type_) for t in tensors[:2 + bias]],
            lambda out: draw(3, *out.shape, **like).to(type_))
            for f, type_ in ((ops.masked_conv2d, torch.bfloat16),
                             (ops.masked_conv2d_ref, torch.float64)))
        for k, (a, exact) in enumerate(zip(got, want, strict=True)):
            roundings = 2 if bias and k == 0 else 1
            bound = roundings * 2 ** -8 * exact.abs() + 1e-4 * exact.abs().max()
            assert ((a.double() - exact).abs() <= bound).all(), k


def test_a_run_in_bf16_has_the_same_bits_again_and_resumed(run, directory, monkeypatch):
    more = ("--model", "vgg11", "--width", 0.15, "--precision", "bf16", "--epochs", 3, "--target",
            "S", "--s", 0, "--e", 1, "--r", 1, "--p", 0.9)
    results = []
    for logs, stop in (("first", None), ("again", None), ("resumed", 1)):
        if stop is not None:
            with monkeypatch.context() as patch:
                original = train.train_epoch
                calls = iter(range(9))
                patch.setattr(train, "train_epoch", lambda *a, **k: original(*a, **k) if next(
                    calls) < stop else (_ for _ in ()).throw(KeyboardInterrupt))
                assert run(*more, logs=logs) == 130
        assert run(*more, logs=logs) == 0
        results.append((without_seconds(directory(*more, logs=logs)),
                        weights(directory(*more, logs=logs))))
    (records, first), *others = results
    for other_records, other in others:
        assert other_records == records
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_cpu_without_instructions_for_bf16_is_told_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr(errors, "WARNED", set())
    for has, precision, lines in ((True, "bf16", 0), (False, "fp32", 0), (False, "bf16", 1)):
        monkeypatch.setattr(ops, "cpu_multiplies_bf16", lambda: has)
        train.setup_device("cpu", precision)
        assert capsys.readouterr().err.count("slower than fp32\n") == lines


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told to keep freed memory")
def test_a_freed_tensor_s_memory_holds_the_next_of_its_size():
    code = """import torch
from gst_ext import ops
ops.keep_freed_memory()
freed, between = torch.empty(1 << 20), torch.empty(1 << 20)
address = freed.data_ptr()
del freed
reused = torch.empty(1 << 20)
assert reused.data_ptr() == address and address % 64 == 0 and torch.empty(0).numel() == 0
try:
    torch.empty(1 << 58)
except RuntimeError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "not enough memory" in done.stdout, done.stderr


# Batch norm, shortcut, ReLU and pool

LEAVES = "x", "weight", "bias", "gamma", "beta", "residual"
RESIDUALS = {"none": None, "direct": None, "nested": [4, 2, 0, 5, 1], "unmapped": [-1] * 5,
             "mixed": [3, -1, 0, -1, 5]}


def bn_case(device, dtype, shape, residual="none", pruned=True, layout=CHANNELS_LAST):
    """bn_act's tensors: up to 5 live channels, of 4 more filters if pruned."""
    n, c, *size = shape
    like, c_out = dict(device=device, dtype=dtype), c + 4 * pruned
    wide = like | dict(dtype=torch.promote_types(dtype, torch.float32))
    case = dict(x=draw(0, *shape, **like), residual=None, residual_map=None)
    if residual != "none":
        case["residual"] = draw(1, n, c if residual == "direct" else 6, *size, **like)
        case["residual_map"] = RESIDUALS[residual] and index(RESIDUALS[residual][:c], device)
    for i, name in enumerate(("gamma", "beta", "running_mean", "running_var")):
        case[name] = draw(2 + i, c_out, **wide)
    case["running_var"] = case["running_var"].abs() + 0.1
    case["act"] = draw(6, c_out, device=device, dtype=torch.float32).abs()
    case["live"] = index([0, 1, 4, 5, 8][:c], device) if pruned else None
    return {k: v.contiguous(memory_format=layout) if v is not None and v.dim() == 4 else v
            for k, v in case.items()}


def run(function, case, grad=None, **options):
    """Out, running_mean, running_var, act, and the gradients of those of LEAVES there are."""
    case = fresh(case)
    leaves = [case[k].requires_grad_() for k in LEAVES if case.get(k) is not None]
    out = function(**case, **options)
    if grad is None:
        grad = draw(9, *out.shape, device=out.device, dtype=out.dtype)
    return [out.detach(), *(case[k] for k in ("running_mean", "running_var", "act")),
            *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("case", covering(
    dtype=list(TOLERANCE), layout=LAYOUTS, pruned=[False, True], training=[False, True],
    relu=[False, True], pool=[False, True], residual=list(RESIDUALS), shape=[
        (3, 5, 7, 9), (1, 5, 5, 3), (2, 1, 2, 2), (70, 5, 4, 2), (64, 5, 16, 18)]), ids=str)
def test_bn_act_agrees_with_its_reference(device, case):
    dtype, options = case["dtype"], {k: case[k] for k in ("training", "relu", "pool")}
    tensors = bn_case(device, dtype, case["shape"], case["residual"], case["pruned"],
                      case["layout"])
    got, want = (run(f, tensors, **options) for f in (ops.bn_act, ops.bn_act_ref))
    again = with_threads(2, lambda: run(ops.bn_act, tensors, **options))
    assert all(map(torch.equal, got, again))
    assert got[0].is_contiguous(memory_format=CHANNELS_LAST)
    if dtype != torch.float64 and (case["relu"] or case["pool"]):
        got, want = got[:4], want[:4]  # rounding may flip what ReLU or the pool lets through
    assert_close([got.pop(3)], [want.pop(3)], "act", rtol=4e-3, atol=2e-5)  # float32
    assert_close(got, want, **TOLERANCE[dtype])


def test_bn_act_keeps_its_digits_far_from_zero(device):
    case = bn_case(device, torch.float32, (64, 5, 16, 16))
    case["x"] += 100
    want, got = ops.bn_act_ref(**double(case)), ops.bn_act(**case).double()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [False, True])
def test_of_zero_equal_values_and_nan_relu_and_pool_pass_what_pytorch_s_do(device, dtype, pool):
    values = torch.tensor([0.0, 1.0, -1.0, -0.0, torch.nan], dtype=dtype, device=device)
    windows = torch.cartesian_prod(*[values] * 4).view(25, 25, 2, 2)
    x = windows.transpose(1, 2).reshape(1, 1, 50, 50).repeat(2, 3, 1, 1)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)
    functions = (lambda x: ops.bn_act(x, one, zero, zero, one, training=False, eps=0.0, pool=pool),
                 lambda x: F.max_pool2d(F.relu(x), 2) if pool else F.relu(x))
    got, want = (gradients(f, [x], lambda out: draw(0, *out.shape, device=device, dtype=dtype))
                 for f in functions)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    number = ~x.isnan()  # elsewhere the gradient is NaN too
    assert torch.equal(got[1][number], want[1][number])
    assert got[1][number].any() and got[0].isnan().any()


def test_bn_act_of_a_layer_without_live_filters_only_lets_its_statistics_decay(device):
    case = bn_case(device, torch.float32, (4, 0, 3, 3), "direct")
    out, *statistics = run(ops.bn_act, case)[:4]
    assert out.shape == (4, 0, 3, 3)
    assert_close(statistics, [0.9 * case[k] for k in ("running_mean", "running_var", "act")])


NOT_FINITE = [(name, value) for name in ("x", "gamma", "beta", "running_mean", "running_var",
                                         "residual")
              for value in (torch.nan, torch.inf, -torch.inf)
              if (name, value) != ("running_var", -torch.inf)]


@pytest.mark.parametrize("residual, pool", [("none", False), ("none", True), ("direct", False),
                                            ("mixed", False)])
def test_bn_act_passes_on_what_is_not_finite_as_its_reference_does(device, residual, pool):
    for (name, value), training, relu, place in itertools.product(
            NOT_FINITE, (False, True), (False, True), (0, 4)):  # sums start from the first value
        case = bn_case(device, torch.float32, (3, 5, 4, 6), residual)
        if case[name] is None:
            continue
        case[name][(0, place, 0, 0) if case[name].dim() == 4 else place] = value
        # The reference on the CPU: max_pool2d's channels-last kernel of CUDA (PyTorch 2.11) sends
        # the gradients of all windows of -infinity to the map's first pixel.
        on_cpu = {k: v if v is None else v.cpu() for k, v in case.items()}
        got, want = (run(f, c, training=training, relu=relu, pool=pool)
                     for f, c in ((ops.bn_act, case), (ops.bn_act_ref, on_cpu)))
        for gradient in (got, want):  # infinite where sums of other terms are NaN, or NaN itself
            gradient[4:] = [g.nan_to_num(torch.nan, torch.nan, torch.nan) for g in gradient[4:]]
        assert_close([t.cpu() for t in got], want, f"{name} {value} {training} {relu}", rtol=1e-3,
                     atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual, training, pool", [
    ("none", True, True), ("direct", False, False), ("mixed", True, False)])
def test_operators_pass_gradcheck(device, residual, training, pool):
    case = bn_case(device, torch.float64, (3, 5, 4, 2), residual)
    names = ["x", "gamma", "beta"] + ["residual"] * (residual != "none")
    torch.autograd.gradcheck(
        lambda *t: ops.bn_act(**fresh(case) | dict(zip(names, t)), training=training, pool=pool),
        [case[name].clone().requires_grad_() for name in names])
    live_out, live_in = index([0, 2], device), index([1, 2], device)
    shapes = (2, 2, 5, 4), (3, 4, 3, 3), (3,)
    torch.autograd.gradcheck(
        lambda *t: ops.masked_conv2d(*t, live_out, live_in, 2, 1),
        [draw(i, *shape, device=device).requires_grad_() for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual, training, pool", [
    ("none", True, True), ("direct", False, False), ("mixed", True, False)])
def test_operators_pass_opcheck(device, residual, training, pool):
    case = bn_case(device, torch.float64, (3, 5, 4, 2), residual)
    weight, rest = draw(1, 9, 9, 3, 3, device=device), (case["live"], case["live"], 1, 1)
    for name, given in (("", (case["x"], weight, case["beta"], *rest)), ("_backward", (
            case["x"], case["x"], weight, *rest, [True, pool, training]))):
        torch.library.opcheck(getattr(torch.ops.gst, "masked_conv2d" + name).default, given)
    x, shortcut, source, gamma, *_, live = case.values()
    options = dict(training=training, relu=True, pool=pool, momentum=0.1, eps=1e-5, ema_decay=0.9)
    bn, checks = torch.ops.gst.bn_act, ("test_schema", "test_faketensor")
    torch.library.opcheck(bn.default, (), case | options, test_utils=checks)
    out, mean, invstd, bits = bn(**case, **options)
    channels = -1 if shortcut is None else shortcut.shape[1]
    torch.library.opcheck(torch.ops.gst.bn_act_backward.default, (
        torch.ones_like(out), x, bits, gamma, mean, invstd, live, source, channels, training,
        pool), test_utils=checks)


zeros = torch.zeros
V = torch.ones(5)
CONV = ops.masked_conv2d, dict(x=zeros(2, 3, 5, 5), weight=zeros(4, 3, 3, 3), padding=1)
NORM = ops.bn_act, dict(x=zeros(2, 5, 3, 3), gamma=V, beta=V, running_mean=V, running_var=V)
POOL = torch.ops.gst.bn_act, NORM[1] | dict(
    live=None, residual=None, residual_map=None, act=None, training=True, relu=True, pool=True,
    momentum=0.1, eps=1e-5, ema_decay=0.9)
EBN = ops.ebn_score, dict(gamma=V[:3], beta=V[:3])


@pytest.mark.parametrize("call, change, words", [
    (EBN, dict(beta=V[:4]), r"beta must be Float \[3\]"),
    (EBN, dict(gamma=zeros(3, 3), beta=zeros(3, 3)), r"gamma must be Float \[9\]"),
    (EBN, dict(beta=V[:3].double()), "not Double"),
    (EBN, dict(gamma=V[:3].long(), beta=V[:3].long()), "floating type"),
    (CONV, dict(x=zeros(2, 3, 5)), "four dimensions"),
    (CONV, dict(x=zeros(2, 4, 5, 5)), r"weight must be Float \[4, 4, 3, 3\]"),
    (CONV, dict(x=zeros(2, 3, 5, 5).double()), "weight must be Double"),
    (CONV, dict(x=zeros(2, 3, 5, 5).int()), "floating type"),
    (CONV, dict(bias=zeros(3)), "bias"), (CONV, dict(stride=0), "stride"),
    (CONV, dict(live_out=zeros(1)), "live_out must be Long"),
    (CONV, dict(x=zeros(2, 3, 1, 1), padding=0), "larger than the padded map"),
    (NORM, dict(x=zeros(2, 4, 3, 3)), "gamma must be"),
    (NORM, dict(gamma=V.double()), "gamma"), (NORM, dict(running_var=zeros(4)), "running_var"),
    (NORM, dict(x=zeros(2, 5, 3)), "four dimensions"), (NORM, dict(act=zeros(3)), "act"),
    (NORM, dict(residual=zeros(2, 5, 4, 3)), "residual"),
    (NORM, dict(residual_map=V.long()), "needs a residual"),
    (NORM, dict(x=zeros(1, 5, 1, 1)), "more than one value"),
    (NORM, dict(x=zeros(2, 5, 3, 3).half()), "no kernel"),
    (NORM, dict(live=index([0, 1, 2, 3, 5])), "live channel 5 of 5"),
    (NORM, dict(residual=zeros(2, 3, 3, 3), residual_map=index([3] * 5)), "channel 3 of 3"),
    (NORM, dict(residual=zeros(2, 3, 3, 3), residual_map=index([-1, 1, -1, 0, 1])),
     "channel 1 twice"), (POOL, dict(x=zeros(2, 5, 3, 4)), "maps of even size"),
    (POOL, dict(x=zeros(2, 5, 4, 3)), "maps of even size"),
    (POOL, dict(x=zeros(2, 5, 4, 4), residual=zeros(2, 5, 4, 4)), "no residual")])
def test_operators_refuse_what_does_not_fit(call, change, words):
    function, arguments = call
    with pytest.raises((RuntimeError, IndexError), match=words):
        function(**arguments | change)


# The fused block

def block_case(device, dtype, n, c_in, c_out, size, pruned=False, residual=False):
    """masked_conv_bn_act's tensors, either pruned or with a residual."""
    like = dict(device=device, dtype=dtype)
    case = bn_case(device, dtype, (n, c_out, size, size), "direct" if residual else "none", False)
    del case["live"]
    return case | dict(x=draw(0, n, c_in, size, size, **like), bias=draw(7, c_out, **like),
                       live_out=index([0, 2, c_out - 1], device) if pruned else None,
                       weight=torch.nn.Parameter(draw(1, c_out, c_in, 3, 3, **like) / 9))


BLOCKS = ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref


@pytest.mark.parametrize("pruned, residual", [(False, True), (True, False)])
def test_in_training_a_bias_shifts_the_running_mean_and_nothing_else(device, pruned, residual):
    case = block_case(device, torch.float64, 4, 3, 8, 6, pruned, residual)
    case["weight"] = case["weight"].detach()
    got, want = (run(f, case, momentum=0.3) for f in BLOCKS)
    assert_close(got, want, rtol=1e-6, atol=1e-11)
    assert not got[6].any()  # exactly 0, where the reference has what rounding leaves
    assert torch.equal(ops.masked_conv_bn_act(**fresh(case) | dict(bias=None)), got[0])
    for value in (torch.nan, torch.inf):
        case["bias"][2] = value
        got, want = (f(**fresh(case)) for f in BLOCKS)
        torch.testing.assert_close(got, want, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(2, 3, 8, 6), (4, 32, 40, 8)])  # the library's, and Winograd's
@pytest.mark.parametrize("residual, pool", [(False, False), (False, True), (True, False)])
def test_an_evaluated_block_passes_on_what_is_not_finite(device, sizes, residual, pool):
    for name, value in [*NOT_FINITE, ("weight", torch.nan), ("weight", torch.inf),
                        ("bias", torch.nan), ("bias", -torch.inf)]:
        case = block_case(device, torch.float32, *sizes, residual=residual) | dict(act=None)
        if case[name] is None:
            continue
        case[name][(1,) * case[name].dim()] = value
        pays = device == "cpu" and torch.ops.gst.winograd_pays(
            case["x"], case["weight"], sizes[2], 1, 1)
        got, want = (f(**case, training=False, pool=pool) for f in BLOCKS)
        if pays and name in ("x", "weight"):  # sums in another order: infinity may become NaN
            assert not (got.isfinite() & ~want.isfinite()).any() and got.isfinite().any()
        else:
            assert_close([got], [want], f"{name} {value}", rtol=1e-3, atol=1e-3, equal_nan=True)


def test_without_the_build_operators_are_their_references(monkeypatch):
    norm = bn_case("cpu", torch.float64, (4, 5, 6, 6), "direct")
    block = block_case("cpu", torch.float64, 4, 2, 8, 6, pruned=True)
    block |= dict(weight=draw(1, 8, 7, 3, 3), live_in=torch.tensor([0, 6]))
    conv = {k: block[k] for k in ("x", "weight", "bias", "live_out", "live_in")}
    ebn = dict(gamma=norm["gamma"].float(), beta=norm["beta"].float())
    monkeypatch.setattr(ops, "available", False)
    monkeypatch.setattr(torch.ops, "gst", None)
    for name, given in (("bn_act", norm), ("masked_conv2d", conv), ("masked_conv_bn_act", block),
                        ("ebn_score", ebn)):
        got, want = (getattr(ops, name + end)(**fresh(given)) for end in ("", "_ref"))
        assert torch.equal(got, want.to(next(iter(given.values())).dtype))


# Whole networks

SOME, WHOLE_LAYER = [0, 0.4, 0, 0.3], [0.5, 0.5, 1, 0.5]


def pair_of_networks(name, masks, device="cpu", dtype=torch.float64):
    """A network by both backends, act updated, of whose block i masks[i % len(masks)] is pruned."""
    model = tiny_model(name, 0.15, 10).to(device, dtype)
    for i, block in enumerate(model.prunable):
        n = len(block.mask)
        pruned = torch.randperm(n)[:int(masks[i % len(masks)] * n)]
        train.prune_filters(block, pruned)
        block.update_act, block.act = True, block.act.float()
    return [networks.set_backend(copy.deepcopy(model), backend) for backend in ("eager", "ext")]


def outcome(model, x):
    """Logits in training and evaluation, gradients (d...) and buffers."""
    logits = model.train()(x)
    F.cross_entropy(logits, torch.arange(len(x), device=x.device)).backward()
    with torch.no_grad():
        evaluated = model.eval()(x)
    return {"train": logits, "eval": evaluated, **dict(model.named_buffers()),
            **{f"d{k}": p.grad for k, p in model.named_parameters()}}


@pytest.mark.parametrize("name, masks", [
    ("vgg11", [0]), ("vgg11", WHOLE_LAYER), ("resnet18", SOME), ("resnet20", WHOLE_LAYER),
    ("resnet20", [0.8])])
def test_both_backends_compute_the_same_network(device, name, masks):
    x = draw(0, 8, 3, 32, 32, device=device)
    want, got = (outcome(model, x) for model in pair_of_networks(name, masks, device))
    scale = max(v.abs().max() for k, v in want.items() if k.startswith("d"))
    for k, v in want.items():
        floor = 1e-10 * scale if k.startswith("d") else 0
        assert_close([got[k]], [v], k, rtol=1e-5, atol=max(1e-7, floor))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_evaluation_by_folded_weights_is_never_stale(name):
    x = draw(0, 32, 3, 32, 32, dtype=torch.float32)
    models = [model.eval() for model in pair_of_networks(name, SOME, dtype=torch.float32)]
    for block in (block for model in models for block in model.prunable):
        block.update_act = False
    changes = [lambda block: None, lambda block: block.conv.weight.data.neg_(),
               lambda block: block.bn.weight.data.mul_(0.5), lambda block: block.bn.bias.add_(1),
               lambda block: block.bn.running_var.data.mul_(2),
               lambda block: block.bn.running_mean.add_(1),
               lambda block: train.prune_filters(block, block.mask.nonzero()[0])]
    before = None
    for change in changes:
        for model in models:
            change(model.prunable[1])
            networks.set_backend(model, model.backend)
        want, got = (model(x) for model in models)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert before is None or not torch.equal(before, got)
        before = got
        assert models[1].prunable[0].conv.weight in ops.FOLDED_WEIGHTS
        assert torch.equal(got, models[1](x))
    block = models[1].prunable[1]
    block.bn.weight[block.mask.nonzero()[-1]] = torch.nan
    assert models[1](x).isnan().all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_the_build_auto_warns_once_and_ext_is_refused(monkeypatch, capsys, device):
    monkeypatch.setattr(errors, "WARNED", set())
    if device == "cpu":
        monkeypatch.setattr(ops, "available", False)
    else:
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
        assert ops.choose_backend("auto", torch.device("cpu")) == "ext"
    device = torch.device(device)
    assert [ops.choose_backend("auto", device) for _ in range(2)] == ["eager"] * 2
    assert capsys.readouterr().err.count("\n") == 1
    assert ops.choose_backend("eager", device) == "eager"
    with pytest.raises(errors.UserError, match="--backend eager"):
        ops.choose_backend("ext", device)
