"""The compiled operators, their references in plain PyTorch (`*_ref`), and their fake kernels.

`available` says whether the extension is built and loads here, `unavailable_reason` why it does
not, supports_device(device) whether it has kernels for a device: without a CUDA toolkit, only for
the CPU. Where it has none, the references compute.

Maps are compact: they hold the live channels only. live_out and live_in say which of all filters
or input channels those are (int64, ascending; None: all). Parameters, their gradients and
statistics keep every filter. Only the references have a second derivative.
"""
import contextlib
import ctypes
import math
import platform

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import check, warn_once

try:
    from . import _C  # noqa: F401  (loading it registers torch.ops.gst)
    available = hasattr(torch.ops.gst, "winograd_filters")
    unavailable_reason = None if available else "it is an older build"
except ImportError as error:  # not built, or built for another torch
    available, unavailable_reason = False, str(error)

# Private names of PyTorch: without them a block is evaluated by the kernels that train it.
mkldnn_conv = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
mkldnn_pack = getattr(torch.ops.mkldnn, "_reorder_convolution_weight", None)


def supports_device(device):
    """Whether the built operators compute on this torch.device."""
    # A private name: without it a GPU gets the references.
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    return available and (device.type != "cuda" or has_kernel("gst::bn_act", "CUDA"))


def choose_backend(backend, device):
    """Returns "ext" or "eager" for the option --backend; warns if "auto" lacks the extension."""
    supported = supports_device(device)
    reason = unavailable_reason or "it has no CUDA kernels: there was no CUDA toolkit"
    check(supported or backend != "ext", "--backend ext, but the extension is not built for this "
          f"device ({reason}): run bash runs.sh setup, or use --backend eager")
    if not supported and backend == "auto":
        warn_once(f"train.py: the extension is not built for this device ({reason}); plain PyTorch "
                  "replaces it. bash runs.sh setup builds it")
    return "ext" if supported and backend != "eager" else "eager"


def cpu_multiplies_bf16():
    """Whether this CPU has instructions for bf16, by names of PyTorch that are private."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory():
    """Tells glibc to keep freed memory: returning it costs a fifth of a step.

    With the extension tensors then fit where others of their size were freed, which lowers the
    peak of ResNet18's memory by a fifth."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no memory map of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
        torch.ops.gst.reuse_freed_memory()


def ebn_score_ref(gamma, beta, signed=False):
    """`ebn_score` in plain PyTorch, in float64.

    With u = |beta/gamma| it is max(beta, 0) + |gamma| (phi(u) - u Phi(-u)); erfcx is accurate where
    Phi itself rounds to 0.
    """
    gamma, beta = gamma.detach().double(), beta.detach().double()
    negative = signed * (gamma < 0)
    scale = gamma.abs()
    beta = torch.where(negative, -beta, beta)
    u = torch.where(scale > 0, beta.abs() / scale, torch.inf).clamp(max=1e3)  # phi(40) is 0
    tail = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi) * (
        1 - u * math.sqrt(math.pi / 2) * torch.special.erfcx(u / math.sqrt(2)))
    score = beta.clamp(min=0) + scale * tail.clamp(min=0)
    return torch.where(negative, -score, score)


def ebn_score(gamma, beta, signed=False):
    """E[max(0, M)] for M ~ N(beta, |gamma|), |gamma| the standard deviation (B.2.1), of filters.

    Its relative error is at most 1e-11 for |beta/gamma| up to 30. It is never NaN for finite input
    and has no gradient.

    Args:
        gamma, beta (c,): batch norm's scale and shift, of one floating type.
        signed: gamma in place of |gamma| (B.2.3), for gamma < 0 the same as -E[max(0, -M)].

    Returns:
        (c,), of gamma's type; max(beta, 0) where gamma is 0.

    Raises:
        RuntimeError: for shapes, types or devices that do not fit, as every operator here.
    """
    if not supports_device(gamma.device):
        return ebn_score_ref(gamma, beta, signed).to(gamma.dtype)
    return torch.ops.gst.ebn_score(gamma.detach(), beta.detach(), signed)


def live_part(tensor, live):
    return tensor if live is None else tensor[live]


def masked_conv2d_ref(x, weight, bias=None, live_out=None, live_in=None, stride=1, padding=0):
    """`masked_conv2d` in plain PyTorch, of all filters over all inputs."""
    if live_in is not None:
        x = x.new_zeros(x.shape[0], weight.shape[1], *x.shape[2:]).index_copy(1, live_in, x)
    a = F.conv2d(x, weight, bias, stride, padding)
    return a if live_out is None else a[:, live_out]


def needed(ctx, *gradients):
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad))


class MaskedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *rest):
        ctx.save_for_backward(x, weight)
        ctx.rest = rest
        return torch.ops.gst.masked_conv2d(x, weight, bias, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        need = list(ctx.needs_input_grad[:3])
        found = torch.ops.gst.masked_conv2d_backward(grad, *ctx.saved_tensors, *ctx.rest, need)
        return needed(ctx, *found, *[None] * 4)


def masked_conv2d(x, weight, bias=None, live_out=None, live_in=None, stride=1, padding=0):
    """The convolution of the live filters over the live input channels.

    Gradients have their tensor's full shape; those of pruned filters and inputs are exactly 0.

    Args:
        x (n, len(live_in), h, w): the live input channels.
        weight (c_out, c_in, k, k), bias (c_out,) or None: of x's type.

    Returns:
        (n, len(live_out), h', w').
    """
    function = MaskedConv2d.apply if supports_device(x.device) else masked_conv2d_ref
    return function(x, weight, bias, live_out, live_in, stride, padding)


@torch.no_grad()
def update_statistic(statistic, live, batch, momentum):
    """statistic (c_out,) takes in the live filters' batch values, and 0 for a pruned filter."""
    if live is not None:
        batch = torch.zeros_like(statistic).index_copy(0, live, batch.to(statistic.dtype))
    statistic.copy_((1 - momentum) * statistic + momentum * batch)


def bn_act_ref(x, gamma, beta, running_mean, running_var, live=None, residual=None,
               residual_map=None, act=None, training=True, relu=True, momentum=0.1, eps=1e-5,
               ema_decay=0.9, pool=False):
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
    if residual_map is not None:  # channel 0 is zeros, for -1
        residual = F.pad(residual, (0, 0, 0, 0, 1, 0))[:, residual_map.clamp(min=-1) + 1]
    if residual is not None:
        a = a + residual
    if act is not None:
        update_statistic(act, live, a.detach().abs().mean((0, 2, 3)), 1 - ema_decay)
    out = (a.relu() if relu else a).to(x.dtype)
    return F.max_pool2d(out, 2) if pool else out


class ConvBnAct(torch.autograd.Function):
    """masked_conv2d, unless weight is None, and bn_act.

    One node, because in a narrow network a node costs as much as what it computes; a Function,
    because register_autograd takes no operator that updates statistics.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, mean, var, live_out, live_in, stride, padding,
                residual, residual_map, act, training, relu, momentum, eps, ema_decay, pool):
        a, omitted = x, None
        if weight is not None:
            a = torch.ops.gst.masked_conv2d(x, weight, None if training else bias, live_out,
                                            live_in, stride, padding)
            omitted = bias.to(gamma.dtype) if training and bias is not None else None
        out, mean, invstd, relu_bits = torch.ops.gst.bn_act(
            a, gamma, beta, mean, var, live_out, residual, residual_map, act, training, relu, pool,
            momentum, eps, ema_decay, omitted)
        ctx.save_for_backward(x, weight, bias, a, relu_bits, gamma, mean, invstd, live_out,
                              residual_map, live_in)
        ctx.conv = stride, padding
        ctx.norm = -1 if residual is None else residual.shape[1], training, pool
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, *saved, live_in = ctx.saved_tensors
        dx, dgamma, dbeta, dresidual = torch.ops.gst.bn_act_backward(grad, *saved, *ctx.norm)
        dweight = dbias = None
        if weight is not None:
            omitted = bias is not None and ctx.norm[1]
            need = [*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and not omitted]
            dx, dweight, dbias = torch.ops.gst.masked_conv2d_backward(
                dx, x, weight, saved[-2], live_in, *ctx.conv, need)
            dbias = torch.zeros_like(bias) if omitted else dbias
        return needed(ctx, dx, dweight, dbias, dgamma, dbeta, *[None] * 6, dresidual, *[None] * 8)


def conv_bn_act(x, weight, *rest):
    """masked_conv_bn_act without folding, or its reference.

    The kernels pool maps of even size without a shortcut: the map before is never written."""
    if not supports_device(x.device):
        return masked_conv_bn_act_ref(x, weight, *rest)
    *rest, pool = rest
    stride, padding, residual = rest[7:10]
    size = x.shape[2:] if weight is None else (
        (s + 2 * padding - k) // stride + 1 for s, k in zip(x.shape[2:], weight.shape[2:]))
    fused = pool and residual is None and not any(s % 2 for s in size)
    out = ConvBnAct.apply(x, weight, *rest, fused)
    return F.max_pool2d(out, 2) if pool and not fused else out


def bn_act(x, gamma, beta, running_mean, running_var, live=None, residual=None, residual_map=None,
           act=None, training=True, relu=True, momentum=0.1, eps=1e-5, ema_decay=0.9, pool=False):
    """Batch norm, then the shortcut, then ReLU; updates the act score's moving average (A.4).

    NaN and infinity come through as in plain PyTorch.

    Args:
        x (n, c, h, w): compact maps, float32, float64 or bfloat16, copied if not channels-last.
        gamma, beta, running_mean, running_var (c_out,): float64 for a float64 x, else float32.
        live (c,): the filters that x is the maps of.
        residual (n, k, h, w): the shortcut, of x's type; k = c without a residual_map.
        residual_map (c,): the residual's channel that is added to each, -1 for none, none twice.
        act (c_out,): float32, the moving average of mean |a|, a the map before ReLU.
        training: normalise by the batch and update the running statistics (and act) with it, by 0
            for a pruned filter; else normalise by them.
        pool: ends with a 2x2 max_pool2d.

    Returns:
        (n, c, h, w), or (n, c, h // 2, w // 2) with pool, channels-last.

    Raises:
        RuntimeError: in training, for a single value per channel.
        IndexError: on the CPU, for a live filter or residual channel that does not exist or a
            residual channel that is mapped twice. On a GPU the results are undefined then.
    """
    return conv_bn_act(x, None, None, gamma, beta, running_mean, running_var, live, None, 1, 0,
                       residual, residual_map, act, training, relu, momentum, eps, ema_decay, pool)


# weight: (shapes, copies of what was folded, what fold returned)
FOLDED_WEIGHTS = WeakTensorKeyDictionary()


def may_fold(x, weight, live_out, residual_map, act, training):
    """Whether a convolution of folded weights can evaluate a block."""
    return (not training and not torch.is_grad_enabled() and act is None and residual_map is None
            and isinstance(weight, torch.nn.Parameter) and x.device.type == "cpu"
            and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
            and (live_out is None or len(live_out) > 0)
            and torch.backends.mkldnn.is_available() and None not in (mkldnn_conv, mkldnn_pack))


def fold(x, weight, bias, gamma, beta, mean, var, live_out, live_in, stride, padding, eps):
    """Batch norm folded into the convolution before it.

    Returns (weight, bias), the weight packed by the library or, where that is faster, transformed
    for winograd_conv2d; None if they are not all finite, which folding would pass on differently.
    The result is kept while all that it is made of has the same bits: fused optimisers and changes
    through .data do not change the versions of tensors.
    """
    sources = weight, bias, gamma, beta, mean, var, live_out, live_in
    shapes = *x.shape, stride, padding, eps
    old_shapes, copies, folded = FOLDED_WEIGHTS.get(weight, (None, None, None))
    if old_shapes == shapes and all(
            a is b if a is None or b is None else torch.ops.gst.same_bits(a, b)
            for a, b in zip(sources, copies)):
        return folded
    scale = live_part(gamma, live_out) / (live_part(var, live_out) + eps).sqrt()
    part = live_part(weight, live_out)
    part = (part if live_in is None else part[:, live_in]) * scale.view(-1, 1, 1, 1)
    part = part.contiguous(memory_format=torch.channels_last)
    center = live_part(mean if bias is None else mean - bias, live_out)
    shift = live_part(beta, live_out) - center * scale
    if torch.ops.gst.winograd_pays(x, part, len(part), stride, padding):
        packed = torch.ops.gst.winograd_filters(part, None, None, *x.shape[2:], False)
    else:
        packed = mkldnn_pack(part, [padding] * 2, [stride] * 2, [1, 1], 1, list(x.shape))
    folded = (packed, shift) if part.isfinite().all() and shift.isfinite().all() else None
    copies = [None if t is None else t.detach().clone() for t in sources]
    FOLDED_WEIGHTS[weight] = shapes, copies, folded
    return folded


def folded_conv(x, weight, bias, stride, padding, residual, relu, pool):
    """The convolution of folded weights, with the shortcut, ReLU and pool.

    The library's own ReLU would turn NaN into 0, so there it is a pass over the pooled map.
    """
    options = [padding] * 2, [stride] * 2, [1, 1], 1
    x = x.contiguous(memory_format=torch.channels_last)
    if not weight.is_mkldnn:
        out = torch.ops.gst.winograd_conv2d(x, weight, len(bias), bias, residual, relu)
        relu = False
    elif residual is None:
        out = mkldnn_conv(x, weight, bias, *options, "none", [], "")
    else:
        residual = residual.contiguous(memory_format=torch.channels_last)
        out = mkldnn_conv.binary(x, residual, weight, bias, *options, "add", None, None, [], "")
    out = F.max_pool2d(out, 2) if pool else out
    return out.relu_() if relu else out


def masked_conv_bn_act(x, weight, bias, gamma, beta, running_mean, running_var, live_out=None,
                       live_in=None, stride=1, padding=1, residual=None, residual_map=None,
                       act=None, training=True, relu=True, momentum=0.1, eps=1e-5, ema_decay=0.9,
                       pool=False):
    """A network's block: `masked_conv2d`, then `bn_act` (see docs/extension.md).

    In training batch norm takes the bias out again, so it is added to the running mean alone and
    its gradient is exactly 0. Under autocast, x, weight, bias and residual are cast as for a
    convolution. On the CPU, batch norm is folded into the weights in evaluation without gradients.
    Arguments, results and errors are those of the two.
    """
    if torch.is_autocast_enabled(x.device.type):
        narrow = torch.get_autocast_dtype(x.device.type)
        x, weight, residual = (t if t is None else t.to(narrow) for t in (x, weight, residual))
        bias = bias if bias is None or training else bias.to(narrow)
    if training:
        FOLDED_WEIGHTS.pop(weight, None)  # they will change: free their memory
    if available and may_fold(x, weight, live_out, residual_map, act, training):
        folded = fold(x, weight, bias, gamma, beta, running_mean, running_var, live_out, live_in,
                      stride, padding, eps)
        if folded is not None:
            return folded_conv(x, *folded, stride, padding, residual, relu, pool)
    return conv_bn_act(x, weight, bias, gamma, beta, running_mean, running_var, live_out, live_in,
                       stride, padding, residual, residual_map, act, training, relu, momentum, eps,
                       ema_decay, pool)


def masked_conv_bn_act_ref(x, weight, bias, gamma, beta, running_mean, running_var, live_out=None,
                           live_in=None, stride=1, padding=1, *args, **options):
    """`masked_conv_bn_act` in plain PyTorch; of bn_act alone if weight is None."""
    if weight is not None:
        x = masked_conv2d_ref(x, weight, bias, live_out, live_in, stride, padding)
    return bn_act_ref(x, gamma, beta, running_mean, running_var, live_out, *args, **options)


def empty_map(like, c, h, w):
    return like.new_empty(len(like), c, h, w).contiguous(memory_format=torch.channels_last)


# Fake kernels give the shapes, types and strides of results to torch.compile and torch.export.
if available:
    @torch.library.register_fake("gst::ebn_score")
    def _(gamma, beta, signed=False):
        return torch.empty_like(gamma)

    @torch.library.register_fake("gst::masked_conv2d")
    def _(x, weight, bias, live_out, live_in, stride, padding):
        c_out = len(weight if live_out is None else live_out)
        part = weight.new_empty(c_out, x.shape[1], *weight.shape[2:])
        return F.conv2d(x, part, bias if bias is None else bias[:c_out], stride, padding)

    @torch.library.register_fake("gst::masked_conv2d_backward")
    def _(grad, x, weight, live_out, live_in, stride, padding, need):
        bias = x.new_empty(len(weight))
        return tuple(torch.empty_like(t) if needed else x.new_empty(0)
                     for t, needed in zip((x, weight, bias), need))

    @torch.library.register_fake("gst::bn_act")
    def _(x, gamma, beta, running_mean, running_var, live, residual, residual_map, act, training,
          relu, pool, *rest):
        (n, c, h, w), step = x.shape, 2 if pool else 1
        bits = -(-n * h * w // 32) * c * 4
        if x.is_cuda:
            bits = -(-n * h * w // 4) * (c if c % (16 // x.element_size()) else c // 2)
        return (empty_map(x, c, h // step, w // step), gamma.new_empty(c), gamma.new_empty(c),
                x.new_empty(bits, dtype=torch.uint8))

    @torch.library.register_fake("gst::bn_act_backward")
    def _(grad, x, relu_bits, gamma, mean, invstd, live, residual_map, residual_channels, *rest):
        dresidual = x.new_empty(0)
        if residual_channels >= 0:
            dresidual = empty_map(x, residual_channels, *x.shape[2:])
        dgamma = torch.empty_like(gamma)
        return empty_map(x, *x.shape[1:]), dgamma, torch.empty_like(gamma), dresidual
