"""What every test module shares: a tiny data set, runs of train.py in this process, their files."""
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
from gst_ext.datasets import prepare_data  # noqa: E402
from gst_ext.networks import build_model  # noqa: E402

train.THREADS = 1  # sums in one order, so that runs can be compared bit for bit
torch.set_num_threads(train.THREADS)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
needs_ext = pytest.mark.skipif(not ops.available, reason="the extension is not built")


def make_arrays(n_train=96, n_test=64, classes=4):
    """Returns images of noise whose colour tells their class, which a few steps learn in part."""
    random = np.random.default_rng(0)
    arrays = {"classes": np.array([f"class{k}" for k in range(classes)])}
    for split, n in (("train", n_train), ("test", n_test)):
        labels = np.arange(n) % classes
        images = random.integers(0, 120, (n, 32, 32, 3))
        images += (40 * (labels[:, None] >> np.arange(3) & 1))[:, None, None]
        arrays[f"{split}_x"], arrays[f"{split}_y"] = images.astype(np.uint8), labels
    return arrays


def read_lines(directory):
    """Returns a run's records, a list of dicts."""
    lines = (pathlib.Path(directory) / "epochs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_seconds(directory):
    """Returns a run's records as text, without the one field that the clock decides."""
    return [json.dumps({k: v for k, v in record.items() if k != "seconds"})
            for record in read_lines(directory)]


def weights(directory):
    """Returns the state of the network in a run's checkpoint."""
    return torch.load(directory / "checkpoint.pt", weights_only=True)["model"]


def randomise_batch_norm(model, seed=0):
    """Gives every batch norm its own scale, shift and running statistics; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5),
                                  ("running_var", 0.5)):
                    tensor = getattr(module, name)
                    tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model


def tiny_model(name, width=0.1, classes=4, seed=0):
    torch.manual_seed(seed)
    return randomise_batch_norm(build_model(name, classes, width))


def training_setup(*argv, n_train=100):
    """Returns (model, data, optimizer, options, generators), the arguments of train_epoch."""
    options = train.parse_options([*argv, "--target", "S"])
    data = prepare_data(make_arrays(n_train), torch.device("cpu"), augment=options.augment)
    model = tiny_model(options.model, options.width)
    optimizer = train.make_optimizer(model, options.optimizer, options.lr, options.weight_decay)
    return model, data, optimizer, options, train.make_generators(0)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.npz"
    np.savez(path, **make_arrays())
    return path


@pytest.fixture
def options(tiny):
    """Makes the command line of a tiny ResNet20 on the tiny data; its logs go beside the data."""
    def make(*more, logs="logs"):
        return ["--model", "resnet20", "--width", "0.125", "--dataset", str(tiny), "--device",
                "cpu", "--batch-size", "32", "--epochs", "5", "--lrs", "3", "--save-epoch", "0",
                "--log-dir", str(tiny.parent / logs), *map(str, more)]
    return make


@pytest.fixture
def run(options):
    """Runs train.main on such a command line; returns its exit code."""
    return lambda *more, **place: train.main(options(*more, **place))


@pytest.fixture
def directory(options):
    """Returns where such a command line leaves its files."""
    return lambda *more, **place: train.run_path(train.parse_options(options(*more, **place)))


@pytest.fixture
def records(run, directory):
    """Runs such a command line, which must succeed, and returns its records."""
    def train_and_read(*more, **place):
        assert run(*more, **place) == 0
        return read_lines(directory(*more, **place))
    return train_and_read


@pytest.fixture(scope="session")
def emulation():
    """The CUDA kernels as C++; the first use of a checkout compiles them."""
    return emulate.Emulation()


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch):
    """Where operators run: the CPU's kernels, the GPU's emulated on CPU tensors, or a GPU."""
    if request.param != "emulated":
        return request.param
    operators = request.getfixturevalue("emulation").operators
    for name in emulate.OPERATORS:
        monkeypatch.setattr(torch.ops.gst, name, getattr(operators, name))
    monkeypatch.setattr(ops, "may_fold", lambda *_: False)
    return "cpu"
