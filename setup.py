"""Builds gst_ext: `pip install --no-build-isolation .` or `python setup.py build_ext --inplace`.

The CPU kernels always; the CUDA kernels too where nvcc and a CUDA build of PyTorch are found, GPU
present or not. GST_CUDA=0 leaves them out, GST_CUDA=1 fails if they cannot be built. They are
built for the GPUs in the machine or, if there is none, for Turing (7.5), Ampere (8.0), Hopper (9.0)
and, as PTX, newer ones; TORCH_CUDA_ARCH_LIST chooses others.
"""
import glob
import os
import shutil
import site
import sys
import sysconfig

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit("setup.py: PyTorch is not installed here: install requirements.txt first, then pip "
             "install --no-build-isolation .")

wanted, compiler = os.environ.get("GST_CUDA", "auto"), os.environ.get("CXX", "c++")
if wanted not in ("0", "1", "auto"):
    sys.exit(f"setup.py: GST_CUDA={wanted}: give 0 or 1")
if not shutil.which(compiler):
    sys.exit(f"setup.py: no C++ compiler {compiler} was found: install g++ (or set CXX)")

# PyTorch takes the folder above the nvcc on the PATH, which may be a link or a script elsewhere.
nvcc = os.path.realpath(shutil.which("nvcc") or "")
homes = os.environ.get("CUDA_HOME"), os.path.dirname(os.path.dirname(nvcc)), "/usr/local/cuda"
homes = [home for home in homes if home and os.path.exists(f"{home}/bin/nvcc")
         and os.path.exists(f"{home}/include/cuda_runtime.h")]
problem = None  # what stands in the way of the CUDA kernels
if wanted == "0":
    problem = "GST_CUDA=0"
elif torch.version.cuda is None:
    problem = "this PyTorch is built without CUDA: install the CUDA build"
elif not homes:
    problem = "no CUDA toolkit (nvcc and cuda_runtime.h) was found: install it or set CUDA_HOME"
else:
    os.environ["CUDA_HOME"] = homes[0]
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "7.5;8.0;9.0+PTX"  # PyTorch's default: the GPUs here
if wanted == "1" and problem:
    sys.exit(f"setup.py: GST_CUDA=1, but {problem}")
archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or "the GPUs here"
print("gst_ext: the CPU kernels " + (f"only: {problem}" if problem else f"and CUDA's for {archs}"))

from torch.utils.cpp_extension import (  # noqa: E402  (reads CUDA_HOME)
    BuildExtension, CppExtension, CUDAExtension)

sources = ["csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
flags = {"cxx": ["-O3", "-fno-trapping-math", "-fno-math-errno", "-Wall", "-Wno-unused-function"]}
if sys.platform == "linux":
    # For at::parallel_for. It is not linked with -fopenmp: the threads must be those of the OpenMP
    # that PyTorch brings along, whose symbols are found when the extension is loaded; a second
    # OpenMP's would fight them for the cores.
    flags["cxx"].append("-fopenmp")
include_dirs = []
if not problem:
    sources += sorted(glob.glob("csrc/cuda/*.c*"))
    flags["nvcc"] = ["-O3", "--Werror", "all-warnings"]
    # PyTorch's headers want cusparse.h and others, which the nvidia pip packages bring if the
    # toolkit lacks them.
    folders = {*site.getsitepackages(), sysconfig.get_paths()["purelib"],
               os.path.dirname(os.path.dirname(torch.__file__))}
    include_dirs = sorted(p for f in folders for p in glob.glob(f"{f}/nvidia/cu*/include"))
extension = (CppExtension if problem else CUDAExtension)(
    "gst_ext._C", sources, include_dirs=include_dirs, extra_compile_args=flags)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})  # else: pyproject.toml
