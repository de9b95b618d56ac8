"""The CUDA kernels without a GPU: csrc/cuda compiled by g++ as plain C++, as a third device.

What emulate.h finds is raised as a RuntimeError that begins with "emulated:". The libraries are
kept in build/emulated, each under the hash of what it is made of.
"""
import contextlib
import ctypes
import hashlib
import os
import pathlib
import re
import subprocess
import tempfile

import torch

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build/emulated"
TORCH = pathlib.Path(torch.__file__).parent
HEADERS = {"emulate": ["cuda_runtime_api.h", "cuda_bf16.h"],
           "ops": [f"c10/cuda/CUDA{name}.h" for name in ("Exception", "Guard", "Stream")]}
OPERATORS = "ebn_score", "bn_act", "bn_act_backward"


def as_cpp(text):
    """A .cu file in C++: launches are calls, shared memory is what emulate.h watches."""
    text, n = re.subn(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\((.*?)\);",
                      r"emulate::launch([=] { \1(\3); }, \2);", text, flags=re.S)
    assert n, "no launch was found"
    return re.sub(r"__shared__ (\w+) (\w+)\[(.*?)\]\[(.*?)\];",
                  r"static emulate::Shared<\1, \3, \4> \2;", text)


def sources(faults=()):
    """{path: text} of the two libraries; with faults, texts of kernels.cu with FAULT between two @,
    the kernels are of float alone, to compile fast, and have the fault number emulate::fault."""
    files = {f"cuda/{p.name}": p.read_text() for p in (CSRC / "cuda").glob("*.h")}
    files |= {f"emulate/{p.name}": p.read_text() for p in HERE.glob("*.h")}
    files |= {f"include/{name}": f'#include "{ours}.h"\n' for ours, theirs in HEADERS.items()
              for name in theirs}
    files |= {p.name: p.read_text().replace("x.is_cuda()", "true") for p in CSRC.glob("*.h")}
    kernels = (CSRC / "cuda/kernels.cu").read_text()
    for number, fault in enumerate(faults, 1):
        text = re.sub("@.*?@", "", fault, flags=re.S)
        assert kernels.count(text) == 1, f"not there once: {text}"
        changed = fault.replace("@", "").replace("FAULT", f"(emulate::fault == {number})")
        kernels = kernels.replace(text, changed)
    if faults:
        kernels = re.sub(r"    case Type::k(Double|BFloat16): .*\n", "", kernels)
    files["cuda/kernels.cpp"] = as_cpp(kernels) + '#include "emulated_kernels.h"\n'
    schemas = re.findall(rf'  m\.def\(\s*"(?:{"|".join(OPERATORS)})\(.*?\);',
                         (CSRC / "ops.cpp").read_text(), flags=re.S)
    assert len(schemas) == len(OPERATORS)
    operators = (CSRC / "cuda/ops_cuda.cpp").read_text().replace("(gst, CUDA, m)",
                                                                 "(gst_emulated, CPU, m)")
    files["cuda/ops.cpp"] = "\n".join([operators, "TORCH_LIBRARY(gst_emulated, m) {", *schemas,
                                       "}\n"])
    return files


def compiled(files, name, *flags):
    """The path of <name>.so made of cuda/<name>.cpp, compiled if it is not there yet."""
    files = {k: v for k, v in files.items() if not k.endswith(".cpp") or k == f"cuda/{name}.cpp"}
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"] if name == "ops" else []
    command = ["g++", "-std=c++20", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-fvisibility=hidden",
               "-fno-gnu-unique", "-w", "-Iinclude", "-Iemulate", "-Icuda",
               f"-isystem{TORCH}/include", *flags, f"cuda/{name}.cpp", *libraries]
    made_of = repr([sorted(files.items()), command, torch.__version__])
    target = BUILD / hashlib.sha256(made_of.encode()).hexdigest()[:16] / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            for path, text in files.items():
                path = pathlib.Path(folder, path)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            done = subprocess.run([*command, "-o", "made"], cwd=folder, capture_output=True,
                                  text=True)
            assert done.returncode == 0, done.stderr[:4000]
            os.replace(f"{folder}/made", target)
    return str(target)


class Emulation:
    """The operators of `torch.ops.gst_emulated`, on tensors of the CPU."""

    def __init__(self):
        library = compiled(sources(), "ops", "-O1")
        torch.ops.load_library(library)
        self.operators, self.library = torch.ops.gst_emulated, ctypes.CDLL(library)
        self.sound = compiled(sources(), "kernels", "-O1")
        self.use(self.sound)

    def use(self, path):
        assert self.library.emulated_use(path.encode()), f"{path} cannot be loaded"
        self.kernels = ctypes.CDLL(path)
        self.kernels.emulated_count.restype = ctypes.c_int64

    def counts(self):
        """Launches, barriers and accesses of shared memory so far."""
        return [self.kernels.emulated_count(k) for k in range(3)]

    @contextlib.contextmanager
    def order(self, number):
        """Blocks and threads ascending (0), descending (1), or shuffled by this number."""
        self.kernels.emulated_order(number)
        try:
            yield
        finally:
            self.kernels.emulated_order(0)

    @contextlib.contextmanager
    def fault(self, faults, number):
        """The kernels with the faults of `sources` compiled in, of which this number is active."""
        self.use(compiled(sources(faults), "kernels"))
        self.kernels.emulated_fault(number)
        try:
            yield
        finally:
            self.use(self.sound)
