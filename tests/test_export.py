"""The small network alone: its logits, its size, what counters see, and its files elsewhere."""
import collections
import json
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, read_lines, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import analyze
import train
from gst_ext import export
from gst_ext.export import compact
from gst_ext.networks import PRUNABLE_BLOCKS, Block, count_params_and_macs

PRUNE = ("--target", "L", "--s", 0, "--e", 1, "--r", 1, "--p", 0.6)
LOAD = """import sys
for name in ("gst_ext", "train", "analyze", "appendix_figures"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
images, labels = torch.load(sys.argv[2])
network = torch.export.load(sys.argv[1]).module()
print(sum(int((network(part).argmax(1) == right).sum())
          for part, right in zip(images.split(97), labels.split(97))))
"""


def pruned(name, prune="some", keep_bn=False, width=0.25, seed=0):
    """Returns a network with values of its own in every tensor and filters pruned.

    Args:
        prune: "none", "some" (a random number in each layer), or "most" (all but one).
    """
    model = tiny_model(name, width)
    generator = torch.Generator().manual_seed(seed)
    for block in model.prunable:
        n = len(block.mask)
        if block.conv.bias is not None:
            nn.init.normal_(block.conv.bias, generator=generator)
        live = {"none": n, "most": 1, "some": int(torch.randint(n, (), generator=generator)) + 1}
        train.prune_filters(block, torch.randperm(n, generator=generator)[live[prune]:], keep_bn)
    return model


def images(n, dtype=torch.float32, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_equal_logits(a, b, x, tolerance):
    torch.testing.assert_close(a(x), b(x), rtol=0, atol=tolerance)


@pytest.mark.parametrize("keep_bn", [False, True])
@pytest.mark.parametrize("prune", ["none", "some", "most"])
@pytest.mark.parametrize("name", PRUNABLE_BLOCKS)
def test_logits_are_those_of_the_masked_network(name, prune, keep_bn):
    model = pruned(name, prune, keep_bn).eval()
    assert_equal_logits(model, compact(model), images(3), 1e-5)
    model.double()
    assert_equal_logits(model, compact(model), images(3, torch.float64, size=35), 1e-12)


@pytest.mark.parametrize("name, width", [("vgg11", 1), ("resnet18", 1), ("resnet20", 1),
                                         ("resnet20", 0.01), ("resnet18", 1.37)])
def test_every_width(name, width):
    model = pruned(name, width=width).eval()
    assert_equal_logits(model, compact(model), images(2), 1e-5)


@pytest.mark.parametrize("keep_bn", [False, True])
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
def test_training_goes_the_same_way(name, keep_bn):
    model = pruned(name, keep_bn=keep_bn, width=0.125).double().train()
    small, x = compact(model), images(8, torch.float64)
    for network in (model, small):
        optimizer = torch.optim.SGD(network.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
        network.eval()
    assert_equal_logits(model, small, x, 1e-8)


def test_a_network_of_torch_layers_that_shares_nothing():
    model = pruned("resnet18").train()
    state, old = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    small = compact(model)
    assert torch.equal(torch.get_rng_state(), state) and small.training
    assert not compact(model.eval()).training
    leaves = [layer for layer in small.modules() if not list(layer.children())]
    assert {type(layer).__module__.split(".")[0] for layer in leaves} == {"torch"}
    live = [int(block.mask.sum()) for block in model.modules() if isinstance(block, Block)]
    assert [conv.out_channels for conv in leaves
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3)] == live
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.fill_(7)
    assert all(torch.equal(value, old[k]) for k, value in model.state_dict().items())


def counted_by_the_log_only(model):
    """Returns the parameters and multiply-adds of projections' maps into pruned filters."""
    params, macs, side, c_in = 0, 0, 32, len(model.stem.mask)
    for (first, second), shortcut in zip(model.pairs, model.shortcuts):
        side //= first.conv.stride[0]
        if isinstance(shortcut, nn.Sequential):
            gone = int((~second.bn_mask).sum())
            params, macs = params + gone * (c_in + 2), macs + gone * c_in * side**2
        c_in = int(second.bn_mask.sum())
    return params, macs


@pytest.mark.parametrize("keep_bn", [False, True])
@pytest.mark.parametrize("name", PRUNABLE_BLOCKS)
def test_parameters_and_macs_are_those_of_the_log(name, keep_bn):
    model = pruned(name, keep_bn=keep_bn)
    small = compact(model)
    with FlopCounterMode(display=False) as counter:
        small(images(1))
    more = counted_by_the_log_only(model) if name == "resnet18" else (0, 0)
    assert (more != (0, 0)) == (name == "resnet18" and not keep_bn)
    counted = sum(p.numel() for p in small.parameters()), counter.get_total_flops() / 2
    assert count_params_and_macs(model, (32, 32)) == tuple(map(sum, zip(counted, more)))


def count_fvcore(library, network, x):
    analysis = library.FlopCountAnalysis(network, x)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


COUNTERS = {  # module: (its multiply-adds, what it adds to convolutions and linear layer)
    "fvcore.nn": (count_fvcore, lambda n: 2 * n["BatchNorm2d"] + n["averaged"]),
    "thop": (lambda library, network, x: library.profile(network, (x,), verbose=False)[0],
             lambda n: 4 * n["BatchNorm2d"] + n["averaged"] + n["AdaptiveAvgPool2d"]),
    "ptflops": (lambda library, network, x: library.get_model_complexity_info(
                    network, tuple(x.shape[1:]), as_strings=False, print_per_layer_stat=False)[0],
                lambda n: n["biases"] + 2 * n["BatchNorm2d"]
                + 2 * (n["ReLU"] + n["pooled"] + n["averaged"])),
    "torchinfo": (lambda library, network, x: library.summary(
                      network, input_data=x, verbose=0).total_mult_adds,
                  lambda n: n["biases"] + n["scales"]),
}


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
@pytest.mark.parametrize("counter", COUNTERS)
def test_counters_see_every_layer(counter, name):
    library = pytest.importorskip(counter)
    network, sizes = compact(pruned(name)).eval(), collections.Counter()

    def add_sizes(layer, inputs, output):
        kind = type(layer).__name__
        sizes[kind] += output.numel()
        sizes["biases"] += output.numel() * (getattr(layer, "bias", None) is not None
                                             and kind != "BatchNorm2d")
        sizes["scales"] += 2 * layer.num_features if kind == "BatchNorm2d" else 0
        sizes["pooled"] += inputs[0].numel() * (kind == "MaxPool2d")
        sizes["averaged"] += inputs[0].numel() * (kind == "AdaptiveAvgPool2d")

    hooks = [layer.register_forward_hook(add_sizes) for layer in network.modules()]
    with FlopCounterMode(display=False) as flops:
        network(images(1))
    for hook in hooks:
        hook.remove()
    count, extra = COUNTERS[counter]
    assert count(library, network, images(1)) == flops.get_total_flops() / 2 + extra(sizes)


# The files

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run on the digits, exported; its directory."""
    line = ("--preset quick --model resnet18 --target L --s 0x16 --e 1x16 --r 1 --p 0.6x16 "
            "--epochs 2 --lrs --scale-epochs 1 --device cpu --log-dir "
            f"{tmp_path_factory.mktemp('logs')}")
    assert train.main(line.split()) == 0
    path = train.run_path(train.parse_options(line.split()))
    assert analyze.main(["--export", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def test_split(digits):
    _, data, _ = analyze.load_network(digits)
    return data["test"]


def test_the_file_alone_gets_the_logged_number_right(digits, test_split, tmp_path):
    (tmp_path / "load.py").write_text(LOAD)
    torch.save(test_split, tmp_path / "test.pt")
    done = subprocess.run([sys.executable, "-I", "load.py", digits / "network.pt2", "test.pt"],
                          cwd=tmp_path, capture_output=True, text=True)
    last = read_lines(digits)[-1]
    assert done.stdout == f"{last['test_correct']}\n" and all(last["removed"])


def test_the_onnx_file_gets_the_logged_number_right(digits, test_split):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(digits / "network.onnx")
    right = 0
    for x, y in zip(*(tensor.split(97) for tensor in test_split)):
        logits, = session.run(["logits"], {"images": x.numpy()})
        right += int((logits.argmax(1) == y.numpy()).sum())
    assert right == read_lines(digits)[-1]["test_correct"]
    assert not list(digits.glob("network.onnx?*"))  # the weights are in the file
    about = json.loads(session.get_modelmeta().custom_metadata_map["network"])
    assert about["classes"] == list("0123456789")


@pytest.mark.parametrize("takes", ["uint8", "float"])
def test_the_onnx_file_computes_no_indices(takes, tmp_path):
    """As torch.onnx does if it traces channels-last memory: Shape, Range and Gather for Flatten."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, path = export.save(pruned("vgg11"), tmp_path, (32, 32), "abcd", torch.zeros(3),
                          torch.ones(3), takes)
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert operators - {"Cast", "Sub", "Div", "Transpose"} == {
        "Conv", "Relu", "MaxPool", "ReduceMean", "Reshape", "Gemm"}


def test_the_files_name_no_place_on_this_machine(digits):
    with zipfile.ZipFile(digits / "network.pt2") as file:
        contents = [file.read(name) for name in file.namelist()]
    contents += [path.read_bytes() for path in digits.glob("network.onnx")]
    for content in contents:
        assert str(ROOT).encode() not in content and b"site-packages" not in content


@pytest.mark.parametrize("takes", ["uint8", "float"])
def test_what_an_exported_network_takes_and_says(takes, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)  # no onnx
    (tmp_path / "network.onnx").write_text("of an earlier export")
    model, mean, std = pruned("resnet20").eval(), torch.rand(3) * 99, torch.rand(3) + 50
    paths = export.save(model, tmp_path, (33, 32), ["cat", "dög"], mean, std, takes)
    assert paths == [tmp_path / "network.pt2"] == list(tmp_path.iterdir())
    extra = {"network.json": ""}
    network = torch.export.load(paths[0], extra_files=extra).module()
    assert json.loads(extra["network.json"]) == {
        "takes": takes, "size": [33, 32], "classes": ["cat", "dög"], "mean": mean.tolist(),
        "std": std.tolist()}
    x = torch.randint(256, (5, 33, 32, 3), dtype=torch.uint8)
    normalised = train.normalise(x, {"mean": mean, "std": std})
    given = x if takes == "uint8" else normalised
    for n in (0, 1, 5):
        torch.testing.assert_close(network(given[:n]), model(normalised[:n]).detach(), rtol=0,
                                   atol=1e-5)
    with pytest.raises((AssertionError, RuntimeError)):  # another size
        network(given[:, :, :-1])


def test_runs_that_cannot_be_exported(run, directory, tmp_path, capsys):
    # An epoch has 3 batches of training.
    active, over = ((*PRUNE, "--epochs", 2, "--lrs", "--noise", "zero",
                     "--noise-batches", batches) for batches in (9, 3))
    assert run(*active) == run(*over, "--e", 0) == 0
    capsys.readouterr()
    for path, message in ((directory(*active), "its noise is active"),
                          (tmp_path / "nothing", "is not a finished run")):
        assert analyze.main(["--export", str(path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not list(path.glob("network*"))
    assert analyze.main(["--export", str(directory(*over, "--e", 0))]) == 0


def test_the_benchmark_runs():
    done = subprocess.run([sys.executable, ROOT / "bench/export.py", "--width", "0.05", "--rounds",
                           "1"], capture_output=True, text=True)
    assert done.stdout.count("\n  batch ") == 8, done.stderr
