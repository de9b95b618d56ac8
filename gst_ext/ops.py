"""The compiled operators of the project, their pure-PyTorch references, and what PyTorch must know of them.

`available` says whether the extension is built and loads here, `unavailable_reason` what stands in the way; supports_device(device)
whether it was built for a device, too: where there is no CUDA toolkit, there are kernels for the CPU only.

Maps are compact: they hold the live channels only, live_out and live_in saying which of all the filters those are
(int64, ascending; None: all of them). Parameters, their gradients and statistics keep every filter. Build with
`python setup.py build_ext --inplace` (or `pip install .`). The references (`*_ref`) need no build. There is no second
derivative: for that, use the references.
"""
import contextlib
import ctypes
import math

import torch

from .errors import check, warn_once
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

try:
    from . import _C  # noqa: F401  (loading it registers torch.ops.gst)
    available = hasattr(torch.ops.gst, "winograd_filters")
    unavailable_reason = None if available else "it is an older build"
except ImportError as error:  # not built, or built for another torch
    available, unavailable_reason = False, str(error)


def supports_device(device):
    """Whether the built operators compute on such a torch device; the references compute on any."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return available and (device.type != "cuda" or has_kernel("gst::bn_act", "CUDA"))


def ebn_score_ref(gamma, beta, signed=False):
    """`ebn_score` in plain PyTorch; returns float64 whatever the input type.

    With u = |beta/gamma| it is max(beta, 0) + |gamma| (phi(u) - u Phi(-u)), whose bracket is phi(u) times one minus a
    Mills ratio: erfcx keeps its relative accuracy where Phi itself would have rounded to 0.
    """
    gamma, beta = gamma.detach().double(), beta.detach().double()
    negative = signed * (gamma < 0)
    scale = gamma.abs()
    beta = torch.where(negative, -beta, beta)
    u = torch.where(scale > 0, beta.abs() / scale, torch.inf).clamp(max=1e3)  # phi(40) is 0 already
    tail = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi) * (
        1 - u * math.sqrt(math.pi / 2) * torch.special.erfcx(u / math.sqrt(2)))
    score = beta.clamp(min=0) + scale * tail.clamp(min=0)
    return torch.where(negative, -score, score)


def ebn_score(gamma, beta, signed=False):
    """E[max(0, M)] for M ~ N(beta, |gamma|), |gamma| the standard deviation (B.2.1), for each of c filters.

    gamma, beta (c,), of one floating type, CPU or CUDA; computed in float64 and returned in their type. signed puts
    gamma for |gamma| (B.2.3), which for gamma < 0 makes it -E[max(0, -M)]. gamma = 0 gives max(beta, 0). Relative error
    at most 1e-11 for |beta/gamma| up to 30; never NaN for finite input. No gradient: scores choose, they do not train.
    Raises RuntimeError for other shapes, types or devices. Without the extension built for the device it is the
    reference, rounded.
    """
    if not supports_device(gamma.device):
        return ebn_score_ref(gamma, beta, signed).to(gamma.dtype)
    return torch.ops.gst.ebn_score(gamma.detach(), beta.detach(), signed)


def live_part(tensor, live):
    return tensor if live is None else tensor[live]


def masked_conv2d_ref(x, weight, bias=None, live_out=None, live_in=None, stride=1, padding=0):
    """`masked_conv2d` in plain PyTorch: the convolution of everything, with zero maps for the pruned inputs."""
    if live_in is not None:
        x = x.new_zeros(x.shape[0], weight.shape[1], *x.shape[2:]).index_copy(1, live_in, x)
    return F.conv2d(x, weight, bias, stride, padding)[:, slice(None) if live_out is None else live_out]


def masked_conv2d(x, weight, bias=None, live_out=None, live_in=None, stride=1, padding=0):
    """The convolution of the live filters over the live input channels: a pruned map is zero, so nothing reads it.

    x (n, len(live_in), h, w); weight (c_out, c_in, k, k) and bias (c_out,) or None, of x's type, in full; stride and
    padding whole numbers; any device. Returns (n, len(live_out), h', w'). Gradients have the full shape, and those of
    pruned filters and inputs are exactly 0. Raises RuntimeError for shapes, types or devices that do not fit.
    """
    return torch.ops.gst.masked_conv2d(x, weight, bias, live_out, live_in, stride, padding)


def mapped_residual(residual, residual_map):
    """The residual's channels where residual_map (c,) says, zeros where it says -1."""
    if residual_map is None:
        return residual
    return F.pad(residual, (0, 0, 0, 0, 1, 0))[:, residual_map.clamp(min=-1) + 1]


@torch.no_grad()
def update_statistic(statistic, live, seen, momentum):
    """statistic (c_out,) takes in what the live filters showed; a pruned one, whose map is zero, has shown 0."""
    if live is not None:
        seen = torch.zeros_like(statistic).index_copy(0, live, seen.to(statistic.dtype))
    statistic.copy_((1 - momentum) * statistic + momentum * seen)


def bn_act_ref(x, gamma, beta, running_mean, running_var, live=None, residual=None, residual_map=None, act=None,
               measure=None, training=True, relu=True, momentum=0.1, eps=1e-5, ema_decay=0.9, pool=False):
    """`bn_act` in plain PyTorch."""
    wide = x.to(gamma.dtype)
    mean, var = live_part(running_mean, live), live_part(running_var, live)
    if training:
        count = x.numel() // max(1, x.shape[1])
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
        update_statistic(running_mean, live, mean, momentum)
        update_statistic(running_var, live, var * (count / (count - 1)), momentum)
    scale, shift = live_part(gamma, live) / (var + eps).sqrt(), live_part(beta, live)
    a = (wide - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    if residual is not None:
        a = a + mapped_residual(residual, residual_map)
    if act is not None and (measure is None or measure):
        update_statistic(act, live, a.detach().abs().mean((0, 2, 3)), 1 - ema_decay)
    out = (a.relu() if relu else a).to(x.dtype)
    return F.max_pool2d(out, 2) if pool else out


def pools_itself(pool, residual, *size):
    """Whether the kernels do a 2x2 max-pool of maps of this size themselves, and never write the map before it."""
    return pool and residual is None and not any(s % 2 for s in size)


class BnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gamma, beta, running_mean, running_var, live, residual_map, act, measure, training,
                relu, pool, momentum, eps, ema_decay):
        out, mean, invstd, gate = torch.ops.gst.bn_act(
            x, gamma, beta, running_mean, running_var, live, residual, residual_map, act, measure, training, relu,
            pool, momentum, eps, ema_decay)
        ctx.save_for_backward(x, gate, gamma, mean, invstd, live, residual_map)
        ctx.rest = -1 if residual is None else residual.shape[1], training, relu, pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dgamma, dbeta, dresidual = torch.ops.gst.bn_act_backward(grad, *ctx.saved_tensors, *ctx.rest)
        return dx, dresidual if ctx.rest[0] >= 0 else None, dgamma, dbeta, *[None] * 12


def bn_act(x, gamma, beta, running_mean, running_var, live=None, residual=None, residual_map=None, act=None,
           measure=None, training=True, relu=True, momentum=0.1, eps=1e-5, ema_decay=0.9, pool=False):
    """Batch norm, then the shortcut, then ReLU, of compact maps, and the act score's average on the way (A.4).

    x (n, c, h, w), float32, float64 or bfloat16 (CUDA: float16 too), in NCHW or channels-last memory; c = len(live).
    gamma, beta, running_mean, running_var (c_out,), float32 (float64 for a float64 x). training: normalise by the
    batch and update the running statistics, a pruned filter's as if its map of zeros had been seen; else normalise by
    them. residual (n, k, h, w), of x's type: channel residual_map[i] of it is added to channel i, none where that is
    -1, and no channel twice; without a map, k = c. act (c_out,) float32: takes in ema_decay and 1 - ema_decay parts of
    old and mean |a|, a the map before ReLU, but only if measure, one bool on the device, is None or true. pool ends it
    with a 2x2 max_pool2d. Returns (n, c, h, w) in x's layout, or (n, c, h // 2, w // 2). NaN and infinity come through
    as in plain PyTorch, ReLU and pool included.
    Raises RuntimeError for shapes, types or devices that do not fit, and in training for a single value per channel;
    on the CPU IndexError for a residual_map that points outside or twice at one channel. On a GPU the values of live
    and residual_map are not read back: such a map has undefined results there.
    """
    inside = pools_itself(pool, residual, *x.shape[2:])
    out = BnAct.apply(x, residual, gamma, beta, running_mean, running_var, live, residual_map, act, measure, training,
                      relu, inside, momentum, eps, ema_decay)
    return F.max_pool2d(out, 2) if pool and not inside else out


class ConvBnAct(torch.autograd.Function):
    """The two operators as one node of the graph: in a narrow network, nodes cost as much as what they compute."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, gamma, beta, running_mean, running_var, live_out, live_in, stride,
                padding, residual_map, act, measure, *rest):
        training = rest[0]
        a = torch.ops.gst.masked_conv2d(x, weight, None if training else bias, live_out, live_in, stride, padding)
        left_out = bias.to(gamma.dtype) if training and bias is not None else None
        out, mean, invstd, gate = torch.ops.gst.bn_act(a, gamma, beta, running_mean, running_var, live_out, residual,
                                                       residual_map, act, measure, *rest, left_out)
        ctx.save_for_backward(x, weight, bias, a, gate, gamma, mean, invstd, live_out, live_in, residual_map)
        ctx.conv = stride, padding
        ctx.norm = -1 if residual is None else residual.shape[1], *rest[:3]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, a, gate, gamma, mean, invstd, live_out, live_in, residual_map = ctx.saved_tensors
        da, dgamma, dbeta, dresidual = torch.ops.gst.bn_act_backward(grad, a, gate, gamma, mean, invstd, live_out,
                                                                     residual_map, *ctx.norm)
        has_bias = bias is not None and not ctx.norm[1]
        dx, dweight, dbias = torch.ops.gst.masked_conv2d_backward(da, x, weight, has_bias, live_out, live_in, *ctx.conv,
                                                                  list(ctx.needs_input_grad[:3]))
        if bias is not None and not has_bias:
            dbias = torch.zeros_like(bias)
        found = [dx, dweight, dbias, dresidual, dgamma, dbeta]
        return *[g if wanted else None for g, wanted in zip(found, ctx.needs_input_grad)], *[None] * 15


FOLDED = WeakTensorKeyDictionary()  # a block's weight: (shapes, copies of what it was folded from, weight, bias)


def may_fold(x, weight, residual_map, act, training):
    """Whether a block is evaluated on the CPU without anything that a convolution of folded weights cannot give."""
    return (not training and not torch.is_grad_enabled() and act is None and residual_map is None and
            isinstance(weight, torch.nn.Parameter) and x.device.type == "cpu" and x.numel() > 0 and
            x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available() and
            hasattr(torch.ops.mkldnn, "_convolution_pointwise"))


def folded(x, weight, bias, gamma, beta, mean, var, live_out, live_in, stride, padding, eps):
    """(weight, bias) of the convolution that is a block's convolution and batch norm, the weight packed by the library
    or, where that is faster, transformed for winograd_conv2d; None where the two are not all finite, since what is
    infinite, or no number, comes through a sum of folded products otherwise than through the block.

    They are kept while whatever they were made of has the same bits. A tensor's version would be cheaper to ask for,
    but fused optimisers and changes through .data do not count it up.
    """
    made_of = weight, bias, gamma, beta, mean, var, live_out, live_in
    shapes = *x.shape, stride, padding, eps
    kept = FOLDED.get(weight)
    if kept is None or kept[0] != shapes or not all(
            a is b if a is None or b is None else torch.ops.gst.same_bits(a, b) for a, b in zip(made_of, kept[1])):
        scale, part = live_part(gamma, live_out) / (live_part(var, live_out) + eps).sqrt(), live_part(weight, live_out)
        part = (part if live_in is None else part[:, live_in]) * scale.view(-1, 1, 1, 1)
        center = live_part(mean, live_out) if bias is None else live_part(mean - bias, live_out)
        part = part.contiguous(memory_format=torch.channels_last)
        if torch.ops.gst.winograd_pays(x, part, len(part), stride, padding):
            packed = torch.ops.gst.winograd_filters(part, None, None, *x.shape[2:], False)
        else:
            packed = torch.ops.mkldnn._reorder_convolution_weight(part, [padding] * 2, [stride] * 2, [1, 1], 1,
                                                                  list(x.shape))
        copies = [None if t is None else t.detach().clone() for t in made_of]
        shift = live_part(beta, live_out) - center * scale
        finite = bool(part.isfinite().all()) and bool(shift.isfinite().all())
        FOLDED[weight] = kept = shapes, copies, (packed, shift) if finite else None
    return kept[2]


def folded_conv(x, weight, bias, stride, padding, residual, relu, pool):
    """The convolution of folded weights, with the shortcut done as its values are written, and Winograd's ReLU; the
    library's would turn NaN into 0, so a pass of its own does it, over the pooled map where there is a pool."""
    rest = [padding] * 2, [stride] * 2, [1, 1], 1
    x = x.contiguous(memory_format=torch.channels_last)
    if not weight.is_mkldnn:
        out, relu = torch.ops.gst.winograd_conv2d(x, weight, len(bias), bias, residual, relu), False
    elif residual is None:
        out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *rest, "none", [], "")
    else:
        residual = residual.contiguous(memory_format=torch.channels_last)
        out = torch.ops.mkldnn._convolution_pointwise.binary(x, residual, weight, bias, *rest, "add", None, None, [],
                                                             "")
    out = F.max_pool2d(out, 2) if pool else out
    return out.relu_() if relu else out


def masked_conv_bn_act(x, weight, bias, gamma, beta, running_mean, running_var, live_out=None, live_in=None, stride=1,
                       padding=1, residual=None, residual_map=None, act=None, measure=None, training=True, relu=True,
                       momentum=0.1, eps=1e-5, ema_decay=0.9, pool=False, score=None):
    """A network's block in one call: `masked_conv2d`, then `bn_act`; their arguments, errors and gradients.

    In training batch norm takes the bias out again, so it is not added in the first place but to the mean that
    running_mean takes in, and its gradient is exactly 0. In plain PyTorch it is a sum that cancels but for rounding,
    which Adam scales up to steps of the learning rate: there the bias wanders, without effect on a batch's output; here
    it moves by weight decay alone.

    Under autocast, x, weight, bias and residual are cast as for a convolution. With score "ebn" or "ebn-signed" (B.2)
    it returns (out, scores (c_out,)), else out (n, len(live_out), h', w').
    """
    if torch.is_autocast_enabled(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        x, weight, residual = (t if t is None else t.to(narrow) for t in (x, weight, residual))
        bias = bias if bias is None or training else bias.to(narrow)
    there = supports_device(x.device)
    if there and training:
        FOLDED.pop(weight, None)  # which is memory
    parts = None
    if there and may_fold(x, weight, residual_map, act, training) and (live_out is None or len(live_out)):
        parts = folded(x, weight, bias, gamma, beta, running_mean, running_var, live_out, live_in, stride, padding, eps)
    if parts is not None:
        out = folded_conv(x, *parts, stride, padding, residual, relu, pool)
    elif there:
        size = ((s + 2 * padding - k) // stride + 1 for s, k in zip(x.shape[2:], weight.shape[2:]))
        inside = pools_itself(pool, residual, *size)
        out = ConvBnAct.apply(x, weight, bias, residual, gamma, beta, running_mean, running_var, live_out, live_in,
                              stride, padding, residual_map, act, measure, training, relu, inside, momentum, eps,
                              ema_decay)
        out = F.max_pool2d(out, 2) if pool and not inside else out
    else:
        out = masked_conv_bn_act_ref(x, weight, bias, gamma, beta, running_mean, running_var, live_out, live_in, stride,
                                     padding, residual, residual_map, act=act, measure=measure, training=training,
                                     relu=relu, momentum=momentum, eps=eps, ema_decay=ema_decay, pool=pool)
    return out if score is None else (out, ebn_score(gamma, beta, signed=score == "ebn-signed"))


def masked_conv_bn_act_ref(x, weight, bias, gamma, beta, running_mean, running_var, live_out=None, live_in=None,
                           stride=1, padding=1, residual=None, residual_map=None, score=None, **options):
    """`masked_conv_bn_act` in plain PyTorch; **options as for `bn_act`."""
    a = masked_conv2d_ref(x, weight, bias, live_out, live_in, stride, padding)
    out = bn_act_ref(a, gamma, beta, running_mean, running_var, live_out, residual, residual_map, **options)
    return out if score is None else (out, ebn_score_ref(gamma, beta, signed=score == "ebn-signed").to(gamma.dtype))


def setup_masked_conv2d(ctx, inputs, output):
    x, weight, bias, live_out, live_in, *ctx.rest = inputs
    ctx.save_for_backward(x, weight, live_out, live_in)
    ctx.has_bias = bias is not None


def masked_conv2d_gradient(ctx, grad):
    x, weight, live_out, live_in = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]]
    gradients = torch.ops.gst.masked_conv2d_backward(grad, x, weight, ctx.has_bias, live_out, live_in, *ctx.rest, need)
    return *[g if wanted else None for g, wanted in zip(gradients, need)], None, None, None, None


if available:
    @torch.library.register_fake("gst::ebn_score")
    def _(gamma, beta, signed=False):
        return torch.empty_like(gamma)

    @torch.library.register_fake("gst::masked_conv2d")
    def _(x, weight, bias, live_out, live_in, stride, padding):
        c_out = weight.shape[0] if live_out is None else live_out.shape[0]
        part = weight.new_empty(c_out, x.shape[1], *weight.shape[2:])
        return F.conv2d(x, part, None if bias is None else bias.new_empty(c_out), stride, padding)

    @torch.library.register_fake("gst::masked_conv2d_backward")
    def _(grad, x, weight, has_bias, live_out, live_in, stride, padding, need):
        shapes = x, weight, weight.new_empty(weight.shape[0])
        need = [need[0], need[1], need[2] and has_bias]
        return tuple(torch.empty_like(t) if wanted else x.new_empty(0) for t, wanted in zip(shapes, need))

    @torch.library.register_fake("gst::bn_act")
    def _(x, gamma, *rest):
        (n, c, h, w), pool = x.shape, rest[10]
        gate = -(-n * h * w // 32) * c  # channels-last
        if x.is_cuda:
            gate = -(-n * h * w // 4) * (c if c % (16 // x.element_size()) else c // 2)
        elif not pool and suggest_memory_format(x) == torch.contiguous_format:
            gate = n * c * (-(-(h * w // 16) // 32) * 16 + h * w % 16)
        out = x[:, :, :h // 2, :w // 2].contiguous(memory_format=torch.channels_last) if pool else torch.empty_like(x)
        return out, gamma.new_empty(c), gamma.new_empty(c), x.new_empty(
            gate, dtype=torch.uint8 if x.is_cuda else torch.int32)

    @torch.library.register_fake("gst::bn_act_backward")
    def _(grad, x, gate, gamma, mean, invstd, live, residual_map, residual_channels, training, relu, pool):
        dresidual = x.new_empty(0)
        if residual_channels >= 0:
            last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            dresidual = x.new_empty(x.shape[0], residual_channels, *x.shape[2:])
            dresidual = dresidual.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        dx = torch.empty_like(x, memory_format=torch.channels_last if pool else torch.preserve_format)
        return dx, torch.empty_like(gamma), torch.empty_like(gamma), dresidual

    torch.library.register_autograd("gst::masked_conv2d", masked_conv2d_gradient, setup_context=setup_masked_conv2d)


def choose_backend(backend, device):
    """Returns "ext" or "eager" for the option --backend; warns if "auto" lacks the extension."""
    available = supports_device(device)
    reason = unavailable_reason or "it has no CUDA kernels: there was no CUDA toolkit"
    check(available or backend != "ext", "--backend ext, but the extension is not built for this "
          f"device ({reason}): run bash runs.sh setup, or use --backend eager")
    if not available and backend == "auto":
        warn_once(f"train.py: the extension is not built for this device ({reason}); plain PyTorch "
                  "replaces it. bash runs.sh setup builds it")
    return "ext" if available and backend != "eager" else "eager"


def keep_freed_memory():
    """Tells glibc to keep freed memory: returning activations each step costs a fifth of it."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no memory map of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
