"""gst_ext: how it is built, and E[BN] scores against a closed form and their reference."""
import os
import shutil
import subprocess
import sys

import mpmath
import pytest
import torch
from conftest import ROOT

from gst_ext import ops

# Where a test takes no `device` from conftest.py: it runs no kernel, or is too slow emulated.
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def test_the_extension_is_built():
    assert ops.available, ops.unavailable_reason
    toolkit = shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")
    if toolkit and torch.version.cuda and os.environ.get("GST_CUDA") != "0":
        for name in ("ebn_score", "masked_conv2d", "masked_conv2d_backward", "bn_act",
                     "bn_act_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gst::{name}", "CUDA")


def test_the_kernels_are_built_for_the_gpus_here_or_for_each_kind_in_use(tmp_path):
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/any"):  # a toolkit, never called
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    code = """import os, runpy, sys, torch
torch.version.cuda, sys.argv = "13.0", ["setup.py", "--version"]
for present, given in ((False, ""), (True, ""), (True, "8.0+PTX")):
    torch.cuda.is_available, os.environ["TORCH_CUDA_ARCH_LIST"] = lambda: present, given
    runpy.run_path("setup.py", run_name="__main__")"""
    environment = os.environ | {"CUDA_HOME": str(tmp_path), "GST_CUDA": "auto"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    built = [line.split(" for ")[1] for line in done.stdout.splitlines() if " for " in line]
    assert built == ["7.5;8.0;9.0+PTX", "the GPUs here", "8.0+PTX"], done.stderr


def exact_ebn(gamma, beta, signed):
    """Section B.2.1's closed form in 60 digits."""
    with mpmath.workdps(60):
        g, b = mpmath.mpf(gamma), mpmath.mpf(beta)
        if g == 0:
            return max(b, mpmath.mpf(0))
        scale = g if signed else abs(g)
        return b * mpmath.ncdf(b / scale) + scale * mpmath.npdf(b / scale)


@pytest.mark.parametrize("signed", [False, True])
def test_ebn_score_keeps_its_relative_accuracy_far_into_the_tails(device, signed):
    ratios = [r * sign for r in (0, 1e-8, 0.3, 1, 2.7, 4.999, 5, 5.001, 8, 12.5, 20, 30)
              for sign in (1, -1)]
    pairs = [(g, g * r) for r in ratios for g in (1.0, -1.0, 0.01, -37.5)]
    pairs += [(0.0, 1.5), (0.0, -1.5), (0.0, 0.0)]
    gamma, beta = torch.tensor(pairs, dtype=torch.float64, device=device).T
    score = ops.ebn_score(gamma, beta, signed).cpu()
    for (g, b), got in zip(pairs, score.tolist(), strict=True):
        want = exact_ebn(g, b, signed)
        assert abs(mpmath.mpf(got) - want) <= mpmath.mpf(10) ** -11 * abs(want), (g, b)


@pytest.mark.parametrize("signed", [False, True])
def test_ebn_score_is_its_reference_also_of_strided_and_extreme_values(device, signed):
    generator = torch.Generator().manual_seed(1)
    gamma, beta = (3 * torch.randn(2, 514, dtype=torch.float64, generator=generator)).to(device)
    for part in (slice(None), slice(None, None, 3), slice(0, 0), slice(5, 6)):
        torch.testing.assert_close(ops.ebn_score(gamma[part], beta[part], signed),
                                   ops.ebn_score_ref(gamma[part], beta[part], signed),
                                   rtol=1e-11, atol=0)
    values = [0.0, -0.0, 5e-324, 1e-300, 1e-30, 1.0, -1.0, 1e30, -1e300, 1.7e308]
    for number, extreme in ((True, values), (False, [torch.nan, torch.inf, -torch.inf, 0.0, -2.0])):
        extreme = torch.tensor(extreme, dtype=torch.float64, device=device)
        pair = torch.cartesian_prod(extreme, extreme).T
        got, want = ops.ebn_score(*pair, signed), ops.ebn_score_ref(*pair, signed)
        if number:  # never NaN for finite input
            assert not got.isnan().any() and not want.isnan().any()
        else:
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ebn_score_of_a_narrow_type_is_the_float64_score_rounded_once(device, dtype):
    generator = torch.Generator().manual_seed(0)
    gamma, beta = torch.randn(2, 300, generator=generator).to(device, dtype)
    wide = ops.ebn_score(gamma.double(), beta.double())
    assert torch.equal(ops.ebn_score(gamma, beta), wide.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_ebn_score_passes_opcheck(device):
    gamma, beta = torch.randn(2, 17, device=device)
    torch.library.opcheck(torch.ops.gst.ebn_score.default, (gamma, beta, True))
