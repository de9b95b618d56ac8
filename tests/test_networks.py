"""The networks have the paper's shapes, and pruned filters leave nothing but zeros."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_ext, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import train
from gst_ext.networks import (PRUNABLE_BLOCKS, Block, build_model, count_params_and_macs,
                              set_backend)

VGG_FILTERS = {"vgg11": [64, 128, 256, 256, 512, 512, 512, 512],
               "vgg19": [64, 64, 128, 128, *[256] * 4, *[512] * 8]}
STAGES = {"resnet18": ([64, 128, 256, 512], 2), "resnet20": ([16, 32, 64], 3),
          "resnet56": ([16, 32, 64], 9)}


def filters_of(name):
    """Returns the number of filters of every prunable block at width 1."""
    if name in VGG_FILTERS:
        return VGG_FILTERS[name]
    stages, depth = STAGES[name]
    return [c for c in stages for _ in range(2 * depth)]


@pytest.mark.parametrize("name, num_blocks, num_params", [
    ("vgg11", 8, 9_231_114), ("vgg19", 16, 20_040_522), ("resnet18", 16, 11_173_962),
    ("resnet20", 18, 269_722), ("resnet56", 54, 853_018)])
def test_blocks_and_parameters_are_the_papers(name, num_blocks, num_params):
    with torch.device("meta"):
        model, other = build_model(name), build_model(name, 100)
    assert [len(block.mask) for block in model.prunable] == filters_of(name)
    assert len(model.prunable) == PRUNABLE_BLOCKS[name] == num_blocks
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, other)]
    assert sizes == [num_params, num_params + 90 * (filters_of(name)[-1] + 1)]


@pytest.mark.parametrize("name, width", [("vgg11", 0.001), ("resnet18", 0.15625),
                                         ("resnet20", 0.03125), ("resnet56", 2), ("vgg19", 0.3)])
def test_width_rounds_every_number_of_filters_half_up_and_keeps_one(name, width):
    with torch.device("meta"):
        model = build_model(name, 10, width)
    expected = [max(1, math.floor(c * width + 0.5)) for c in filters_of(name)]
    assert [len(block.mask) for block in model.prunable] == expected
    assert [block.conv.out_channels for block in model.prunable] == expected


@pytest.mark.parametrize("name", PRUNABLE_BLOCKS)
def test_any_number_of_classes_and_any_image_of_at_least_32_pixels(name):
    model = tiny_model(name, 0.05, classes=7)
    for size in ((32, 32), (64, 48)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 7)


def test_initial_weights_are_fan_out_normal():
    torch.manual_seed(0)
    model = build_model("vgg11", 400, 0.25)
    for block in model.prunable[2:]:
        weight = block.conv.weight.detach()
        sigma = math.sqrt(2 / (9 * len(weight)))
        assert weight.std().item() == pytest.approx(sigma, rel=0.03)
        assert abs(weight.mean().item()) < 5 * sigma / math.sqrt(weight.numel())
        assert not block.conv.bias.any()
    assert model.linear.weight.std().item() == pytest.approx(0.01, rel=0.03)


# Masks: half of every block's filters are pruned; a block of one filter keeps it.

def prune_half(model, optimizer=None, keep_bn=False):
    """Returns the indices that were pruned, a tensor for each block."""
    generator, pruned = torch.Generator().manual_seed(1), []
    for block in model.prunable:
        n = len(block.mask)
        pruned.append(torch.randperm(n, generator=generator)[:n // 2].sort().values)
        train.prune_filters(block, pruned[-1], keep_bn, optimizer)
    return pruned


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    model.train()
    loss = F.cross_entropy(model(torch.randn(8, 3, 32, 32, generator=generator)),
                           torch.randint(0, 4, (8,), generator=generator))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def block_outputs(model, training=False):
    """Returns the maps of every prunable block for a random batch."""
    maps = []
    hooks = [block.register_forward_hook(lambda _, __, out: maps.append(out.clone()))
             for block in model.prunable]
    with torch.no_grad():
        model.train(training)(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9)))
    for hook in hooks:
        hook.remove()
    return maps


def snapshot(model, optimizer):
    """Returns {parameter: [its values, its tensors in the optimizer's state]}."""
    return {p: [tensor.detach().clone() for tensor in (p, *optimizer.state[p].values())]
            for p in model.parameters()}


@pytest.mark.parametrize("name, kind, keep_bn", [
    ("vgg11", "adam", False), ("vgg19", "sgd", False), ("resnet18", "adam", False),
    ("resnet20", "sgd", False), ("vgg11", "sgd", True), ("resnet18", "adam", True)])
def test_a_pruned_filter_stays_zero_and_nothing_else_changes(name, kind, keep_bn):
    model = tiny_model(name)
    optimizer = train.make_optimizer(model, kind, 0.02, 1e-2 if kind == "sgd" else 0.0)
    for seed in range(2):  # so that there is momentum, which would move the zeros
        step(model, optimizer, seed)
    expected, maps = snapshot(model, optimizer), block_outputs(model)
    blocks = dict(zip(model.prunable, prune_half(model, optimizer, keep_bn)))
    assert any(out[:, i].any() for out, i in zip(maps, blocks.values())), "these maps were live"
    pruned = {}
    for block, indices in blocks.items():
        params = [] if keep_bn else [block.conv.bias, block.bn.weight, block.bn.bias]
        pruned |= {p: indices for p in (block.conv.weight, *params) if p is not None}
    for p, values in expected.items():  # those of shortcuts and the stem among them
        for value in values:
            if value.dim():
                value[pruned.get(p, [])] = 0
    found = snapshot(model, optimizer)
    assert all(torch.equal(a, b) for p in found for a, b in zip(found[p], expected[p], strict=True))

    for seed in range(4):
        for training in (True, False):
            for out, indices in zip(block_outputs(model, training), blocks.values()):
                assert keep_bn or not out[:, indices].any()
        step(model, optimizer, 10 + seed)
        assert not any(p[i].any() or p.grad[i].any() for p, i in pruned.items())
        for block, indices in blocks.items():
            assert (~block.mask).nonzero().flatten().tolist() == indices.tolist()
            assert block.bn_mask.all() if keep_bn else torch.equal(block.mask, block.bn_mask)
            assert block.conv.weight.grad.any()
    kept = any(block.bn.bias.grad[indices].any() for block, indices in blocks.items())
    assert kept == keep_bn, "a kept batch norm still learns"


def test_a_kept_shortcut_still_reaches_the_map():
    model = tiny_model("resnet18")
    block = model.prunable[-1]
    train.prune_filters(block, torch.arange(len(block.mask)), keep_bn=True)
    *_, before, _, out = block_outputs(model)  # the last two blocks add `before` as it is
    bn = block.bn
    shift = bn.bias - bn.weight * bn.running_mean / (bn.running_var + 1e-5).sqrt()
    torch.testing.assert_close(out, F.relu(before + shift.view(-1, 1, 1)))
    assert out.any()


class SmallNetwork:
    """A pruned network by functional calls on the slices of live filters; counts those it reads."""

    def __init__(self, model, training):
        self.model, self.training, self.num_params = model, training, 0

    def read(self, tensor, *live):
        for dim, index in enumerate(live):
            tensor = tensor.index_select(dim, index)
        self.num_params += tensor.numel()
        return tensor

    def conv_bn(self, x, conv, bn, live_in, live, padding=1):
        weight = self.read(conv.weight, live, live_in)
        bias = None if conv.bias is None else self.read(conv.bias, live)
        x = F.conv2d(x, weight, bias, conv.stride, padding)
        return F.batch_norm(x, bn.running_mean[live], bn.running_var[live],
                            self.read(bn.weight, live), self.read(bn.bias, live), self.training)

    def vgg(self, x):
        live = torch.arange(3)
        for block in (layer for layer in self.model.features if isinstance(layer, Block)):
            live_in, live = live, block.mask.nonzero().flatten()
            x = self.conv_bn(x, block.conv, block.bn, live_in, live).relu()
            x = F.max_pool2d(x, 2) if block.pool else x
        return x, live

    def resnet(self, x):
        stem = self.model.stem
        live = torch.arange(len(stem.mask))
        x = self.conv_bn(x, stem.conv, stem.bn, torch.arange(3), live).relu()
        for (first, second), shortcut in zip(self.model.pairs, self.model.shortcuts):
            live_in, middle, live = live, *(b.mask.nonzero().flatten() for b in (first, second))
            stride, num_in, n = first.conv.stride[0], first.conv.in_channels, len(second.mask)
            past = x[:, :, ::stride, ::stride]
            if isinstance(shortcut, torch.nn.Sequential):  # a projection stays whole
                conv, bn = copy.copy(shortcut[0]), shortcut[1]
                conv.stride = 1
                past = self.conv_bn(past, conv, bn, live_in, torch.arange(n), 0)
            else:
                spread = past.new_zeros(len(x), n, *past.shape[2:])
                spread[:, (n - num_in) // 2 + live_in] = past
                past = spread
            x = self.conv_bn(x, first.conv, first.bn, live_in, middle).relu()
            x = self.conv_bn(x, second.conv, second.bn, middle, live)
            x = (x + past[:, live]).relu()
        return x, live

    def __call__(self, x):
        x, live = self.vgg(x) if hasattr(self.model, "features") else self.resnet(x)
        weight = self.read(self.model.linear.weight, torch.arange(4), live)
        return F.linear(x.mean((2, 3)), weight, self.read(self.model.linear.bias))


@torch.no_grad()
@pytest.mark.parametrize("name", PRUNABLE_BLOCKS)
def test_a_masked_network_is_a_physically_smaller_one_in_logits_and_size(name):
    for training in (False, True):
        model = tiny_model(name).double().train(training)
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        for prune in (lambda model: None, prune_half):
            before = model(x).clone()
            prune(model)
            small = SmallNetwork(copy.deepcopy(model), training)
            with FlopCounterMode(display=False) as counter:
                logits = small(x)
            torch.testing.assert_close(model(x), logits, rtol=1e-10, atol=1e-12)
            params_and_macs = small.num_params, counter.get_total_flops() / 2 / len(x)
            assert count_params_and_macs(model, (32, 32, 3)) == params_and_macs
        assert not torch.allclose(before, logits, rtol=1e-3), "the pruned filters mattered"


def outcome(model, backend):
    """Returns the logits, the gradients and the buffers of a network after a step by a backend."""
    model = set_backend(copy.deepcopy(model), backend).train()
    x = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    logits = model(x.contiguous(memory_format=torch.channels_last))
    F.cross_entropy(logits, torch.arange(12) % 4).backward()
    with torch.no_grad():
        results = {"train": logits, "eval": model.eval()(x)} | dict(model.named_buffers())
    return model, results | {f"d{k}": p.grad for k, p in model.named_parameters()}


@needs_ext
@pytest.mark.parametrize("name, width, round_to, keep_bn", [
    ("vgg11", 0.1, 1, False), ("vgg19", 0.06, 3, True), ("vgg11", 0.15, 8, False),
    ("resnet18", 0.1, 3, False), ("resnet18", 0.06, 1, True), ("resnet20", 0.15, 8, False),
    # stages of 1, 1, 3 filters, of 1, 2, 4, and of 2, 3, 6
    ("resnet20", 0.04, 1, False), ("resnet20", 0.06, 2, True), ("resnet56", 0.1, 1, False)])
def test_both_backends_compute_the_same_network(name, width, round_to, keep_bn):
    model = tiny_model(name, width)
    prune_half(model, keep_bn=keep_bn)
    model.double().round_to = round_to
    for block in model.prunable:
        block.update_act, block.act = True, block.act.float()
    (_, expected), (ext, results) = outcome(model, "eager"), outcome(model, "ext")
    scale = max(v.abs().max() for k, v in expected.items() if k.startswith("d"))
    for k, v in expected.items():
        floor = max(1e-7, 1e-10 * scale if k.startswith("d") else 0)
        torch.testing.assert_close(results[k], v, rtol=1e-5, atol=floor, msg=lambda m: f"{k}: {m}")
    for block in ext.prunable:
        n = math.ceil(int(block.bn_mask.sum()) / round_to) * round_to
        assert block.num_computed_filters() == min(len(block.mask), n)
        assert block.live_out is None or (block.live_out.diff() > 0).all(), "ascending"
        assert not block.conv.weight.grad[~block.mask].any()
        assert not block.bn.weight.grad[~block.bn_mask].any()


def test_the_gradient_of_a_narrow_projection_stays_in_its_memory():
    """oneDNN's gradient of a strided one with few channels would end the process at some time."""
    model = build_model("resnet18", width=0.06)
    for _ in range(20):
        model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
