"""The compiled operators of the project, their pure-PyTorch references, and what PyTorch must know of them.

    import gst_ext
    gst_ext.available            # whether the extension is built and loads here
    gst_ext.ebn_score(gamma, beta)

Build with `python setup.py build_ext --inplace` (or `pip install .`). The references (`*_ref`) need no build.
"""
import math

import torch

try:
    from . import _C  # noqa: F401  (loading it registers torch.ops.gst)
    available, why_not = True, None
except ImportError as error:  # not built, or built for another torch
    available, why_not = False, str(error)


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
    Raises RuntimeError for other shapes, types or devices. Without the built extension it is the reference, rounded.
    """
    if not available:
        return ebn_score_ref(gamma, beta, signed).to(gamma.dtype)
    return torch.ops.gst.ebn_score(gamma.detach(), beta.detach(), signed)


if available:
    @torch.library.register_fake("gst::ebn_score")
    def _(gamma, beta, signed=False):
        return torch.empty_like(gamma)
