"""gst_ext's masked convolution, bn_act and the fused block, alone and in whole networks."""
import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
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
    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))
    products = list(itertools.product(*(range(len(levels)) for levels in factors.values())))
    random.Random(0).shuffle(products)
    left, cases = set().union(*map(pairs, products)), []
    while left:
        best = max(products[:4000], key=lambda case: len(left & pairs(case)))
        if not left & pairs(best):
            best = next(case for case in products if left & pairs(case))
        left -= pairs(best)
        cases.append(dict(zip(factors, (factors[k][i] for k, i in zip(factors, best)))))
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
    # The reference in float64: of strided 1x1 filters float32's may write past its memory.
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


@pytest.mark.parametrize("device", DEVICES)
def test_masked_conv2d_passes_gradcheck_and_opcheck(device):
    live_out, live_in = index([0, 2], device), index([1, 2], device)
    shapes = (2, 2, 5, 4), (3, 4, 3, 3), (3,)
    tensors = [draw(i, *shape, device=device) for i, shape in enumerate(shapes)]
    torch.autograd.gradcheck(lambda *t: ops.masked_conv2d(*t, live_out, live_in, 2, 1),
                             [t.clone().requires_grad_() for t in tensors])
    torch.library.opcheck(torch.ops.gst.masked_conv2d.default,
                          (*tensors, live_out, live_in, 1, 1))
    grad = draw(3, 2, 2, 5, 4, device=device)
    torch.library.opcheck(torch.ops.gst.masked_conv2d_backward.default, (
        grad, *tensors[:2], live_out, live_in, 1, 1, [True, False, True]))


@pytest.mark.parametrize("change, words", [
    (dict(x=torch.zeros(2, 3, 5)), "four dimensions"),
    (dict(x=torch.zeros(2, 4, 5, 5)), r"weight must be Float \[4, 4, 3, 3\]"),
    (dict(x=torch.zeros(2, 3, 5, 5).double()), "weight must be Double"),
    (dict(x=torch.zeros(2, 3, 5, 5).int()), "floating type"), (dict(bias=torch.zeros(3)), "bias"),
    (dict(live_out=torch.tensor([0.0])), "live_out must be Long"), (dict(stride=0), "stride"),
    (dict(x=torch.zeros(2, 3, 1, 1), padding=0), "larger than the padded map")])
def test_masked_conv2d_refuses_what_does_not_fit(change, words):
    arguments = dict(x=torch.zeros(2, 3, 5, 5), weight=torch.zeros(4, 3, 3, 3), padding=1)
    with pytest.raises(RuntimeError, match=words):
        ops.masked_conv2d(**arguments | change)


def whole_numbers(seed, *shape):
    """Small ones, which Winograd's transforms turn into quarters at the least: no rounding."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, shape, generator=generator).float()
    return values.contiguous(memory_format=CHANNELS_LAST) if len(shape) == 4 else values


def winograd_case(n, c_in, c_out, size, live_out, live_in, draw=whole_numbers):
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
    (1, 1, 1, (1, 1), None, None), (3, 5, 7, (2, 2), None, None), (2, 33, 50, (1, 2), None, None),
    (1, 19, 33, (5, 7), None, None), (1, 16, 17, (3, 1), None, None),
    (9, 70, 90, (2, 2), (1, 90, 2), (3, 70, 4)), (1, 70, 90, (6, 3), (40, 41), (0, 70, 3)),
    (40, 80, 8, (16, 15), (0, 8, 3), (5, 80))], ids=str)
def test_winograd_s_convolution_and_gradients_are_exact_in_whole_numbers(case):
    arguments, want = winograd_case(*case)
    for got, exact in zip(winograd(*arguments), want, strict=True):
        assert torch.equal(got.double(), exact)


def test_winograd_s_convolution_adds_bias_and_shortcut_before_relu_in_any_memory_layout():
    (x, weight, *live, _), (want, *_) = winograd_case(3, 21, 35, (5, 6), None, None)
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


@pytest.mark.parametrize("case", [
    (64, 256, 256, (2, 2), None, None), (1, 39, 45, (31, 33), None, None),
    (5, 90, 80, (10, 7), (0, 80, 2), (7, 90, 2))], ids=str)
def test_winograd_rounds_as_a_direct_sum_does_for_any_number_of_threads(case):
    arguments, want = winograd_case(*case, lambda *a: draw(*a, dtype=torch.float32))
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


# Batch norm, shortcut, ReLU and pool

def with_threads(number, function):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


RESIDUALS = {"none": None, "direct": None, "nested": [4, 2, 0, 5, 1], "unmapped": [-1] * 5,
             "mixed": [3, -1, 0, -1, 5]}


def bn_case(device, dtype, shape, residual="none", pruned=True, layout=CHANNELS_LAST):
    """bn_act's tensors: up to 5 live channels, of 4 more filters if pruned."""
    n, c, *size = shape
    like, c_out = dict(device=device, dtype=dtype), c + 4 * pruned
    wide = like | dict(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    case = dict(x=draw(0, *shape, **like), residual=None, residual_map=None)
    if residual != "none":
        case["residual"] = draw(1, n, c if residual == "direct" else 6, *size, **like)
        mapped = RESIDUALS[residual]
        case["residual_map"] = index(mapped if mapped is None else mapped[:c], device)
    for i, name in enumerate(("gamma", "beta", "running_mean")):
        case[name] = draw(2 + i, c_out, **wide)
    case["running_var"] = draw(5, c_out, **wide).abs() + 0.1
    case["act"] = draw(6, c_out, device=device, dtype=torch.float32).abs()
    case["live"] = index([0, 1, 4, 5, 8][:c], device) if pruned else None
    return {k: v.contiguous(memory_format=layout) if v is not None and v.dim() == 4 else v
            for k, v in case.items()}


def run_bn(function, case, **options):
    """Out, running_mean, running_var, act, gradients of x, gamma, beta and the residual."""
    case = fresh(case)
    leaves = [case[k].requires_grad_() for k in ("x", "gamma", "beta", "residual")
              if case[k] is not None]
    out = function(**case, **options)
    grads = torch.autograd.grad(out, leaves, draw(9, *out.shape, device=out.device,
                                                  dtype=out.dtype))
    return [out.detach(), case["running_mean"], case["running_var"], case["act"], *grads]


@pytest.mark.parametrize("case", covering(
    dtype=list(TOLERANCE), layout=LAYOUTS, pruned=[False, True], training=[False, True],
    relu=[False, True], pool=[False, True], residual=list(RESIDUALS), shape=[
        (3, 5, 7, 9), (1, 5, 5, 3), (2, 1, 2, 2), (70, 5, 4, 2), (9, 5, 30, 32)]), ids=str)
def test_bn_act_agrees_with_its_reference(device, case):
    dtype, options = case["dtype"], {k: case[k] for k in ("training", "relu", "pool")}
    tensors = bn_case(device, dtype, case["shape"], case["residual"], case["pruned"],
                      case["layout"])
    got, want = (run_bn(f, tensors, **options) for f in (ops.bn_act, ops.bn_act_ref))
    assert got[0].is_contiguous(memory_format=CHANNELS_LAST)
    if dtype != torch.float64 and (case["relu"] or case["pool"]):
        got, want = got[:4], want[:4]  # rounding may flip what ReLU or the pool lets through
    assert_close([got.pop(3)], [want.pop(3)], "act", rtol=4e-3, atol=2e-5)  # float32
    assert_close(got, want, **TOLERANCE[dtype])


@pytest.mark.parametrize("pool, residual", [(True, "none"), (False, "mixed")])
def test_no_bit_of_bn_act_depends_on_the_number_of_threads(device, pool, residual):
    case = bn_case(device, torch.float32, (64, 5, 16, 18), residual)
    one, two = (with_threads(n, lambda: run_bn(ops.bn_act, case, pool=pool)) for n in (1, 2))
    assert all(map(torch.equal, one, two))


def test_bn_act_matches_pytorch_s_own_batch_norm_far_from_zero(device):
    x = 100 + draw(0, 64, 20, 16, 16, device=device, dtype=torch.float32)
    mean, var = torch.zeros(2, 20, device=device)
    got = ops.bn_act(x, torch.ones_like(mean), mean, mean.clone(), var.clone())
    want = F.relu(F.batch_norm(x.double(), mean.double(), var.double(), training=True))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pool", [False, True])
def test_of_zero_equal_values_and_nan_relu_and_pool_pass_what_pytorch_s_do(device, dtype, pool):
    values = torch.tensor([0.0, 1.0, -1.0, -0.0, torch.nan], dtype=dtype, device=device)
    windows = torch.cartesian_prod(*[values] * 4).view(25, 25, 2, 2)
    x = windows.transpose(1, 2).reshape(1, 1, 50, 50).repeat(2, 3, 1, 1)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)

    def evaluated(x):
        return ops.bn_act(x, one, zero, zero.clone(), one.clone(), training=False, eps=0.0,
                          pool=pool)
    got, want = (gradients(f, [x], lambda out: draw(0, *out.shape, device=device, dtype=dtype))
                 for f in (evaluated, lambda x: F.max_pool2d(F.relu(x), 2) if pool else F.relu(x)))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    number = ~x.isnan()  # elsewhere the gradient is NaN too
    assert torch.equal(got[1][number], want[1][number])
    assert got[1][number].any() and got[0].isnan().any()


def test_bn_act_of_a_layer_without_live_filters_only_lets_its_statistics_decay(device):
    case = bn_case(device, torch.float32, (4, 5, 3, 3), "direct")
    old = fresh(case)
    for k in ("x", "residual", "live"):
        case[k] = case[k][:, :0].requires_grad_() if k != "live" else case[k][:0]
    out = ops.bn_act(**case)
    out.sum().backward()
    assert out.shape == (4, 0, 3, 3)
    torch.testing.assert_close(case["running_var"], 0.9 * old["running_var"])
    torch.testing.assert_close(case["act"], 0.9 * old["act"])


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
        got, want = (run_bn(f, c, training=training, relu=relu, pool=pool)
                     for f, c in ((ops.bn_act, case), (ops.bn_act_ref, on_cpu)))
        for gradient in (got, want):  # infinite where sums of other terms are NaN, or NaN itself
            gradient[4:] = [g.nan_to_num(torch.nan, torch.nan, torch.nan) for g in gradient[4:]]
        assert_close([t.cpu() for t in got], want, f"{name} {value} {training} {relu}", rtol=1e-3,
                     atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual, training, pool", [
    ("none", True, True), ("direct", False, False), ("mixed", True, False)])
def test_bn_act_passes_gradcheck_and_opcheck(device, residual, training, pool):
    case = bn_case(device, torch.float64, (3, 5, 4, 2), residual)
    leaves = [case[k] for k in ("x", "gamma", "beta")] + [case["residual"]] * (residual != "none")
    names = "x", "gamma", "beta", "residual"
    torch.autograd.gradcheck(
        lambda *t: ops.bn_act(**fresh(case) | dict(zip(names, t)), training=training, pool=pool),
        [t.clone().requires_grad_() for t in leaves])
    tensors = [case[k] for k in ("x", "gamma", "beta", "running_mean", "running_var", "live",
                                 "residual", "residual_map", "act")]
    arguments = *tensors, training, True, pool, 0.1, 1e-5, 0.9
    checks = "test_schema", "test_faketensor"
    torch.library.opcheck(torch.ops.gst.bn_act.default, arguments, test_utils=checks)
    out, mean, invstd, bits = torch.ops.gst.bn_act(*arguments)
    channels = -1 if residual == "none" else tensors[6].shape[1]
    torch.library.opcheck(torch.ops.gst.bn_act_backward.default, (
        torch.ones_like(out), tensors[0], bits, tensors[1], mean, invstd, case["live"],
        case["residual_map"], channels, training, pool), test_utils=checks)


@pytest.mark.parametrize("size, residual", [((3, 4), False), ((4, 3), False), ((4, 4), True)])
def test_the_operator_pools_no_map_of_odd_size_and_none_with_a_shortcut(device, size, residual):
    x, v = torch.ones(2, 5, *size, device=device), torch.ones(5, device=device)
    with pytest.raises(RuntimeError, match="pool needs maps of even size"):
        torch.ops.gst.bn_act(x, v, v, v.clone(), v.clone(), None, x if residual else None, None,
                             None, True, True, True, 0.1, 1e-5, 0.9)


@pytest.mark.parametrize("change, words", [
    (dict(x=torch.zeros(2, 4, 3, 3)), "gamma must be"),
    (dict(gamma=torch.zeros(5).double()), "gamma"),
    (dict(running_var=torch.zeros(4)), "running_var"),
    (dict(x=torch.zeros(2, 5, 3)), "four dimensions"),
    (dict(residual=torch.zeros(2, 5, 4, 3)), "residual"), (dict(act=torch.zeros(3)), "act"),
    (dict(residual_map=torch.zeros(5, dtype=torch.int64)), "needs a residual"),
    (dict(x=torch.zeros(1, 5, 1, 1)), "more than one value"),
    (dict(x=torch.zeros(2, 5, 3, 3).long()), "no kernel"),
    (dict(x=torch.zeros(2, 5, 3, 3).half()), "no kernel"),
    (dict(live=torch.tensor([0, 1, 2, 3, 5])), "live channel 5 of 5"),
    (dict(residual=torch.zeros(2, 3, 3, 3), residual_map=torch.full((5,), 3)), "channel 3 of 3"),
    (dict(residual=torch.zeros(2, 3, 3, 3), residual_map=torch.tensor([-1, 1, -1, 0, 1])),
     "channel 1 twice")])
def test_bn_act_refuses_what_does_not_fit(change, words):
    v = torch.ones(5)
    arguments = dict(x=torch.randn(2, 5, 3, 3), gamma=v, beta=v, running_mean=v.clone(),
                     running_var=v.clone())
    with pytest.raises((RuntimeError, IndexError), match=words):
        ops.bn_act(**arguments | change)


# The fused block

def block_case(device, dtype, n, c_in, c_out, size, pruned=False, residual=False):
    """masked_conv_bn_act's tensors."""
    like = dict(device=device, dtype=dtype)
    case = bn_case(device, dtype, (n, c_out, 1, 1), pruned=False)
    live = [0, 2, c_out - 1] if pruned else None
    shape = n, len(live) if pruned else c_out, size, size
    return dict(x=draw(0, n, c_in, size, size, **like),
                weight=torch.nn.Parameter(draw(1, c_out, c_in, 3, 3, **like) / 9),
                bias=draw(7, c_out, **like), live_out=index(live, device),
                residual=draw(8, *shape, **like) if residual else None,
                **{k: case[k] for k in ("gamma", "beta", "running_mean", "running_var")})


@pytest.mark.parametrize("pruned, residual", [(False, True), (True, False)])
def test_in_training_a_bias_shifts_the_running_mean_and_nothing_else(device, pruned, residual):
    case = block_case(device, torch.float64, 4, 3, 8, 6, pruned, residual)
    found = []
    for function in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref):
        tensors, act = fresh(case), torch.ones(8, device=device)
        leaves = [tensors[k].detach_().requires_grad_()
                  for k in ("x", "weight", "bias", "gamma", "beta")]
        out = function(**tensors, act=act, momentum=0.3)
        grads = torch.autograd.grad(out, leaves, draw(9, *out.shape, device=device))
        found.append([out, tensors["running_mean"], tensors["running_var"], act, *grads])
    assert_close(*found, rtol=1e-6, atol=1e-11)
    assert not found[0][6].any()  # exactly 0, where the reference has what rounding leaves
    without = ops.masked_conv_bn_act(**fresh(case) | dict(bias=None))
    assert torch.equal(without, found[0][0])
    for value in (torch.nan, torch.inf):
        case["bias"][2] = value
        got, want = (f(**fresh(case)) for f in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref))
        torch.testing.assert_close(got, want, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(2, 3, 8, 6), (4, 32, 40, 8)])  # the library's, and Winograd's
@pytest.mark.parametrize("residual, pool", [(False, False), (False, True), (True, False)])
def test_an_evaluated_block_passes_on_what_is_not_finite(device, sizes, residual, pool):
    for name, value in [*NOT_FINITE, ("weight", torch.nan), ("weight", torch.inf),
                        ("bias", torch.nan), ("bias", -torch.inf)]:
        case = block_case(device, torch.float32, *sizes, residual=residual)
        if case[name] is None:
            continue
        case[name][(1,) * case[name].dim()] = value
        pays = torch.ops.gst.winograd_pays(case["x"], case["weight"], sizes[2], 1, 1) if (
            device == "cpu") else False
        got, want = (f(**case, training=False, pool=pool)
                     for f in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref))
        if pays and name in ("x", "weight"):  # sums in another order: infinity may become NaN
            assert not (got.isfinite() & ~want.isfinite()).any() and got.isfinite().any()
        else:
            assert_close([got], [want], f"{name} {value}", rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("built", [True, False])
def test_operators_are_their_references_without_the_build_too(built, monkeypatch):
    monkeypatch.setattr(ops, "available", built)
    case = bn_case("cpu", torch.float64, (4, 5, 6, 6), "direct")
    norm = {k: v for k, v in case.items() if k != "x"}
    torch.testing.assert_close(ops.bn_act(**fresh(case)), ops.bn_act_ref(**fresh(case)))
    norm["live_out"], live_in = norm.pop("live"), torch.tensor([0, 3, 6])
    x, weight, bias = draw(20, 4, 3, 6, 6), draw(21, 9, 7, 3, 3), draw(22, 9)
    got, want = (f(x, weight, bias, live_in=live_in, **fresh(norm))
                 for f in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref))
    torch.testing.assert_close(got, want)
    got, want = (f(x, weight, bias, norm["live_out"], live_in)
                 for f in (ops.masked_conv2d, ops.masked_conv2d_ref))
    torch.testing.assert_close(got, want)


# Whole networks

MASKS = {"unpruned": [0.0], "some": [0.0, 0.4, 0.0, 0.3], "most": [0.8],
         "a whole layer": [0.5, 0.5, 1.0, 0.5], "batch norm kept": [0.4]}


def pair_of_networks(name, masks, device="cpu", dtype=torch.float64):
    """A pruned network by both backends, with random batch norms, act updated."""
    torch.manual_seed(3)
    model = networks.build_model(name, 10, 0.15).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    for i, block in enumerate(model.prunable):
        n = len(block.mask)
        pruned = torch.randperm(n)[:int(MASKS[masks][i % len(MASKS[masks])] * n)]
        train.prune_filters(block, pruned, keep_bn=masks == "batch norm kept")
        block.update_act = True
    model.to(dtype)
    for block in model.prunable:
        block.act = block.act.float()
    other = copy.deepcopy(model)
    return networks.set_backend(model, "eager"), networks.set_backend(other, "ext")


def outcome(model, x, y):
    """Logits in training and evaluation, gradients (d...) and buffers."""
    model.train()
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    return {"train": logits.detach(), "eval": evaluated,
            **{f"d{k}": p.grad for k, p in model.named_parameters()},
            **dict(model.named_buffers())}


def assert_same_network(name, masks, n, device):
    """Both backends have the same outcome in float64."""
    x, y = draw(0, n, 3, 32, 32, device=device), torch.arange(n, device=device) % 10
    want, got = (outcome(model, x, y) for model in pair_of_networks(name, masks, device))
    scale = max(v.abs().max() for k, v in want.items() if k.startswith("d"))
    for k, v in want.items():
        floor = 1e-10 * scale if k.startswith("d") else 0
        assert_close([got[k]], [v], k, rtol=1e-5, atol=max(1e-7, floor))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name, masks", [
    ("vgg11", "unpruned"), ("vgg11", "a whole layer"), ("vgg19", "some"), ("resnet18", "some"),
    ("resnet18", "batch norm kept"), ("resnet20", "most"), ("resnet20", "a whole layer"),
    ("resnet56", "some")])
def test_both_backends_compute_the_same_network(device, name, masks):
    assert_same_network(name, masks, 12, device)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_evaluation_by_folded_weights_is_never_stale(name):
    x = draw(0, 32, 3, 32, 32, dtype=torch.float32)
    models = [model.eval() for model in pair_of_networks(name, "some", dtype=torch.float32)]
    for block in (block for model in models for block in model.prunable):
        block.update_act = False

    def fused_step(block):
        block.conv.weight.grad = torch.ones_like(block.conv.weight)
        torch.optim.SGD([block.conv.weight], 1e-2, fused=True).step()
    changes = [lambda block: None, lambda block: block.conv.weight.mul_(3),
               lambda block: block.bn.bias.add_(1), lambda block: block.conv.weight.data.neg_(),
               lambda block: block.bn.running_var.data.mul_(2),
               lambda block: block.bn.running_mean.add_(1),
               lambda block: block.bn.weight.data.mul_(0.5), fused_step,
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
    models[1].prunable[1].bn.weight[-1] = torch.nan
    assert models[1](x).isnan().all()


def test_the_maps_between_blocks_are_compact():
    _, model = pair_of_networks("resnet18", "some")
    shapes = []
    for block in model.prunable:
        block.register_forward_hook(
            lambda block, _, out: shapes.append((out.shape[1], int(block.mask.sum()))))
    model(draw(0, 4, 3, 32, 32))
    assert len(shapes) == 16 and all(computed == live for computed, live in shapes)


@pytest.mark.parametrize("missing", ("all", "for a GPU"))
def test_without_the_build_auto_warns_once_and_ext_is_refused(monkeypatch, capsys, missing):
    monkeypatch.setattr(errors, "WARNED", set())
    device = torch.device("cpu" if missing == "all" else "cuda")
    if missing == "all":
        monkeypatch.setattr(ops, "available", False)
        monkeypatch.setattr(ops, "unavailable_reason", "no such file")
    else:
        monkeypatch.delattr(torch._C, "_dispatch_has_kernel_for_dispatch_key")
        assert ops.choose_backend("auto", torch.device("cpu")) == "ext"
    assert [ops.choose_backend("auto", device) for _ in range(2)] == ["eager"] * 2
    assert capsys.readouterr().err.count("\n") == 1
    assert ops.choose_backend("eager", device) == "eager"
    with pytest.raises(errors.UserError, match="--backend eager"):
        ops.choose_backend("ext", device)
