"""The CUDA kernels as C++: what the emulation must find, the same bits in any order, and a whole network by them."""
import pytest
import torch
import torch.nn.functional as F
from test_ext_blocks import LAYOUTS, draw, index, outcome, pair_of_networks
from torch._subclasses.fake_tensor import FakeTensorMode

from gst_ext import ops

CASES = {  # (n, c, h, w), all filters, residual_map; without one there is a pool
    "packs": ((5, 64, 9, 11), 70, "direct"), "idle columns": ((2, 36, 9, 7), 40, range(35, -1, -1)),
    "single": ((3, 5, 7, 9), 9, [3, -1, 0, -1, 5]), "no filters": ((2, 0, 3, 3), 9, "direct"),
    "pooled packs": ((5, 64, 6, 14), 70, None), "pooled, single": ((3, 5, 4, 6), 9, None)}


def case_of(name, dtype=torch.float32):
    """bn_act's arguments, and the gradient of its result."""
    shape, c_out, source = CASES[name]
    n, c, h, w = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    k = c if source in ("direct", None) else max(source, default=-1) + 1
    x, residual, grad = (draw(i, n, channels, h, w, dtype=dtype).contiguous(memory_format=LAYOUTS[1])
                         for i, channels in enumerate((c, k, c)))
    if source is None:
        residual, grad = None, F.avg_pool2d(grad, 2).contiguous(memory_format=LAYOUTS[1])
        x = x.round()  # so that windows have equal values
    vectors = [draw(3 + i, c_out, dtype=wide) for i in range(3)]
    return dict(x=x, gamma=vectors[0], beta=vectors[1], running_mean=vectors[2],
                running_var=draw(6, c_out, dtype=wide).abs() + 0.1,
                live=torch.randperm(c_out, generator=torch.Generator().manual_seed(1))[:c].sort().values,
                residual=residual, residual_map=None if source in ("direct", None) else index(source, "cpu"),
                act=torch.ones(c_out)), grad


def forward_and_backward(emulation, case, grad):
    """All that the two operators give."""
    case = {k: v if v is None else v.clone() for k, v in case.items()}
    pool = case["residual"] is None
    out, mean, invstd, gate = emulation.operators.bn_act(**case, measure=None, training=True, relu=True, pool=pool,
                                                         momentum=0.1, eps=1e-5, act_keep=0.9)
    back = emulation.operators.bn_act_backward(grad, case["x"], gate, case["gamma"], mean, invstd, case["live"],
                                               case["residual_map"], -1 if pool else case["residual"].shape[1], True,
                                               True, pool)
    return [out, case["running_mean"], case["running_var"], case["act"], *back, mean, invstd, gate]


def from_reference(case, grad):
    """What forward_and_backward gives first: eight tensors, seven without a residual."""
    case = {k: v if v is None else v.clone() for k, v in case.items()}
    leaves = [case[k].requires_grad_() for k in ("x", "gamma", "beta", "residual") if case[k] is not None]
    out = ops.bn_act_ref(**case, pool=case["residual"] is None)
    return [out.detach(), case["running_mean"], case["running_var"], case["act"],
            *torch.autograd.grad(out, leaves, grad)]


def verdict(emulation):
    """The first complaint of the emulation over all cases, or "wrong values" where they are; "" if all is well."""
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


def without(line, which=0):
    """Takes out an occurrence of a line."""
    def change(text):
        parts = text.split(line)
        return line.join(parts[:which + 1]) + line.join(parts[which + 1:])
    return change


def instead(old, new):
    return lambda text: text.replace(old, new)


BARRIER = "  __syncthreads();\n"
FAULTS = {
    "the first reduction is overwritten while it is read": (
        without("  __syncthreads();  // an earlier reduction may still be read\n"), "a race"),
    "a reduction is read before it is there": (without(BARRIER, 0), "a race|before it is written"),
    "the first total is overwritten while it is read": (
        without("  __syncthreads();  // an earlier total may still be read\n"), "a race"),
    "a total is read before it is there": (without(BARRIER, 1), "a race|before it is written"),
    "idle columns leave before a barrier": (
        instead("A sum[V] = {}, sum2[V] = {}", "if (!part.any) return;\n  A sum[V] = {}, sum2[V] = {}"), "a barrier"),
    "filters that do not exist leave before a barrier": (
        instead("  double sum = 0, sum2 = 0;\n", "  if (f >= p.c_out) return;\n  double sum = 0, sum2 = 0;\n"),
        "a barrier"),
    "shared memory is a thread too short": (instead("shared[V][kThreads]", "shared[V][kThreads - 1]"), "its bounds"),
    "blocks of more threads than there may be": (instead("kThreads = 256", "kThreads = 2048"), "a GPU refuses"),
    "rows past the last are read": (instead("if (row < rows) raw[j]", "if (row - j < rows) raw[j]"), "past the end"),
    "rows past the last are written": (instead("if (row >= p.rows) continue;", ""), "past the end"),
    "vectors begin between two": (instead("write(out + row * p.c + part.first",
                                          "write(out + row * p.c + part.first + (V > 1)"), "not aligned"),
    "no filter at all is read as all": (instead("return f < c ? f : -1;", "return f;"), "past the end"),
    "all chunks but the last are empty": (instead("groups ? (blockIdx.y + 1) * chunk", "groups ? blockIdx.y * chunk"),
                                       "wrong values"),
    "two chunks share a sum": (instead("static_cast<int64_t>(blockIdx.y) * 2 + slot", "blockIdx.y + slot"),
                               "wrong values"),
    "squares are taken from the plain sums": (instead("sum2 = total(partial, chunks, p.c, i, 1);",
                                                      "sum2 = total(partial, chunks, p.c, i, 0);"), "wrong values"),
    "act is given to filters by their place": (
        lambda text: text.replace("position(p.live, p.c, f) : -1;\n  const double seen",
                                  "(f < p.c ? f : -1) : -1;\n  const double seen"), "wrong values"),
    "rows share a bit of the gate": (instead("act_passes(a, lowest)) << (j * V + k)", "act_passes(a, lowest)) << k"),
                                     "wrong values"),
    "windows of one line lie in the next": (instead("(line * int64_t{2} + (j >> 1)) * width",
                                                    "(line * int64_t{2} + 2 - (j >> 1)) * width"), "wrong values"),
    "windows overlap": (instead("(static_cast<uint32_t>(g) - line * windows) * int64_t{2}",
                                "(static_cast<uint32_t>(g) - line * windows) * int64_t{1}"), "wrong values"),
    "a window's last largest value is taken": (instead("const bool better = j == 0 || a > top[k]",
                                                       "const bool better = j == 0 || a >= top[k]"), "wrong values"),
    "a window's gradient goes to its first value": (instead("<< (which[k] * V + k)", "<< k"), "wrong values"),
    "a shortcut's gradient ignores its map": (instead(
        "p.residual_width + source[k]] = gated", "p.residual_width + part.first + k] = gated"), "wrong|past the end"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(emulation, fault):
    change, words = FAULTS[fault]
    with emulation.fault(change):
        said = verdict(emulation)
    assert said and any(word in said for word in words.split("|")), said


def test_without_a_fault_there_is_no_complaint_and_the_kernels_have_run(emulation):
    before = emulation.counts()
    assert verdict(emulation) == ""
    launches, barriers, accesses = (after - b for after, b in zip(emulation.counts(), before))
    assert launches >= 5 * len(CASES) and barriers > 100 and accesses > 10_000


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_every_order_of_blocks_and_threads_gives_the_same_bits(emulation, dtype, name):
    case, grad = case_of(name, dtype)
    want = forward_and_backward(emulation, case, grad)
    for number in (1, 2, 3):
        with emulation.order(number):
            got = forward_and_backward(emulation, case, grad)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("act", [False, True])  # without, nothing is added up, and there are more and shorter chunks
def test_a_map_of_more_rows_than_all_chunks_take_at_a_time(emulation, act):
    x, grad = (draw(i, 19, 64, 31, 31, dtype=torch.float32).contiguous(memory_format=LAYOUTS[1]) for i in (0, 1))
    v = torch.ones(64)
    case = dict(x=x, gamma=v, beta=draw(2, 64, dtype=torch.float32), running_mean=v.clone(), running_var=v.clone(),
                live=None, residual=x.neg() / 2, residual_map=None, act=v.clone() if act else None)
    got, want = forward_and_backward(emulation, case, grad), from_reference(case, grad)
    for k, (a, b) in enumerate(zip(got, want)):
        if a is not None:
            edge = (want[0] < 1e-5) if k in (4, 7) else torch.zeros_like(b, dtype=torch.bool)  # a gate may flip there
            torch.testing.assert_close(a[~edge], b[~edge], rtol=1e-4, atol=1e-3 if k in (5, 6) else 1e-4)


@pytest.mark.parametrize("name", ["vgg11", "resnet18"])
def test_a_pruned_network_trains_and_evaluates_by_the_kernels_as_by_plain_pytorch(device, name):
    x, y = draw(0, 6, 3, 32, 32).contiguous(memory_format=LAYOUTS[1]).to(device), torch.arange(6).to(device)
    want, got = (outcome(model, x, y) for model in pair_of_networks(name, "some", device))
    scale = max(v.abs().max() for k, v in want.items() if k.startswith("d"))
    for k, v in want.items():
        floor = 1e-10 * scale if k.startswith("d") else 0
        torch.testing.assert_close(got[k], v, rtol=1e-5, atol=max(1e-7, floor), msg=lambda m: f"{k}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, pool", [((3, 5, 3, 3), False), ((2, 64, 4, 4), False), ((1, 12, 1, 2), False),
                                         ((5, 0, 2, 2), False), ((3, 5, 4, 6), True), ((2, 64, 4, 2), True)])
def test_what_is_said_of_the_kernels_results_before_they_run_is_so(emulation, dtype, shape, pool):
    vector = torch.ones(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    rest = *[None] * 5, True, True, pool, 0.1, 1e-5, 0.9
    got = emulation.operators.bn_act(torch.ones(shape, dtype=dtype), *[vector.clone() for _ in range(4)], *rest)
    with FakeTensorMode():
        like = torch.empty(shape, dtype=dtype, device="cuda")
        said = torch.ops.gst.bn_act(like, *[torch.empty(shape[1], dtype=vector.dtype, device="cuda")] * 4, *rest)
    for a, b in zip(got, said, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and (a.stride() == b.stride() or not a.numel())
