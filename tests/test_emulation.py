"""The CUDA kernels as C++: faults that must be found, and the same bits in any order of threads."""
import pytest
import torch
import torch.nn.functional as F
from test_ext_blocks import assert_same_network, draw, fresh, index
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
    wide = torch.float64 if dtype == torch.float64 else torch.float32
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


def from_reference(case, grad):
    """The first eight of forward_and_backward, seven without a residual."""
    case = fresh(case)
    leaves = [case[k].requires_grad_() for k in ("x", "gamma", "beta", "residual")
              if case[k] is not None]
    out = ops.bn_act_ref(**case, pool=case["residual"] is None)
    return [out.detach(), case["running_mean"], case["running_var"], case["act"],
            *torch.autograd.grad(out, leaves, grad)]


def verdict(emulation):
    """The emulation's first complaint, or "wrong values"; "" if there is neither."""
    for name in CASES:
        case, grad = case_of(name)
        try:
            got = forward_and_backward(emulation, case, grad)
        except RuntimeError as error:
            return str(error)
        for a, b in zip(got, from_reference(case, grad)):
            if not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
                return "wrong values"
    return ""


BARRIER, NO_BARRIER = "  __syncthreads();", "  if (!FAULT) __syncthreads();"
REDUCED, ADDED = "shared[k][thread] = sum[k];\n", "shared[threadIdx.y][threadIdx.x] = sum;\n"
FAULTS = {  # name: (what is to be found, text of kernels.cu, the same with the fault if FAULT)
    "the first reduction is overwritten while it is read": (
        "a race", BARRIER + "  // an earlier reduction", NO_BARRIER + "  // an earlier reduction"),
    "a reduction is read before it is there": (
        "a race|before it is written", REDUCED + BARRIER, REDUCED + NO_BARRIER),
    "the first total is overwritten while it is read": (
        "a race", BARRIER + "  // an earlier total", NO_BARRIER + "  // an earlier total"),
    "a total is read before it is there": (
        "a race|before it is written", ADDED + BARRIER, ADDED + NO_BARRIER),
    "idle columns leave before a barrier": (
        "a barrier", "A sum[V] = {}, product[V]",
        "if (FAULT && !part.any) return;\n  A sum[V] = {}, product[V]"),
    "filters that do not exist leave before a barrier": (
        "a barrier", "double sum = 0, sum2 = 0;",
        "if (FAULT && f >= p.c_out) return;\n  double sum = 0, sum2 = 0;"),
    "shared memory is a thread too short": (
        "its bounds", "thread = threadIdx.y * width", "thread = FAULT + threadIdx.y * width"),
    "blocks of more threads than there may be": (
        "a GPU refuses", "const int64_t high = kThreads",
        "const int64_t high = (FAULT ? 8 : 1) * kThreads"),
    "rows past the last are read": (
        "past the end", "if (row < p.rows) raw[j]", "if (row - FAULT * j < p.rows) raw[j]"),
    "rows past the last are written": (
        "past the end", "if (row >= p.rows) continue;\n        const",
        "if (row >= p.rows && !FAULT) continue;\n        const"),
    "vectors begin between two": (
        "not aligned", "write(dx + row * p.c + part.first",
        "write(dx + row * p.c + part.first + (V > 1 && FAULT)"),
    "no filter at all is read as all": (
        "past the end", "return f < p.c ? f : -1;", "return f < p.c || FAULT ? f : -1;"),
    "all chunks but the last are empty": (
        "wrong values", "groups ? (blockIdx.y + 1) * chunk",
        "groups ? (blockIdx.y + !FAULT) * chunk"),
    "two chunks share a sum": (
        "wrong values", "(int64_t{blockIdx.y} * 2 + slot)",
        "(int64_t{blockIdx.y} * (FAULT ? 1 : 2) + slot)"),
    "slices are added twice": (
        "wrong values", "begin = threadIdx.y * each", "begin = (FAULT ? 0 : threadIdx.y) * each"),
    "the variance is not of the batch": (
        "wrong values", "sum2 = total<A>(p, chunks, i, 1);",
        "sum2 = total<A>(p, chunks, i, FAULT ? 0 : 1);"),
    "act is given to filters by their place": (
        "wrong values", "i = position(p, f);\n  const double batch_act",
        "i = FAULT ? (f < p.c ? f : -1) : position(p, f);\n  const double batch_act"),
    "rows share a bit": (
        "wrong values", "relu_passes(a, floor)) << (j * V + k)",
        "relu_passes(a, floor)) << ((FAULT ? 0 : j) * V + k)"),
    "windows of one line lie in the next": (
        "wrong values", "{2} + (j >> 1)) * width",
        "{2} + (FAULT ? 2 - (j >> 1) : j >> 1)) * width"),
    "windows overlap": (
        "wrong values", "line * windows) * int64_t{2}", "line * windows) * (FAULT ? 1 : 2)"),
    "a window's last largest value is taken": (
        "wrong values", "a > top[k] ||", "a > top[k] || (FAULT && a == top[k]) ||"),
    "a window's gradient goes to its first value": (
        "wrong values", "<< (which[k] * V + k)", "<< ((FAULT ? 0 : which[k]) * V + k)"),
    "a shortcut's gradient ignores its map": (
        "wrong|past the end", "residual_channels + source[k]] = passed",
        "residual_channels + (FAULT ? part.first + k : source[k])] = passed")}


@pytest.mark.parametrize("number", range(len(FAULTS) + 1), ids=["none", *FAULTS])
def test_planted_faults_are_found(emulation, number):
    faults = [changes for _, *changes in FAULTS.values()]
    with emulation.fault(faults, number):
        found = verdict(emulation)
    if number == 0:
        assert found == ""
    else:
        wanted = list(FAULTS.values())[number - 1][0]
        assert any(words in found for words in wanted.split("|")), found


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
    v, r = torch.ones(64, device=device), x.neg() / 2
    found = []
    for function, dtype in ((ops.bn_act, torch.float32), (ops.bn_act_ref, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, v, v / 3, r)]
        statistics = [v.to(dtype, copy=True) for _ in range(2)]
        out = function(*leaves[:3], *statistics, residual=leaves[3],
                       act=v.clone() if act else None)
        found.append([out, *statistics, *torch.autograd.grad(out, leaves, grad.to(dtype))])
    edge = found[1][0].abs() < 1e-5  # rounding may flip what ReLU lets through there
    for a, b in zip(*found, strict=True):
        shut = edge if a.dim() == 4 else torch.zeros_like(b, dtype=torch.bool)
        torch.testing.assert_close(a[~shut].double(), b[~shut], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_a_pruned_network_trains_and_evaluates_by_the_emulated_kernels(device, name):
    assert_same_network(name, "some", 6, device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, pool", [((3, 5, 3, 3), False), ((2, 64, 4, 4), False),
                                         ((5, 0, 2, 2), False), ((2, 64, 4, 2), True)])
def test_fake_kernels_tell_the_shapes_of_results(emulation, dtype, shape, pool):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
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
