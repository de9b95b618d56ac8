"""The CUDA kernels without a GPU: csrc/cuda compiled by g++ as plain C++, and called as a device beside CPU and CUDA.

What emulate.h checks, it says in a RuntimeError that begins with "emulated:". The libraries lie in build/emulated, each
under the hash of what it is made of.
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
BUILD = ROOT / "build" / "emulated"
TORCH = pathlib.Path(torch.__file__).parent
HEADERS = ["cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h"]
TORCH_HEADERS = [f"c10/cuda/CUDA{name}.h" for name in ("Exception", "Guard", "Stream")]
OPERATORS = "ebn_score", "bn_act", "bn_act_backward"


def as_cpp(text):
    """A .cu file in C++: launches as calls, shared memory as what emulate.h watches."""
    text, n = re.subn(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\((.*?)\);", r"emulate::launch([=] { \1(\3); }, \2);", text,
                      flags=re.S)
    assert n, "no launch was found"
    return re.sub(r"__shared__ (\w+) (\w+)\[(.*?)\]\[(.*?)\];", r"static emulate::Shared<\1, \3, \4> \2;", text)


def sources(change=lambda text: text):
    """{path: text} of the two libraries' sources; change alters bn_act.cu, to plant a fault."""
    files = {f"cuda/{p.name}": p.read_text() for p in (CSRC / "cuda").glob("*.h")}
    files |= {f"emulate/{p.name}": p.read_text() for p in HERE.glob("*.h")}
    files |= {f"include/{name}": '#include "emulate.h"\n' for name in HEADERS}
    files |= {f"include/{name}": '#include "ops.h"\n' for name in TORCH_HEADERS}
    files["gst_math.h"] = (CSRC / "gst_math.h").read_text()
    files["checks.h"] = (CSRC / "checks.h").read_text().replace("x.is_cuda()", "true")
    kernels = [as_cpp(change((CSRC / "cuda/bn_act.cu").read_text())), as_cpp((CSRC / "cuda/ebn_score.cu").read_text())]
    files["cuda/kernels.cpp"] = "\n".join([*kernels, '#include "kernels.h"\n'])
    schemas = re.findall(rf'  m\.def\("(?:{"|".join(OPERATORS)})\(.*?\);', (CSRC / "ops.cpp").read_text(), flags=re.S)
    assert len(schemas) == len(OPERATORS)
    operators = (CSRC / "cuda/ops_cuda.cpp").read_text()
    files["cuda/ops.cpp"] = "\n".join([operators.replace("(gst, CUDA, m)", "(gst_emulated, CPU, m)"),
                                       "TORCH_LIBRARY(gst_emulated, m) {", *schemas, "}\n"])
    return files


def compiled(files, name, *flags, header=None):
    """The path of lib<name>.so made of cuda/<name>.cpp, compiled if it is not there yet; header: a precompiled one."""
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"] if name == "ops" else []
    used = {k: v for k, v in files.items() if not k.endswith(".cpp") or k == f"cuda/{name}.cpp"}
    first = ["-include", header.removesuffix(".gch")] if header else []
    return made(used, f"{name}.so", "-shared", *flags, *first, f"cuda/{name}.cpp", *libraries)


def made(files, name, *arguments):
    """The path of what g++ makes of the files, which are its working directory."""
    command = ["g++", "-std=c++20", "-fPIC", "-U_FORTIFY_SOURCE", "-fvisibility=hidden", "-fno-gnu-unique", "-w",
               f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", "-Iinclude", "-Iemulate", "-Icuda",
               f"-isystem{TORCH}/include", *arguments]
    key = hashlib.sha256(repr([sorted(files.items()), command, torch.__version__]).encode()).hexdigest()[:16]
    target = BUILD / key / name
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        for path, text in files.items():
            (pathlib.Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (pathlib.Path(folder) / path).write_text(text)
        done = subprocess.run([*command, "-o", "made"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        os.replace(pathlib.Path(folder) / "made", target)
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
        assert self.library.emulated_use(str(path).encode()), f"{path} cannot be loaded"
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
    def fault(self, change):
        """The kernels with a fault in them: change(bn_act.cu's text) gives it. Of float32 alone, to compile fast."""
        def planted(text):
            changed = change(text)
            assert changed != text, "the fault was not planted"
            return re.sub(r"    case Type::k(Double|Half|BFloat16): .*\n", "", changed)
        files = sources(planted)
        header = made({k: v for k, v in files.items() if k == "emulate/emulate.h"}, "emulate.h.gch", "-x", "c++-header",
                      "emulate/emulate.h")
        self.use(compiled(files, "kernels", header=header))
        try:
            yield
        finally:
            self.use(self.sound)
