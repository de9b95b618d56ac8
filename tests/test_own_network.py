"""Networks of a user's own train, prune, continue and are drawn as the paper's are."""
import copy
import re
import shlex

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_ext, randomise_batch_norm, without_seconds
from torch.utils.flop_counter import FlopCounterMode

import analyze
import train
from gst_ext import networks
from gst_ext.export import compact
from gst_ext.networks import Block, build_model, count_params_and_macs, set_backend

CODE, = re.findall(r"```python\n(.*?)```", (ROOT / "docs/networks.md").read_text(), re.S)
PRUNE = ("--target", "S", "--r", 1, "--s", "0x9", "--e", "2x9", "--p", "0.5x9")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """my_networks.py of the page, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_networks.py"
    path.write_text(CODE)
    yield path
    forget()


def forget():
    train.OWN_MODELS.clear()
    networks.OWN_NETWORKS.clear()


def own(name, *more):
    """The command line of a network of the file; of the same options the last counts."""
    return ("--model", f"my_networks.py:{name}", "--width", 0.25, *more)


def error_line(capsys):
    line, = capsys.readouterr().err.splitlines()
    return line


def bottleneck_network(width=0.5, pruned=True):
    """Returns resnet29 with random batch norms and half of each block's filters pruned."""
    torch.manual_seed(0)
    train.model_name("my_networks.py:resnet29")
    model = randomise_batch_norm(build_model("resnet29", 4, width))
    for i, block in enumerate(model.prunable if pruned else ()):
        n = len(block.mask)
        train.prune_filters(block, torch.randperm(n)[:n // 2], keep_bn=i % 4 == 3)
    return model


def test_the_small_network_of_a_bottleneck_has_the_masked_ones_logits():
    model = bottleneck_network().double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    small = compact(model)
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def train_step(model, backend):
    """Returns {name: tensor} of the logits, gradients, weights and buffers of a step."""
    model = set_backend(copy.deepcopy(model), backend).train()
    optimizer = train.make_optimizer(model, "sgd", 0.01, 1e-4)
    x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    logits = model(x)
    F.cross_entropy(logits, torch.arange(12) % 4).backward()
    gradients = {f"d{name}": p.grad for name, p in model.named_parameters()}
    optimizer.step()
    with torch.no_grad():
        found = {"train": logits, "eval": model.eval()(x)}
    return found | gradients | model.state_dict()


@needs_ext
@pytest.mark.parametrize("round_to", [1, 3])
def test_both_backends_compute_the_same_bottlenecks(round_to):
    model = bottleneck_network().double()
    model.round_to = round_to
    for block in model.prunable:
        block.update_act, block.act = True, block.act.float()
    expected, found = train_step(model, "eager"), train_step(model, "ext")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7, msg=name)
    for name, block in model.named_modules():
        if isinstance(block, Block):
            assert not found[f"d{name}.conv.weight"][~block.mask].any()
            assert not found[f"{name}.conv.weight"][~block.mask].any()


def test_counts_of_bottlenecks_are_those_of_a_smaller_network(file):
    """With half of the inner filters pruned, of one with half as many."""
    model = bottleneck_network(pruned=False)
    for block in (block for *inner, _ in model.pairs for block in inner):
        train.prune_filters(block, torch.arange(len(block.mask) // 2))
    file.write_text(CODE.replace("c_out // 4", "c_out // 8"))
    small = bottleneck_network(pruned=False).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(torch.randn(1, 3, 32, 32))
    assert count_params_and_macs(model, (32, 32, 3)) == (
        sum(p.numel() for p in small.parameters()), counter.get_total_flops() / 2)


@pytest.mark.parametrize("name, more", [
    ("small_vgg", ("--score", "act", "--batch-size", 8)), ("resnet29", ()),
    ("resnet29", ("--prune-bn", "keep")), ("small_vgg", ("--noise", "gauss")),
    ("resnet29", ("--backend", "eager", "--precision", "bf16")),
    ("small_vgg", ("--scratch", "--optimizer", "sgd", "--augment"))])
def test_own_networks_train_with_the_options_of_the_papers(records, directory, name, more):
    pruning = PRUNE if name == "resnet29" else [
        str(word).replace("x9", "x4") for word in PRUNE]
    line = own(name, *pruning, *more)
    lines = records(*line)
    path = directory(*line)
    assert path.parts[-3] == name and len(lines) == 5
    events = [sum(record["removed"]) > 0 for record in lines]
    if "--noise" not in more and "--scratch" not in more:
        model = build_model(name, 4, 0.25)
        live = [len(block.mask) for block in model.prunable]
        n = len(lines[0]["removed"])
        assert events == [True, True, True, False, False]
        assert lines[-1]["live"] == live[:-n] + [(c + 1) // 2 for c in live[-n:]]
    assert train.main(["--status", str(listed(path, line))]) == 0


def listed(path, line):
    file = path / "list"
    file.write_text(shlex.join(map(str, line)))
    return file


def test_an_own_network_continues_bit_for_bit_unless_its_file_was_edited(
        run, directory, monkeypatch, capsys, file):
    line, fresh = own("resnet29", *PRUNE), {"logs": "fresh"}
    assert run(*line, **fresh) == 0
    monkeypatch.setattr(train.rundir.RunDirectory, "print_epoch", interrupt_after(2))
    assert run(*line) != 0
    monkeypatch.undo()
    monkeypatch.chdir(file.parent)
    path = directory(*line)
    for done in (False, True):
        assert (path / "done.json").exists() == done
        file.write_text(CODE.replace("c_out // 4", "c_out // 2"))
        capsys.readouterr()
        assert run(*line) == 2
        assert "source of the model resnet29" in error_line(capsys)
        file.write_text(CODE)
        assert run(*line) == 0
    assert without_seconds(path) == without_seconds(directory(*line, **fresh))


def interrupt_after(epochs):
    def print_epoch(directory, _):
        if len(directory.records) == epochs:
            raise KeyboardInterrupt
    return print_epoch


def test_missing_defaults_are_one_line_and_given_ones_name_the_run(tmp_path, capsys, file):
    file.write_text(re.sub("OPTIONS = .*?\"{3}.*?\"{3}", 'OPTIONS = "--optimizer adam --lrs"', CODE,
                           flags=re.S))
    line = ["--model", "my_networks.py:small_vgg", "--target", "S", "--log-dir", str(tmp_path)]
    assert train.main(line) == 2
    message = error_line(capsys)
    for name in ("lr", "weight-decay", "epochs", "augment", "s", "e", "p", "r", "score"):
        assert re.search(rf"--{name}[,:]", message), name
    assert "--optimizer" not in message and "--lrs" not in message and "OPTIONS" in message
    line += ("--lr 0.01 --weight-decay 0 --epochs 9 --s 1 --e 3 --p 0.5 --r 2 --score l1 "
             "--no-augment").split()
    path = train.run_path(train.parse_options(line))
    assert path.parts[-3:-1] == ("small_vgg", "S-r2-l1-s1-e3-p0.5-epochs9-lr0.01-wd0-noaugment")


@pytest.mark.parametrize("code, named", [
    ("def net(num_classes, width):\n    return 3\n", "net"), ("net = 3\n", "net"), ("", "net"),
    ("def net(num_classes):\n    return 3\n", "net"), ("def vgg11(c, w):\n    pass\n", "vgg11"),
    (CODE.replace("OPTIONS = \"\"\"", "OPTIONS = \"\"\"--model x "), "--model"),
    (CODE.replace("--lr 0.001", "--lr many"), "--lr"),
    (CODE.replace("--lr 0.001", "--lr 0.001 --target S"), "target"),
    (CODE.replace("    return ResNet", "    import torch\n    model = ResNet") +
     "    model.head = torch.nn.Linear(3, 3)\n    return model\n", "12 of its parameters")])
def test_what_is_no_network_is_one_line(capsys, file, code, named):
    file.write_text(code)
    name = re.findall(r"def (\w+)\(", code)[-1] if "def " in code else "net"
    assert train.main(["--model", f"my_networks.py:{name}"]) == 2
    message = error_line(capsys)
    assert "--model" in message and named in message


def test_two_files_with_one_name_do_not_mix(tmp_path, tiny, capsys, file):
    (tmp_path / "other.py").write_text(CODE.replace("48", "40"))
    lines = [f"--model {name}.py:small_vgg --dataset {tiny}" for name in ("my_networks", "other")]
    (tmp_path / "runs").write_text("\n".join(lines))
    assert train.main(["--plan", str(tmp_path / "runs")]) == 2
    assert "small_vgg" in error_line(capsys)


def test_figures_and_flatness_of_own_networks(run, directory, tmp_path, capsys, file):
    methods = [own("small_vgg", "--target", target, "--r", 1, "--s", "0x4", "--e", "2x4")
               for target in ("S", "L")]
    for line in methods:
        for seed in (1, 2):
            assert run(*line, "--seed", seed) == 0
    folders = ["--log-dir", str(tmp_path / "logs"), "--fig-dir", str(tmp_path / "figures")]
    forget()  # as another process, which knows the logs alone
    file.rename(tmp_path / "moved.py")
    capsys.readouterr()
    assert analyze.main(["--figure", "stability", *folders]) == 0
    out = capsys.readouterr().out
    assert "from 4 runs" in out and "left out" not in out and "Prune_S, r = 1" in out
    path = str(directory_of(tmp_path))
    flatness = ["--flatness", path, "--images", "8", "--eigs", "2"]
    assert analyze.main(flatness) == 2
    assert "--model" in error_line(capsys)
    assert analyze.main([*flatness, "--model", "moved.py:small_vgg"]) == 0
    (tmp_path / "moved.py").write_text(CODE.replace("48", "40"))
    capsys.readouterr()
    assert analyze.main([*flatness, "--model", "moved.py:small_vgg"]) == 2
    assert "--model" in error_line(capsys)


def directory_of(folder):
    return next(folder.glob("logs/*/small_vgg/*/seed1"))


def test_runs_of_an_edited_network_are_not_pooled(run, tmp_path, capsys, file):
    line = own("small_vgg", "--target", "S", "--r", 1, "--s", "0x4", "--e", "2x4")
    for seed in (1, 2, 3):
        if seed == 3:
            file.write_text(CODE + "\n# a remark\n")
        assert run(*line, "--seed", seed) == 0
    problems = [run["problem"] for run in analyze.find_runs(tmp_path / "logs")]
    assert problems[:2] == [None, None] and "source of the model" in problems[2]


def test_hooks_see_every_layer_once_with_the_weights_that_it_uses():
    model, seen = bottleneck_network(pruned=False).eval(), []
    for block in model.prunable:
        block.mask[0] = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = [module for module in model.modules() if not list(module.children())]
    for layer in layers:
        layer.register_forward_hook(
            lambda layer, *_: seen.append((layer, getattr(layer, "weight", None))))
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == len(layers) and set(dict(seen)) == set(layers)
    for block in model.prunable:
        used = dict(seen)[block.conv]
        assert block.conv.weight[0].any() and not used[0].any()
        assert torch.equal(used[1:], block.conv.weight[1:])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
