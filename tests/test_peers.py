"""What other packages count, prune and see of these networks (docs/peers.md)."""
import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import train
from gst_ext.networks import Block, build_model, set_backend

COUNTED = {  # 152,769,536 multiply-adds of the eager VGG11, and what each package adds
    "fvcore": 153_072_640, "thop": 153_375_744, "ptflops": 153_500_682, "torchinfo": 152_926_602,
    "torch": 2 * 152_769_536}


def count(package, model, x):
    if package == "torch":
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()
    library = pytest.importorskip("fvcore.nn" if package == "fvcore" else package)
    if package == "fvcore":
        return library.FlopCountAnalysis(model, x).unsupported_ops_warnings(False).total()
    if package == "thop":
        return library.profile(model, (x,), verbose=False)[0]
    if package == "torchinfo":
        return library.summary(model, x.shape, verbose=0).total_mult_adds
    return library.get_model_complexity_info(model, tuple(x.shape[1:]), as_strings=False,
                                             print_per_layer_stat=False, backend="pytorch")[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", COUNTED)
def test_counters_see_every_layer_of_the_eager_network(package):
    model = set_backend(build_model("vgg11"), "eager").eval()
    assert count(package, model, torch.zeros(1, 3, 32, 32)) == COUNTED[package]


def unmasked(self, x, shortcut=None):
    """Block.forward without masks, which keep their size when another package prunes."""
    a = self.bn(self.conv(x))
    a = F.relu(a if shortcut is None else a + shortcut)
    return F.max_pool2d(a, 2) if self.pool else a


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet20"])
def test_the_same_filters_removed_by_torch_pruning_give_the_same_logits(name, monkeypatch):
    """Of a ResNet those of each first block: Torch-Pruning prunes all that a stage adds at once."""
    tp = pytest.importorskip("torch_pruning")
    model, x = tiny_model(name, 0.15).eval(), torch.randn(4, 3, 32, 32)
    theirs, before = copy.deepcopy(model), model(x)
    inner = [blocks[0] for blocks in getattr(model, "pairs", ())] or model.prunable
    gone = {i: [0, *range(2, len(block.mask), 3)] for i, block in enumerate(model.prunable)
            if block in inner and len(block.mask) > 1}
    for i, filters in gone.items():
        train.prune_filters(model.prunable[i], torch.tensor(filters))
    logits = model(x)
    assert not torch.allclose(logits, before, rtol=0.1), "the filters mattered"
    monkeypatch.setattr(Block, "forward", unmasked)
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(theirs, x)
    for i, filters in gone.items():
        conv = theirs.prunable[i].conv
        graph.get_pruning_group(conv, tp.prune_conv_out_channels, filters).prune()
        assert conv.out_channels == len(model.prunable[i].mask) - len(filters)
    torch.testing.assert_close(theirs(x), logits)
