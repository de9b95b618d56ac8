"""What every test module shares: a tiny learnable data set, in-process runs of train.py, and readers of their files."""
import json
import pathlib
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import emulate  # noqa: E402
import train  # noqa: E402
from gst_ext import ops  # noqa: E402

torch.set_num_threads(1)  # sums in one order, so that runs can be compared bit for bit
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # what is compared is float32


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def make_arrays(n_train=96, n_test=64, classes=4):
    """Images of noise whose colour tells their class: a network learns something of them in a few steps."""
    random = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class{k}" for k in range(classes)])}
    for split, n in (("train", n_train), ("test", n_test)):
        labels = np.arange(n) % classes
        images = random.integers(0, 120, (n, 32, 32, 3))
        images += (40 * (labels[:, None] >> np.arange(3) & 1))[:, None, None]
        arrays[f"{split}_x"], arrays[f"{split}_y"] = images.astype(np.uint8), labels
    return arrays


def read_lines(directory):
    return [json.loads(line) for line in (pathlib.Path(directory) / "epochs.jsonl").read_text().splitlines()]


def without_seconds(directory):
    """The text of a run's log without the one field that the clock decides."""
    return [json.dumps({k: v for k, v in record.items() if k != "seconds"}) for record in read_lines(directory)]


def randomise_batch_norm(model, seed=0):
    """Gives every batch norm its own scale, shift and running statistics, so that none is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5),
                                    (module.running_var, 0.5)):
                    tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


def tiny_model(name, width=0.1, classes=4, seed=0):
    torch.manual_seed(seed)
    return randomise_batch_norm(train.build_model(name, classes, width))


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, **make_arrays())
    return path


@pytest.fixture
def options(tiny):
    """Makes a full command line of `more` options: a tiny ResNet20 on the tiny data, logs in `logs` beside them."""
    def make(*more, logs="logs"):
        return ["--model", "resnet20", "--width", "0.125", "--dataset", str(tiny), "--device", "cpu", "--batch-size",
                "32", "--epochs", "5", "--lrs", "3", "--save-epoch", "0", "--log-dir", str(tiny.parent / logs),
                *map(str, more)]
    return make


@pytest.fixture
def run(options):
    """Runs train.main on such a command line; returns its exit code."""
    return lambda *more, **place: train.main(options(*more, **place))


@pytest.fixture
def directory(options):
    """Where such a command line leaves its files."""
    return lambda *more, **place: train.run_directory(train.parse_options(options(*more, **place)))


@pytest.fixture(scope="session")
def emulation():
    """The CUDA kernels as C++; the first use of a checkout compiles them."""
    return emulate.Emulation()


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Where operators are computed: the CPU's kernels, CUDA's on the CPU (on whose tensors they work), or a GPU."""
    if request.param != "emulated":
        return request.param
    operators = request.getfixturevalue("emulation").operators
    for name in emulate.OPERATORS:
        monkeypatch.setattr(torch.ops.gst, name, getattr(operators, name))
    monkeypatch.setattr(ops, "may_fold", lambda *_: False)
    return "cpu"
