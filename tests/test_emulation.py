"""The CUDA kernels as C++: faults that must be found, and the same bits in any order of threads."""
import re

import pytest
import torch
import torch.nn.functional as F
from test_ext_blocks import double, draw, fresh, index, run
from torch._subclasses.fake_tensor import FakeTensorMode

from gst_ext import ops

CASES = {  # (n, c, h, w), all filters, residual_map; without one there is a pool
    "packs": ((5, 64, 9, 11), 70, "direct"),
    "idle columns": ((2, 36, 9, 7), 40, range(35, -1, -1)),
    "single": ((3, 5, 7, 9), 9, [3, -1, 0, -1, 5]), "no filters": ((2, 0, 3, 3), 9, "direct"),
    "pooled packs": ((5, 64, 6, 14), 70, None), "pooled, single": ((3, 5, 4, 6), 9, None)}


def case_of(name, dtype=torch.float32):
    """bn_act's arguments, and the gradient of its result."""
    (n, c, h, w), c_out, source = CASES[name]
    wide = torch.promote_types(dtype, torch.float32)
    k = c if source in ("direct", None) else max(source) + 1
    x, residual, grad = (draw(i, n, channels, h, w, dtype=dtype)
                         for i, channels in enumerate((c, k, c)))
    if source is None:
        residual, grad = None, F.avg_pool2d(grad, 2)
        x = x.round()  # so that windows have equal values
    gamma, beta, mean = (draw(3 + i, c_out, dtype=wide) for i in range(3))
    live = torch.randperm(c_out, generator=torch.Generator().manual_seed(1))[:c].sort().values
    return dict(x=x, gamma=gamma, beta=beta, running_mean=mean,
                running_var=draw(6, c_out, dtype=wide).abs() + 0.1, live=live, residual=residual,
                residual_map=None if source in ("direct", None) else index(source),
                act=torch.ones(c_out)), grad


def forward_and_backward(emulation, case, grad):
    """All results of the two operators."""
    case, bn = fresh(case), emulation.operators
    pool = case["residual"] is None
    out, mean, invstd, bits = bn.bn_act(**case, training=True, relu=True, pool=pool, momentum=0.1,
                                        eps=1e-5, ema_decay=0.9)
    back = bn.bn_act_backward(grad, case["x"], bits, case["gamma"], mean, invstd, case["live"],
                              case["residual_map"], -1 if pool else case["residual"].shape[1],
                              True, pool)
    return [out, case["running_mean"], case["running_var"], case["act"], *back, mean, invstd, bits]


def verdict(emulation):
    """The emulation's first complaint, "wrong values", or "" if there is neither."""
    for name in CASES:
        case, grad = case_of(name)
        try:
            got = forward_and_backward(emulation, case, grad)
        except RuntimeError as error:
            return str(error)
        want = run(ops.bn_act_ref, case, grad, pool=case["residual"] is None)
        for a, b in zip(got, want):  # the first eight, seven without a residual
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
                return "wrong values"
    return ""


FAULTS = {  # name: (what is to be found, text of kernels.cu with the fault between two @)
    "none": ("^$", ""),
    "the first reduction is overwritten while it is read": (
        "a race", "  @if (!FAULT) @__syncthreads();  // an earlier reduction"),
    "a reduction is read before it is there": (
        "a race|before it is written",
        "shared[k][thread] = sum[k];\n  @if (!FAULT) @__syncthreads();"),
    "the first total is overwritten while it is read": (
        "a race", "  @if (!FAULT) @__syncthreads();  // an earlier total"),
    "a total is read before it is there": (
        "a race|before it is written",
        "shared[threadIdx.y][threadIdx.x] = sum;\n  @if (!FAULT) @__syncthreads();"),
    "idle columns leave before a barrier": (
        "a barrier", "@if (FAULT && !part.any) return;\n  @A sum[V] = {}, product[V]"),
    "filters that do not exist leave before a barrier": (
        "a barrier", "@if (FAULT && f >= p.c_out) return;\n  @double sum = 0, sum2 = 0;"),
    "shared memory is a thread too short": (
        "its bounds", "thread = @FAULT + @threadIdx.y * width"),
    "blocks of more threads than there may be": (
        "a GPU refuses", "const int64_t high = @(FAULT ? 8 : 1) * @kThreads"),
    "rows past the last are read": ("past the end", "if (row@ - FAULT * j@ < p.rows) raw[j]"),
    "rows past the last are written": (
        "past the end", "if (row >= p.rows@ && !FAULT@) continue;\n        const"),
    "vectors begin between two": (
        "not aligned", "write(dx + row * p.c + part.first@ + (V > 1 && FAULT)@"),
    "no filter at all is read as all": ("past the end", "return f < p.c@ || FAULT@ ? f : -1;"),
    "all chunks but the last are empty": (
        "wrong values", "groups ? (blockIdx.y + @!FAULT * @1) * chunk"),
    "two chunks share a sum": (
        "wrong values", "(int64_t{blockIdx.y} * @!FAULT * @2 + slot)"),
    "slices are added twice": ("wrong values", "begin = @!FAULT * @threadIdx.y * each"),
    "the variance is not of the batch": (
        "wrong values", "sum2 = total<A>(p, chunks, i, @!FAULT * @1);"),
    "act is given to filters by their place": (
        "wrong values",
        "i = @FAULT ? (f < p.c ? f : -1) : @position(p, f);\n  const double batch_act"),
    "rows share a bit": ("wrong values", "relu_passes(a, floor)) << (@!FAULT * @j * V + k)"),
    "windows of one line lie in the next": (
        "wrong values", "{2} + @(1 + FAULT) * @(j >> 1)) * width"),
    "windows overlap": ("wrong values", "line * windows) * int64_t{2}@ / (1 + FAULT)@"),
    "a window's last largest value is taken": (
        "wrong values", "a > top[k] ||@ (FAULT && a == top[k]) ||@"),
    "a window's gradient goes to its first value": (
        "wrong values", "<< (@!FAULT * @which[k] * V + k)"),
    "a shortcut's gradient ignores its map": (
        "wrong|past the end",
        "residual_channels + @(FAULT ? part.first + k : @source[k]@)@] = passed")}


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=FAULTS)
def test_planted_faults_are_found(emulation, number):
    wanted, faults = zip(*FAULTS.values())
    with emulation.fault(faults[1:], number):
        assert re.search(wanted[number], verdict(emulation))


def test_without_a_fault_there_is_no_complaint_and_the_kernels_have_run(emulation):
    before = emulation.counts()
    assert verdict(emulation) == ""
    launches, barriers, accesses = (a - b for a, b in zip(emulation.counts(), before))
    assert launches >= 5 * len(CASES) and barriers > 100 and accesses > 10_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_order_of_blocks_and_threads_gives_the_same_bits(emulation, dtype):
    for name in CASES:
        case, grad = case_of(name, dtype)
        want = forward_and_backward(emulation, case, grad)
        for number in (1, 2):
            with emulation.order(number):
                got = forward_and_backward(emulation, case, grad)
            assert all(map(torch.equal, got, want)), name


@pytest.mark.parametrize("act", [False, True])  # without, no sums, but more and shorter chunks
def test_a_map_of_more_rows_than_all_chunks_take_at_a_time(device, act):
    x, grad = (draw(i, 19, 64, 31, 31, device=device, dtype=torch.float32) for i in (0, 1))
    v = torch.ones(64, device=device)
    case = dict(x=x, gamma=v, beta=v / 3, running_mean=v, running_var=v, residual=x / -2,
                act=v if act else None)
    got, want = run(ops.bn_act, case, grad), run(ops.bn_act_ref, double(case), grad.double())
    edge = want[0].abs() < 1e-5  # rounding may flip what ReLU lets through there
    for a, b in zip(got, want, strict=True):
        if b is not None:
            sure = ~edge if b.dim() == 4 else slice(None)
            torch.testing.assert_close(a[sure].double(), b[sure], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, pool", [((3, 5, 3, 3), False), ((2, 64, 4, 4), False),
                                         ((5, 0, 2, 2), False), ((2, 64, 4, 2), True)])
def test_fake_kernels_tell_the_shapes_of_results(emulation, dtype, shape, pool):
    wide = torch.promote_types(dtype, torch.float32)
    rest = *[None] * 4, True, True, pool, 0.1, 1e-5, 0.9
    got = emulation.operators.bn_act(
        torch.ones(shape, dtype=dtype), *torch.ones(4, shape[1], dtype=wide).unbind(), *rest)
    with FakeTensorMode():
        told = torch.ops.gst.bn_act(
            torch.empty(shape, dtype=dtype, device="cuda"),
            *[torch.empty(shape[1], dtype=wide, device="cuda")] * 4, *rest)
    for a, b in zip(got, told, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.stride() == b.stride() or not a.numel()
