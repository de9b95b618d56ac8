"""gst_ext's masked convolution, bn_act and the fused block: against their references, alone and in whole networks."""
import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from test_ext import DEVICES

from gst_ext import files, ops, runs
import train

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {torch.float64: dict(rtol=1e-10, atol=1e-11), torch.float32: dict(rtol=1e-4, atol=2e-5),
             torch.bfloat16: dict(rtol=4e-2, atol=4e-2)}


def draw(seed, *shape, device="cpu", dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def index(values, device):
    return None if values is None else torch.tensor(values, dtype=torch.int64, device=device)


def gradients(function, tensors, grad):
    """function's output and its gradients for those of `tensors` that are not None."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [t for t in leaves if t is not None], grad(out))]


# +--------------------------------------------------------------------------------------------------------------------+
# | masked_conv2d                                                                                                      |
# +--------------------------------------------------------------------------------------------------------------------+

@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n, size, kernel, stride, bias", [
    (1, (5, 7), 3, 1, True), (3, (5, 7), 3, 2, False), (2, (4, 4), 1, 2, False), (33, (4, 4), 3, 1, True),
    (32, (2, 2), 3, 1, False), (40, (4, 2), 3, 1, False), (2, (1, 1), 3, 1, True)])
@pytest.mark.parametrize("live_out, live_in", [
    (None, None), ([0, 3, 4, 6], None), (None, [1, 2]), ([2], [0, 4]), ([], None), (None, []), ([], [])])
def test_masked_conv2d_agrees_with_its_reference(device, dtype, layout, n, size, kernel, stride, bias, live_out,
                                                 live_in):
    live_out, live_in = index(live_out, device), index(live_in, device)
    c_in = 5 if live_in is None else len(live_in)
    x = draw(0, n, c_in, *size, device=device, dtype=dtype).contiguous(memory_format=layout)
    weight = draw(1, 7, 5, kernel, kernel, device=device, dtype=dtype).contiguous(memory_format=layout)
    tensors = x, weight, draw(2, 7, device=device, dtype=dtype) if bias else None
    got, want = (gradients(lambda *t: f(*t, live_out, live_in, stride, kernel // 2), tensors,
                           lambda out: draw(3, *out.shape, device=device, dtype=dtype))
                 for f in (ops.masked_conv2d, ops.masked_conv2d_ref))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE[dtype])
    dead = torch.ones(7, dtype=torch.bool, device=device)
    dead[slice(None) if live_out is None else live_out] = False
    assert not got[2][dead].any(), "the gradient of a pruned filter"


def whole_numbers(seed, *shape):
    """Small ones: what Winograd's transforms make of them, quarters at the least, has no rounding in float32."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def winograd_case(n, c_in, c_out, size, live_out, live_in, draw=whole_numbers):
    """x, weight, live_out, live_in, grad; and in float64 the convolution of the live part and its two gradients."""
    live_out, live_in = (None if live is None else torch.arange(*live) for live in (live_out, live_in))
    x = draw(0, n, c_in if live_in is None else len(live_in), *size).contiguous(memory_format=LAYOUTS[1])
    weight = draw(1, c_out, c_in, 3, 3).contiguous(memory_format=LAYOUTS[1])
    grad = draw(2, n, c_out if live_out is None else len(live_out), *size).contiguous(memory_format=LAYOUTS[1])
    want = gradients(lambda *t: ops.masked_conv2d_ref(*t, None, live_out, live_in, 1, 1),
                     (x.double(), weight.double()), lambda out: grad.double())
    return (x, weight, live_out, live_in, grad), want


def winograd(x, weight, live_out, live_in, grad):
    filters = [torch.ops.gst.winograd_filters(weight, live_out, live_in, *x.shape[2:], flipped)
               for flipped in (False, True)]
    return [torch.ops.gst.winograd_conv2d(x, filters[0], grad.shape[1], None, None, False),
            torch.ops.gst.winograd_conv2d(grad, filters[1], x.shape[1], None, None, False),
            torch.ops.gst.winograd_weight_gradient(grad, x, weight, live_out, live_in)]


@pytest.mark.parametrize("n, c_in, c_out, size, live_out, live_in", [
    (1, 1, 1, (1, 1), None, None), (3, 5, 7, (2, 2), None, None), (2, 33, 50, (1, 2), None, None),
    (1, 19, 33, (5, 7), None, None), (2, 64, 96, (4, 4), None, None), (1, 16, 17, (3, 1), None, None),
    (9, 70, 90, (2, 2), (1, 90, 2), (3, 70, 4)), (1, 70, 90, (6, 3), (40, 41), (0, 70, 3)),
    (2, 40, 66, (9, 8), None, (5, 40)), (40, 80, 8, (16, 15), (0, 8, 3), None)])
def test_winograd_s_convolution_and_gradients_are_exact_in_whole_numbers(n, c_in, c_out, size, live_out, live_in):
    case, want = winograd_case(n, c_in, c_out, size, live_out, live_in)
    for got, exact in zip(winograd(*case), want, strict=True):
        assert torch.equal(got.double(), exact)


def test_winograd_s_convolution_adds_bias_and_shortcut_before_relu_whatever_the_memory_layout():
    (x, weight, *live, grad), (want, *_) = winograd_case(3, 21, 35, (5, 6), None, None)
    bias, residual = whole_numbers(3, 35), whole_numbers(4, 3, 35, 5, 6)
    filters = torch.ops.gst.winograd_filters(weight.contiguous(), *live, 5, 6, False)
    wide = torch.zeros(3, 42, 6, 5).transpose(2, 3)
    wide[:, ::2] = x
    for given in (x, x.contiguous(), wide[:, ::2]):
        got = torch.ops.gst.winograd_conv2d(given, filters, 35, bias, residual, True)
        assert torch.equal(got.double(), (want + bias.view(-1, 1, 1) + residual).relu())
    assert torch.ops.gst.winograd_conv2d(x * torch.nan, filters, 35, bias, residual, True).isnan().all()
    with pytest.raises(RuntimeError, match="do not fit"):
        torch.ops.gst.winograd_conv2d(x[:, 1:], filters, 35, bias, residual, True)


@pytest.mark.parametrize("n, c_in, c_out, size, live_out, live_in", [
    (64, 256, 256, (2, 2), None, None), (8, 256, 200, (8, 8), None, None), (1, 39, 45, (31, 33), None, None),
    (5, 90, 80, (10, 7), (0, 80, 2), (7, 90, 2))])
def test_winograd_s_rounding_is_that_of_a_direct_sum_for_any_number_of_threads(n, c_in, c_out, size, live_out, live_in):
    case, want = winograd_case(n, c_in, c_out, size, live_out, live_in, lambda *a: draw(*a, dtype=torch.float32))
    threads = torch.get_num_threads()
    got = winograd(*case)
    try:
        torch.set_num_threads(3)
        assert all(map(torch.equal, got, winograd(*case)))
    finally:
        torch.set_num_threads(threads)
    x, weight, *live, grad = case
    served = gradients(lambda *t: ops.masked_conv2d(*t, None, *live, 1, 1), (x, weight), lambda out: grad)
    for a, b, exact in zip(got, served, want, strict=True):
        assert max((a - exact).abs().max(), (b - exact).abs().max()) <= 3e-6 * exact.abs().max()
        assert not a[exact == 0].any() and not b[exact == 0].any()  # a pruned filter's gradient
    if torch.ops.gst.winograd_pays(x, weight, grad.shape[1], 1, 1):
        assert all(map(torch.equal, got, served))


@pytest.mark.parametrize("device", DEVICES)
def test_masked_conv2d_passes_gradcheck_and_opcheck(device):
    live_out, live_in = index([0, 2], device), index([1, 2], device)
    x, weight, bias = (draw(i, *shape, device=device).requires_grad_()
                       for i, shape in enumerate([(2, 2, 5, 4), (3, 4, 3, 3), (3,)]))
    torch.autograd.gradcheck(lambda *t: ops.masked_conv2d(*t, live_out, live_in, 2, 1), (x, weight, bias))
    torch.library.opcheck(torch.ops.gst.masked_conv2d.default, (x, weight, bias, live_out, live_in, 1, 1))
    torch.library.opcheck(torch.ops.gst.masked_conv2d.default, (x, weight[:, :2], None, None, None, 1, 1))


@pytest.mark.parametrize("change, words", [
    (dict(x=torch.zeros(2, 3, 5)), "four dimensions"), (dict(x=torch.zeros(2, 4, 5, 5)), "live input has 3"),
    (dict(x=torch.zeros(2, 3, 5, 5).double()), "one floating type"), (dict(bias=torch.zeros(3)), "bias"),
    (dict(live_out=torch.tensor([0.0])), "live_out must be an int64"), (dict(stride=0), "stride"),
    (dict(x=torch.zeros(2, 3, 1, 1), padding=0), "larger than the padded map")])
def test_masked_conv2d_refuses_what_does_not_fit(change, words):
    arguments = dict(x=torch.zeros(2, 3, 5, 5), weight=torch.zeros(4, 3, 3, 3), bias=None, live_out=None, live_in=None,
                     stride=1, padding=1)
    with pytest.raises(RuntimeError, match=words):
        ops.masked_conv2d(**arguments | change)


# +--------------------------------------------------------------------------------------------------------------------+
# | bn_act                                                                                                             |
# +--------------------------------------------------------------------------------------------------------------------+

RESIDUALS = {"none": None, "direct": "direct", "all-live": range(6), "nested": [4, 2, 0, 5, 1],
             "equal": [0, 1, 2, 3, 4], "disjoint": [-1] * 5, "mixed": [3, -1, 0, -1, 5]}


def bn_case(device, dtype, layout, shape, residual, pruned):
    """bn_act's arguments: 5 live channels (of 9 filters where pruned), statistics and act of their own values."""
    n, c, h, w = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    c_out = c + 4 if pruned else c
    live = index([0, 1, 4, 5, 8][:c], device) if pruned else None
    like = dict(device=device, dtype=dtype)
    x = draw(0, *shape, **like).contiguous(memory_format=layout)
    res = residual_map = None
    if residual is not None:
        res = draw(1, n, c if residual == "direct" else 6, h, w, **like).contiguous(memory_format=layout)
        residual_map = None if residual == "direct" else index(list(residual)[:c], device)
    like["dtype"] = wide
    gamma, beta, mean = (draw(i, c_out, **like) for i in (2, 3, 4))
    return dict(x=x, gamma=gamma, beta=beta, running_mean=mean, running_var=draw(5, c_out, **like).abs() + 0.1,
                live=live, residual=res, residual_map=residual_map, act=draw(6, c_out, device=device).abs().float())


def run_bn(function, case, **options):
    """[out, running_mean, running_var, act, gradients of x, gamma, beta and the residual] of one call."""
    case = {k: v if v is None or k in ("live", "residual_map") else v.clone() for k, v in case.items()}
    leaves = [case[k].requires_grad_() for k in ("x", "gamma", "beta", "residual") if case[k] is not None]
    out = function(**case, **options)
    grad = draw(9, *out.shape, device=out.device, dtype=out.dtype)
    found = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), case["running_mean"], case["running_var"], case["act"], *found]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (1, 5, 5, 3), (70, 5, 2, 2), (9, 5, 4, 4), (2, 1, 1, 1)])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_bn_act_agrees_with_its_reference(device, dtype, layout, shape, residual):
    for pruned, training, relu in itertools.product((False, True), (False, True), (False, True)):
        case = bn_case(device, dtype, layout, shape, RESIDUALS[residual], pruned)
        got, want = (run_bn(f, case, training=training, relu=relu) for f in (ops.bn_act, ops.bn_act_ref))
        if dtype != torch.float64 and relu:  # rounding may open or close a gate at 0: elsewhere is what is compared
            edge = ops.bn_act_ref(**case, training=training, relu=False).abs() < (0.02 if dtype == torch.bfloat16
                                                                                      else 1e-5)
            if edge.any():
                got, want = got[:4], want[:4]
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            narrow = torch.float32 if k == 3 and dtype == torch.float64 else dtype  # act is float32 throughout
            torch.testing.assert_close(a, b, **TOLERANCE[narrow], msg=lambda m: f"{k} {pruned} {training} {relu} {m}")


def test_bn_act_matches_pytorch_s_own_batch_norm_and_is_the_same_for_any_number_of_threads(device):
    x = (100 + draw(0, 64, 20, 16, 16, device=device, dtype=torch.float32)).contiguous(memory_format=LAYOUTS[1])
    mean, var = torch.zeros(2, 20, device=device)
    outs = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        statistics = mean.clone(), var.clone()
        outs.append([ops.bn_act(x, torch.ones_like(mean), mean, *statistics), *statistics])
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outs))
    want = F.relu(F.batch_norm(x.double(), mean.double(), var.double(), training=True))
    torch.testing.assert_close(outs[0][0].double(), want, rtol=1e-4, atol=1e-4)  # a mean of 100 deviations costs digits


@pytest.mark.parametrize("pool", [False, True])
def test_of_bn_act_s_backward_pass_too_no_bit_depends_on_the_number_of_threads(device, pool):
    case = bn_case(device, torch.float32, LAYOUTS[1], (64, 5, 16, 18), None if pool else "direct", False)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run_bn(ops.bn_act, case, pool=pool))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pool, residual", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("shape", [(67, 51, 31, 31), (54, 51, 36, 34)])  # 12 MiB and more; rows of 204 bytes
def test_bn_act_of_maps_that_are_written_past_the_caches(device, pool, residual, shape):
    x, r = (draw(i, *shape, device=device, dtype=torch.float32).contiguous(memory_format=LAYOUTS[1]) for i in (0, 1))
    gamma, beta, statistics = draw(2, 51, device=device), draw(3, 51, device=device), torch.ones(2, 51, device=device)
    found = []
    for function, dtype in ((ops.bn_act, torch.float32), (ops.bn_act_ref, torch.float64)):
        tensors = [t.to(dtype) for t in (x, gamma, beta, *[r] * residual)]
        found.append(gradients(lambda x, gamma, beta, *rest: function(
            x, gamma, beta, *statistics.to(dtype), residual=rest[0] if rest else None, pool=pool), tensors,
            lambda out: draw(4, *out.shape, device=device, dtype=dtype)))
    a = ops.bn_act_ref(x.double(), gamma, beta, *statistics.double(), residual=r.double() if residual else None,
                           relu=False)
    edge = a.abs() < 1e-5  # rounding may open or close a gate there, or choose another of two equal values in a window
    if pool:
        h, w = (s // 2 * 2 for s in shape[2:])
        windows = a[..., :h, :w].unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
        top = windows.topk(2).values
        close = (top[..., 0] - top[..., 1] < 1e-5).repeat_interleave(2, 2).repeat_interleave(2, 3)
        edge[..., :h, :w] |= close
    for k, (got, want) in enumerate(zip(*found, strict=True)):
        off = (got.double() - want).abs() / want.abs().max()
        assert off[~edge].max() < 1e-5 if k in (1, 4) else off.max() < (1e-5 if k == 0 else 1e-4), k
    assert edge.sum() < 1e-3 * edge.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
def test_relu_s_gate_is_shut_at_zero_and_open_for_what_is_no_number(device, layout, residual):
    values = torch.tensor([0.0, -0.0, 1e-30, -1e-30, torch.nan, torch.inf, -torch.inf, 2.0, -2.0], device=device)
    x = values.repeat(5).view(3, 5, 3, 1).contiguous(memory_format=layout).requires_grad_()
    r = (-0.5 * torch.ones_like(x)).requires_grad_() if residual else None
    one, zero = torch.ones(5, device=device), torch.zeros(5, device=device)
    out = ops.bn_act(x, one, zero, zero.clone(), one.clone(), residual=r, training=False, eps=0.0)
    a = x.detach() + (r.detach() if residual else 0)
    assert torch.equal(out.isnan(), a.isnan())
    assert torch.equal(out.nan_to_num(7), torch.where(a <= 0, torch.zeros_like(a), a).nan_to_num(7))
    dx, *dr = torch.autograd.grad(out, [x, r] if residual else [x], torch.ones_like(out))
    assert torch.equal(dx[a.isfinite()], (a > 0)[a.isfinite()].float())  # elsewhere it is no number either
    assert not residual or torch.equal(dr[0], (~(a <= 0)).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 6, 4), (1, 5, 2, 2), (70, 1, 4, 2), (70, 5, 8, 10), (3, 5, 7, 9),
                                   (2, 5, 3, 2)])
@pytest.mark.parametrize("residual", ["none", "mixed"])
def test_bn_act_with_a_pool_agrees_with_its_reference(device, dtype, layout, shape, residual):
    for pruned, training, relu in itertools.product((False, True), (False, True), (False, True)):
        case = bn_case(device, dtype, layout, shape, RESIDUALS[residual], pruned)
        got, want = (run_bn(f, case, training=training, relu=relu, pool=True)
                     for f in (ops.bn_act, ops.bn_act_ref))
        if dtype != torch.float64:  # which of two nearly equal values is the larger one, rounding decides
            got, want = got[:4], want[:4]
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            narrow = torch.float32 if k == 3 and dtype == torch.float64 else dtype
            torch.testing.assert_close(a, b, **TOLERANCE[narrow], msg=lambda m: f"{k} {pruned} {training} {relu} {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_equal_values_and_of_no_numbers_the_pool_takes_the_one_that_max_pool2d_takes(device, dtype, layout):
    values = torch.tensor([0.0, 1.0, -1.0, 2.0, torch.nan], dtype=dtype, device=device)
    windows = torch.cartesian_prod(*[values] * 4).view(25, 25, 2, 2)
    x = windows.transpose(1, 2).reshape(1, 1, 50, 50).repeat(2, 3, 1, 1).contiguous(memory_format=layout)
    one, zero = torch.ones(3, device=device), torch.zeros(3, device=device)

    def pooled(x):
        return ops.bn_act(x, one, zero, zero.clone(), one.clone(), training=False, eps=0.0, pool=True)
    got, want = (gradients(f, [x], lambda out: draw(0, *out.shape, device=device, dtype=dtype))
                 for f in (pooled, lambda x: F.max_pool2d(F.relu(x), 2)))
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    number = ~x.isnan()  # where there is none, so is the gradient none
    assert torch.equal(got[1][number], want[1][number]) and got[1][number].any() and got[0].isnan().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flag_on_the_device_decides_whether_act_takes_the_batch_in(device, layout):
    case = bn_case(device, torch.float32, layout, (4, 5, 3, 3), "direct", True)
    before = case["act"].clone()
    ops.bn_act(**case, measure=torch.tensor(False, device=device))
    assert torch.equal(case["act"], before)
    ops.bn_act(**case, measure=torch.tensor(True, device=device))
    dead = torch.ones(9, dtype=torch.bool, device=device)
    dead[case["live"]] = False
    torch.testing.assert_close(case["act"][dead], 0.9 * before[dead])  # a pruned map has shown 0
    assert (case["act"][~dead] != before[~dead]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act_of_a_layer_without_live_filters_only_lets_its_statistics_fade(device, layout):
    case = bn_case(device, torch.float32, layout, (4, 5, 3, 3), "direct", True)
    old = case["running_var"].clone()
    for k in ("x", "residual"):
        case[k] = case[k][:, :0].requires_grad_()
    case["live"] = case["live"][:0]
    out = ops.bn_act(**case)
    assert out.shape == (4, 0, 3, 3)
    out.sum().backward()
    torch.testing.assert_close(case["running_var"], 0.9 * old)


SICK = [("x", torch.nan), ("x", torch.inf), ("x", -torch.inf), ("gamma", torch.nan), ("gamma", torch.inf),
        ("gamma", -torch.inf), ("beta", torch.nan), ("beta", torch.inf), ("running_mean", torch.nan),
        ("running_mean", torch.inf), ("running_var", torch.nan), ("running_var", torch.inf), ("residual", torch.nan),
        ("residual", -torch.inf)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [0, 4])  # the first value of the first channel, which sums start from, or another's
@pytest.mark.parametrize("residual, pool", [("none", False), ("none", True), ("direct", False), ("mixed", False)])
def test_bn_act_passes_what_is_not_finite_on_as_its_reference_does(device, layout, place, residual, pool):
    for (name, value), training, relu in itertools.product(SICK, (False, True), (False, True)):
        case = bn_case(device, torch.float32, layout, (3, 5, 4, 6), RESIDUALS[residual], True)
        if case[name] is None:
            continue
        case[name][(0, place, 0, 0) if case[name].dim() == 4 else place] = value
        # The reference on the CPU: max_pool2d's channels-last kernel of CUDA (PyTorch 2.11) sends the gradients of all
        # windows of -infinity to the map's first pixel.
        on_cpu = {k: v if v is None else v.cpu() for k, v in case.items()}
        got, want = (run_bn(f, c, training=training, relu=relu, pool=pool)
                     for f, c in ((ops.bn_act, case), (ops.bn_act_ref, on_cpu)))
        for k, (a, b) in enumerate(zip(got, want, strict=True)):
            a = a.cpu()
            if k >= 4:  # a gradient may be infinite where the reference's sums of other terms are no number
                a, b = (g.nan_to_num(torch.nan, torch.nan, torch.nan) for g in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, equal_nan=True,
                                       msg=lambda m: f"{k} of {name} {value} {training} {relu}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("residual", ["none", "direct", "mixed"])
@pytest.mark.parametrize("training", [False, True])
def test_bn_act_passes_gradcheck(device, layout, residual, training):
    case = bn_case(device, torch.float64, layout, (3, 5, 3, 2), RESIDUALS[residual], True)
    leaves = [case.pop(k) for k in ("x", "gamma", "beta")]
    shortcut = [case.pop("residual")] if residual != "none" else []

    def function(x, gamma, beta, *shortcut):
        fresh = {k: v if v is None else v.clone() for k, v in case.items() if k != "residual"}
        return ops.bn_act(x, gamma, beta, **fresh, residual=shortcut[0] if shortcut else None, training=training)
    torch.autograd.gradcheck(function, [t.requires_grad_() for t in leaves + shortcut])


@pytest.mark.parametrize("device", DEVICES)
def test_bn_act_s_operators_pass_opcheck(device):
    c = bn_case(device, torch.float32, LAYOUTS[1], (3, 5, 4, 4), RESIDUALS["mixed"], True)
    arguments = (c["x"], c["gamma"], c["beta"], c["running_mean"], c["running_var"], c["live"], c["residual"],
                 c["residual_map"], c["act"], torch.tensor(True, device=device), True, True, False, 0.1, 1e-5, 0.9)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.gst.bn_act.default, arguments, test_utils=checks)
    out, mean, invstd, gate = torch.ops.gst.bn_act(*arguments)
    torch.library.opcheck(torch.ops.gst.bn_act_backward.default, (
        torch.ones_like(out), c["x"], gate, c["gamma"], mean, invstd, c["live"],
        c["residual_map"], 6, True, True, False), test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 1, 2, 2)])
def test_bn_act_s_operators_with_a_pool_pass_opcheck_and_gradcheck(device, layout, shape):
    c = bn_case(device, torch.float64, layout, shape, None, True)
    statistics, checks = (c["running_mean"], c["running_var"]), ("test_schema", "test_faketensor")
    arguments = c["x"], c["gamma"], c["beta"], *statistics, c["live"], *[None] * 4, True, True, True, 0.1, 1e-5, 0.9
    torch.library.opcheck(torch.ops.gst.bn_act.default, arguments, test_utils=checks)
    out, mean, invstd, gate = torch.ops.gst.bn_act(*arguments)
    torch.library.opcheck(torch.ops.gst.bn_act_backward.default, (
        torch.ones_like(out), c["x"], gate, c["gamma"], mean, invstd, c["live"], None, -1, True, True, True),
        test_utils=checks)
    torch.autograd.gradcheck(lambda *t: ops.bn_act(*t, *(s.clone() for s in statistics), c["live"], pool=True),
                             [t.requires_grad_() for t in arguments[:3]])


@pytest.mark.parametrize("size, residual", [((3, 4), None), ((4, 3), None), ((4, 4), 5)])
def test_the_operators_pool_no_map_of_odd_size_and_none_with_a_shortcut(device, size, residual):
    x, v = torch.ones(2, 5, *size, device=device), torch.ones(5, device=device)
    with pytest.raises(RuntimeError, match="pool is of maps of even size"):
        torch.ops.gst.bn_act(x, v, v, v.clone(), v.clone(), None, x if residual else None, *[None] * 3, True, True,
                             True, 0.1, 1e-5, 0.9)
    with pytest.raises(RuntimeError, match="pool is of maps of even size"):
        torch.ops.gst.bn_act_backward(x[..., :size[0] // 2, :size[1] // 2], x, x.new_empty(0), v, v, v, None, None,
                                      residual or -1, True, True, True)


@pytest.mark.parametrize("change, words", [
    (dict(x=torch.zeros(2, 4, 3, 3)), "live filters"), (dict(gamma=torch.zeros(5).double()), "gamma"),
    (dict(running_var=torch.zeros(4)), "running_var"), (dict(residual=torch.zeros(2, 5, 4, 3)), "residual"),
    (dict(residual_map=torch.zeros(5, dtype=torch.int64)), "needs a residual"), (dict(act=torch.zeros(3)), "act"),
    (dict(measure=torch.tensor(True)), "with an act"), (dict(x=torch.zeros(1, 5, 1, 1)), "more than one value"),
    (dict(x=torch.zeros(2, 5, 3, 3).long()), "no kernel"),
    (dict(residual=torch.zeros(2, 3, 3, 3), residual_map=torch.full((5,), 3)), "channel 3 of 3"),
    (dict(residual=torch.zeros(2, 3, 3, 3), residual_map=torch.tensor([-1, 1, -1, 0, 1])), "channel 1 twice")])
def test_bn_act_refuses_what_does_not_fit(change, words):
    v = torch.ones(5)
    arguments = dict(x=torch.randn(2, 5, 3, 3), gamma=v, beta=v, running_mean=v.clone(), running_var=v.clone())
    with pytest.raises((RuntimeError, IndexError), match=words):
        ops.bn_act(**arguments | change)


def block_case(device, dtype, n, c_in, c_out, size, pruned=False, residual=False):
    """masked_conv_bn_act's tensors: x, weight, bias, gamma, beta, running_mean, running_var, live_out and residual."""
    like = dict(device=device, dtype=dtype)
    live = index(sorted({0, 2, c_out - 1}), device) if pruned else None
    shape = n, c_out if live is None else len(live), size, size
    return dict(x=draw(0, n, c_in, size, size, **like).contiguous(memory_format=LAYOUTS[1]),
                weight=torch.nn.Parameter(draw(1, c_out, c_in, 3, 3, **like).contiguous(memory_format=LAYOUTS[1]) / 9),
                bias=draw(2, c_out, **like), gamma=draw(3, c_out, **like), beta=draw(4, c_out, **like),
                running_mean=draw(5, c_out, **like), running_var=draw(6, c_out, **like).abs() + 0.1, live_out=live,
                residual=draw(7, *shape, **like).contiguous(memory_format=LAYOUTS[1]) if residual else None)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_in_training_a_bias_shifts_the_running_mean_and_nothing_else(device, pruned, residual):
    case = block_case(device, torch.float64, 4, 3, 8, 6, pruned, residual)
    found = []
    for function in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref):
        leaves = {k: case[k].detach().clone().requires_grad_() for k in ("x", "weight", "bias", "gamma", "beta")}
        rest = {k: v if v is None or k == "live_out" else v.clone() for k, v in case.items() if k not in leaves}
        act = torch.ones(8, device=device)
        out = function(**leaves, **rest, padding=1, act=act, momentum=0.3)
        grads = torch.autograd.grad(out, list(leaves.values()), draw(9, *out.shape, device=device))
        found.append([out, rest["running_mean"], rest["running_var"], act, *grads])
    for k, (got, want) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(got, want, rtol=1e-6 if k == 3 else 1e-11, atol=1e-11, msg=lambda m: f"{k}: {m}")
    assert not found[0][6].any()  # exactly 0, where the reference has what rounding leaves
    without = {k: v if v is None or k == "live_out" else v.clone() for k, v in case.items()} | dict(bias=None)
    assert torch.equal(ops.masked_conv_bn_act(**without, padding=1, act=torch.ones(8, device=device)), found[0][0])
    for sick in (torch.nan, torch.inf):
        case["bias"][2] = sick
        got, want = (f(**{k: v if v is None or k == "live_out" else v.clone() for k, v in case.items()}, padding=1)
                     for f in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref))
        torch.testing.assert_close(got, want, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("n, c_in, c_out, size", [(2, 3, 8, 6), (4, 32, 40, 8)])  # the library's size, and Winograd's
@pytest.mark.parametrize("residual, pool", [(False, False), (False, True), (True, False)])
def test_an_evaluated_block_passes_what_is_not_finite_on(device, n, c_in, c_out, size, residual, pool):
    for name, value in [*SICK, ("weight", torch.nan), ("weight", torch.inf), ("bias", torch.nan), ("bias", -torch.inf)]:
        case = block_case(device, torch.float32, n, c_in, c_out, size, residual=residual)
        if case[name] is None:
            continue
        case[name][(1,) * case[name].dim()] = value
        winograd = device == "cpu" and torch.ops.gst.winograd_pays(case["x"], case["weight"], c_out, 1, 1)
        got, want = (f(**case, padding=1, training=False, pool=pool)
                     for f in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref))
        if winograd and name in ("x", "weight"):  # sums of products in another order: infinity may become no number
            assert not (got.isfinite() & ~want.isfinite()).any() and got.isfinite().any(), (name, value)
        else:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True,
                                       msg=lambda m: f"{name} {value}: {m}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_winograd_s_convolution_and_gradients_lose_nothing_that_is_not_finite(value):
    for k in (0, 1, 4):
        case, _ = winograd_case(2, 37, 40, (5, 6), None, None, lambda *a: draw(*a, dtype=torch.float32))
        case[k][1, 2, 1, 1] = value
        want = gradients(lambda *t: ops.masked_conv2d_ref(*t, None, None, None, 1, 1), case[:2], lambda out: case[4])
        for got, exact in zip(winograd(*case), want, strict=True):
            assert not (got.isfinite() & ~exact.isfinite()).any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_a_sick_gamma_in_any_block_shows_in_the_logits(name):
    model = train.use_backend(train.build_model(name, 10, 0.5), "ext").eval()
    x = draw(0, 16, 3, 32, 32, dtype=torch.float32).contiguous(memory_format=LAYOUTS[1])
    assert model(x).isfinite().all()
    for block in model.prunable:
        kept = block.bn.weight.clone()
        block.bn.weight[3] = torch.nan
        assert model(x).isnan().all()
        block.bn.weight.copy_(kept)
    assert model(x).isfinite().all()


@pytest.mark.parametrize("c_in", [3, 7, 12])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_1x1_filters_with_a_stride_too_the_gradients_are_the_reference_s(c_in, layout):
    x = draw(0, 33, c_in, 9, 12).contiguous(memory_format=layout)
    for stride in (2, 3):
        got, want = (gradients(lambda *t: f(*t, None, None, None, stride, 0),
                               (x.to(dtype), draw(1, 19, c_in, 1, 1).to(dtype)),
                               lambda out: draw(2, *out.shape).to(dtype))
                     for f, dtype in ((ops.masked_conv2d, torch.float32), (ops.masked_conv2d_ref, torch.float64)))
        for a, b in zip(got, want, strict=True):  # in float32 the reference too would call what overruns its memory
            torch.testing.assert_close(a.double(), b, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("score", [None, "ebn", "ebn-signed"])
def test_the_fused_block_is_its_parts_and_gives_scores_on_request(built, score, monkeypatch):
    monkeypatch.setattr(ops, "available", built)
    case = bn_case("cpu", torch.float64, LAYOUTS[1], (4, 5, 6, 6), "direct", True)
    case["live_out"], x = case.pop("live"), draw(20, 4, 3, 6, 6)
    del case["x"]
    weight, bias = draw(21, 9, 7, 3, 3), draw(22, 9)
    got, want = (f(x, weight, bias, live_in=torch.tensor([0, 3, 6]), score=score,
                   **{k: v if v is None else v.clone() for k, v in case.items()})
                 for f in (ops.masked_conv_bn_act, ops.masked_conv_bn_act_ref))
    torch.testing.assert_close(got, want)


# +--------------------------------------------------------------------------------------------------------------------+
# | Whole networks                                                                                                     |
# +--------------------------------------------------------------------------------------------------------------------+

MASKS = {"unpruned": [0.0], "some": [0.0, 0.4, 0.0, 0.3], "most": [0.8], "a whole layer": [0.5, 0.5, 1.0, 0.5],
         "batch norm kept": [0.4]}


def pair_of_networks(name, masks, device="cpu", dtype=torch.float64):
    """The same pruned network by both backends, batch norm away from its start, scores measured."""
    torch.manual_seed(3)
    model = train.build_model(name, 10, 0.15).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    for i, block in enumerate(model.prunable):
        gone = torch.randperm(len(block.mask))[:int(MASKS[masks][i % len(MASKS[masks])] * len(block.mask))]
        train.prune_block(block, gone, keep_bn=masks == "batch norm kept")
        block.measure = True
    model.to(dtype)
    for block in model.prunable:
        block.act = block.act.float()
    return train.use_backend(model, "eager"), train.use_backend(copy.deepcopy(model), "ext")


def outcome(model, x, y):
    model.train()
    logits = model(x)
    F.cross_entropy(logits, y).backward()
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    return {"train": logits.detach(), "eval": evaluated} | {f"d{k}": p.grad for k, p in model.named_parameters()} | {
        k: b for k, b in model.named_buffers()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", train.PRUNABLE_BLOCKS)
@pytest.mark.parametrize("masks", MASKS)
def test_both_backends_compute_the_same_network(device, name, masks):
    x = draw(0, 12, 3, 32, 32, device=device).contiguous(memory_format=LAYOUTS[1])
    y = torch.arange(12, device=device) % 10
    want, got = (outcome(model, x, y) for model in pair_of_networks(name, masks, device))
    scale = max(v.abs().max() for k, v in want.items() if k.startswith("d"))
    for k, v in want.items():
        floor = 1e-10 * scale if k.startswith("d") else 0
        torch.testing.assert_close(got[k], v, rtol=1e-5, atol=max(1e-7, floor), msg=lambda m: f"{k}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
def test_both_backends_agree_in_float32_too(device, name):
    x = draw(0, 32, 3, 32, 32, device=device, dtype=torch.float32).contiguous(memory_format=LAYOUTS[1])
    y = torch.arange(32, device=device) % 10
    want, got = (outcome(model, x, y) for model in pair_of_networks(name, "some", device, torch.float32))
    for k in ("train", "eval", *(k for k in want if "running" in k)):
        # a mean is rounded by the size of what it averages, which is about 1
        assert (got[k] - want[k]).abs().max() <= max(1e-5 * want[k].abs().max(), 1e-7), k
    # A gate that rounding flips changes a gradient there, and in all below; float64 (above) compares every element.
    for k in (k for k in want if k.startswith("d") and want[k].dim() == 4):
        assert (got[k] - want[k]).norm() <= 3e-2 * want[k].norm(), k


@torch.no_grad()
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
def test_evaluation_by_folded_weights_is_never_stale(name):
    x = draw(0, 32, 3, 32, 32, dtype=torch.float32).contiguous(memory_format=LAYOUTS[1])
    models = [model.eval() for model in pair_of_networks(name, "some", dtype=torch.float32)]
    for block in (block for model in models for block in model.prunable):
        block.measure = False

    def fused_step(block):
        block.conv.weight.grad = torch.ones_like(block.conv.weight)
        torch.optim.SGD([block.conv.weight], 1e-2, fused=True).step()
    changes = [lambda block: None, lambda block: block.conv.weight.mul_(3), lambda block: block.bn.bias.add_(1),
               lambda block: block.conv.weight.data.neg_(), lambda block: block.bn.running_var.data.mul_(2),
               lambda block: block.bn.running_mean.add_(1), lambda block: block.bn.weight.data.mul_(0.5), fused_step,
               lambda block: train.prune_block(block, block.mask.nonzero()[0])]
    before = None
    for change in changes:
        for model in models:
            change(model.prunable[1])
            train.use_backend(model, model.backend)
        want, got = (model(x) for model in models)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
        assert before is None or not torch.equal(before, got)
        before = got
        assert torch.equal(got, models[1](x)) and models[1].prunable[0].conv.weight in ops.FOLDED


def test_pruned_filters_have_no_gradient_and_the_maps_between_blocks_are_compact():
    _, model = pair_of_networks("resnet18", "some")
    shapes = []
    for block in model.prunable:
        block.register_forward_hook(lambda block, _, out: shapes.append((out.shape[1], int(block.mask.sum()))))
    model(draw(0, 4, 3, 32, 32)).sum().backward()
    assert shapes and all(got == live for got, live in shapes)
    for block in model.prunable:
        for p in (block.conv.weight, block.bn.weight, block.bn.bias):
            assert p.grad.shape == p.shape and not p.grad[~block.mask].any()


def digits_run(tmp_path, backend, *options):
    args = train.parse_options([*"--dataset digits --width 0.1 --epochs 30 --lrs 20 --batch-size 50 --s 1 2 3 4 --e 13 "
                                 "14 15 16 --p 0.3 0.3 0.3 0.6 --r 4 --device cpu".split(), "--backend", backend,
                                "--log-dir", str(tmp_path / backend), *options])
    assert runs.train_one(args, train)
    return [json.loads(line) for line in open(train.run_directory(args) / "epochs.jsonl")]


@pytest.mark.parametrize("options", ["--target S --score l2", "--model resnet18 --target L --score act --lr 0.0005 "
                                     "--train-images 480"])
def test_thirty_epochs_of_digits_prune_as_many_filters_and_end_alike_on_both_backends(tmp_path, options):
    eager, ext = (digits_run(tmp_path, backend, *options.split()) for backend in ("eager", "ext"))
    assert [r["live"] for r in ext] == [r["live"] for r in eager]
    first = next(r["epoch"] for r in eager if any(r["removed"]))
    assert ext[first]["filters"] == eager[first]["filters"]
    assert abs(ext[-1]["test_acc"] - eager[-1]["test_acc"]) < 8


# +--------------------------------------------------------------------------------------------------------------------+
# | --backend                                                                                                          |
# +--------------------------------------------------------------------------------------------------------------------+

SHORT = "--dataset digits --width 0.05 --epochs 1 --lrs 1 --save-epoch 0 --device cpu".split()


@pytest.mark.parametrize("backend", ["ext", "eager"])
def test_a_run_logs_its_backend_and_may_be_continued_by_the_other(tmp_path, backend, monkeypatch):
    args = train.parse_options([*SHORT, "--backend", backend, "--log-dir", str(tmp_path)])
    runs.train_one(args, train)
    directory = train.run_directory(args)
    assert json.loads((directory / "config.json").read_text())["backend"] == backend
    (directory / "done.json").unlink()
    other = train.parse_options([*SHORT, "--backend", "ext" if backend == "eager" else "eager", "--log-dir",
                                 str(tmp_path)])
    assert runs.train_one(other, train)["epochs"] == 1  # finished, by its checkpoint


@pytest.mark.parametrize("missing", ("all", "for a GPU"))
def test_without_the_build_auto_says_so_once_and_ext_is_refused(monkeypatch, capsys, missing):
    monkeypatch.setattr(files, "SAID", set())
    if missing == "all":
        monkeypatch.setattr(ops, "available", False)
        monkeypatch.setattr(ops, "why_not", "no such file")
    else:
        monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    device, args = torch.device("cpu" if missing == "all" else "cuda"), train.parse_options(SHORT)
    for _ in range(2):
        assert runs.choose_backend(args, device) == "eager"
    assert capsys.readouterr().err.count("\n") == 1
    assert runs.choose_backend(train.parse_options([*SHORT, "--backend", "eager"]), device) == "eager"
    with pytest.raises(files.UserError, match="--backend eager"):
        runs.choose_backend(train.parse_options([*SHORT, "--backend", "ext"]), device)
    if missing != "all":
        assert runs.choose_backend(args, torch.device("cpu")) == "ext"


def test_a_device_that_the_operators_were_not_built_for_gets_the_references(monkeypatch):
    for name in ("ebn_score", "masked_conv2d", "bn_act"):
        monkeypatch.delattr(torch.ops.gst, name, raising=False)
        monkeypatch.setattr(torch.ops.gst, name, None, raising=False)
    monkeypatch.setattr(ops, "computes_on", lambda device: False)
    gamma, beta = draw(0, 5), draw(1, 5)
    assert torch.equal(ops.ebn_score(gamma, beta), ops.ebn_score_ref(gamma, beta).to(gamma.dtype))
    block = draw(2, 2, 3, 8, 8), draw(3, 5, 3, 3, 3), None, gamma, beta, torch.zeros(5), torch.ones(5)
    out, score = ops.masked_conv_bn_act(*block, score="ebn", training=False)
    assert torch.equal(out, ops.masked_conv_bn_act_ref(*block, training=False))
    assert torch.equal(score, ops.ebn_score(gamma, beta))
