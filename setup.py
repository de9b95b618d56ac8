"""Builds gst_ext: `pip install --no-build-isolation .` or `python setup.py build_ext --inplace`.

The CPU kernels always; the CUDA kernels too where nvcc and a CUDA build of PyTorch are found, whether or not a GPU is.
GST_CUDA=0 leaves them out, GST_CUDA=1 fails if they cannot be built. They are built for the GPUs in the machine, or
where there is none for Turing (7.5), Ampere (8.0) and Hopper (9.0), and PTX for newer ones; TORCH_CUDA_ARCH_LIST
chooses other architectures.
"""
import glob
import os
import pathlib
import shutil
import site
import sys
import sysconfig

from setuptools import setup

try:
    import torch
except ImportError:
    sys.exit("setup.py: PyTorch is not installed here: install requirements.txt first, then pip install "
             "--no-build-isolation .")


def cuda_home():
    """The CUDA toolkit's folder: CUDA_HOME, or the one that has the nvcc on the PATH; None without one."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(pathlib.Path(nvcc).resolve().parent.parent), "/usr/local/cuda"]
    return next((h for h in homes if h and os.path.exists(f"{h}/bin/nvcc") and
                 os.path.exists(f"{h}/include/cuda_runtime.h")), None)


def missing_for_cuda(home):
    """What stands in the way of building the CUDA kernels, in a line; None if nothing does."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA: install the CUDA build"
    if home is None:
        return "no CUDA toolkit (nvcc and cuda_runtime.h) was found: install it or set CUDA_HOME"
    return None


def architectures():
    """TORCH_CUDA_ARCH_LIST as given; else what the GPUs here are, each once; else one of each kind in use, and PTX."""
    here = {torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())}
    found = ";".join(f"{major}.{minor}" for major, minor in sorted(here))
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or found or "7.5;8.0;9.0+PTX"


wanted = os.environ.get("GST_CUDA", "auto")
if wanted not in ("0", "1", "auto"):
    sys.exit(f"setup.py: GST_CUDA={wanted}: give 0 or 1")
if not shutil.which(os.environ.get("CXX", "c++")):
    sys.exit(f"setup.py: no C++ compiler {os.environ.get('CXX', 'c++')} was found: install g++ (or set CXX)")
home = cuda_home()
problem = missing_for_cuda(home)
if wanted == "1" and problem:
    sys.exit(f"setup.py: GST_CUDA=1, but {problem}")
cuda = wanted != "0" and not problem
if home:
    os.environ["CUDA_HOME"] = home
if cuda:
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  (reads CUDA_HOME)

sources = ["csrc/ops.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
flags = {"cxx": ["-O3", "-fno-trapping-math", "-fno-math-errno", "-Wall", "-Wno-unused-function"]}
if sys.platform == "linux":
    # For at::parallel_for. It is not linked with -fopenmp: the threads must be those of the OpenMP that PyTorch brings
    # along, whose symbols are found when the extension is loaded; a second OpenMP's would fight them for the cores.
    flags["cxx"].append("-fopenmp")
options = {}
if cuda:
    sources += sorted(glob.glob("csrc/cuda/*.cpp") + glob.glob("csrc/cuda/*.cu"))
    flags["nvcc"] = ["-O3", "--Werror", "all-warnings"]
    # PyTorch's headers want cusparse.h and its kind, which a toolkit may lack and the nvidia pip packages bring.
    folders = {*site.getsitepackages(), sysconfig.get_paths()["purelib"], str(pathlib.Path(torch.__file__).parents[1])}
    options["include_dirs"] = sorted(p for f in folders for p in glob.glob(f"{f}/nvidia/cu*/include"))
with_cuda = f" and the CUDA kernels for {os.environ.get('TORCH_CUDA_ARCH_LIST')}"
print(f"gst_ext: the CPU kernels{with_cuda if cuda else ' only: ' + (problem or 'GST_CUDA=0')}")

extension = (CUDAExtension if cuda else CppExtension)("gst_ext._C", sources, extra_compile_args=flags, **options)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})  # all else is in pyproject.toml
