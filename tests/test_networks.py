"""The networks have the paper's shapes, and a masked filter is gone: its map, its weights, its gradient, its memory."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_batch_norm, tiny_model

import train

MODELS = ("vgg11", "vgg19", "resnet18", "resnet20", "resnet56")
VGG_MAPS = {"vgg11": [64, 128, 256, 256, 512, 512, 512, 512],
            "vgg19": [64, 64, 128, 128, *[256] * 4, *[512] * 8]}
STAGES = {"resnet18": ([64, 128, 256, 512], 2), "resnet20": ([16, 32, 64], 3), "resnet56": ([16, 32, 64], 9)}


def convolution(size, c_in, c_out):
    """Weights of a convolution without bias and of its batch norm."""
    return size * size * c_in * c_out + 2 * c_out


def count_parameters(name, classes):
    if name in VGG_MAPS:
        maps = VGG_MAPS[name]
        return sum(convolution(3, a, b) + b for a, b in zip([3, *maps], maps)) + (maps[-1] + 1) * classes
    stages, depth = STAGES[name]
    total, c_in = convolution(3, 3, stages[0]), stages[0]
    for c_out in stages:
        total += convolution(3, c_in, c_out) + (2 * depth - 1) * convolution(3, c_out, c_out)
        if name == "resnet18" and c_in != c_out:
            total += convolution(1, c_in, c_out)
        c_in = c_out
    return total + (c_in + 1) * classes


def channels(name):
    """The filters of every prunable block at width 1."""
    if name in VGG_MAPS:
        return VGG_MAPS[name]
    stages, depth = STAGES[name]
    return [c for c in stages for _ in range(2 * depth)]


@pytest.mark.parametrize("name, total", [("vgg11", 9_231_114), ("vgg19", 20_040_522), ("resnet18", 11_173_962),
                                         ("resnet20", 269_722), ("resnet56", 853_018)])
def test_parameter_counts_are_the_papers(name, total):
    assert count_parameters(name, 10) == total
    with torch.device("meta"):
        for classes in (10, 100):
            model = train.build_model(name, classes)
            assert sum(p.numel() for p in model.parameters()) == count_parameters(name, classes)


@pytest.mark.parametrize("name, count", [("vgg11", 8), ("vgg19", 16), ("resnet18", 16), ("resnet20", 18),
                                         ("resnet56", 54)])
def test_prunable_blocks_come_in_network_order(name, count):
    with torch.device("meta"):
        model = train.build_model(name)
    assert [len(block.mask) for block in model.prunable] == channels(name)
    assert len(model.prunable) == train.PRUNABLE_BLOCKS[name] == count


@pytest.mark.parametrize("width", [0.001, 0.03125, 0.15625, 0.3, 2])
@pytest.mark.parametrize("name", ("vgg11", "resnet18", "resnet20"))
def test_width_rounds_every_channel_count_half_up_and_keeps_one(name, width):
    with torch.device("meta"):
        model = train.build_model(name, 10, width)
    expected = [max(1, math.floor(c * width + 0.5)) for c in channels(name)]
    assert [len(block.mask) for block in model.prunable] == expected
    assert [block.conv.out_channels for block in model.prunable] == expected


@pytest.mark.parametrize("name", MODELS)
def test_any_class_count_and_any_image_of_at_least_32_pixels(name):
    model = tiny_model(name, 0.05, classes=7)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model(torch.randn(2, 3, 64, 48)).shape == (2, 7)


def test_initial_weights_are_fan_out_normal():
    torch.manual_seed(0)
    model = train.build_model("vgg11", 400, 0.25)
    for block in model.prunable[2:]:
        weight = block.conv.weight.detach()
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * weight.shape[0])), rel=0.03)
        assert abs(weight.mean().item()) < 5 * weight.std().item() / math.sqrt(weight.numel())
        assert not block.conv.bias.any()
    assert model.linear.weight.std().item() == pytest.approx(0.01, rel=0.03)


# Masks. Half of every block's filters go, whichever they are; a block of one filter keeps it.

def choose_half(model):
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(len(b.mask), generator=generator)[:len(b.mask) // 2].sort().values for b in model.prunable]


def prune_half(model, optimizer=None, keep_bn=False):
    chosen = choose_half(model)
    for block, indices in zip(model.prunable, chosen):
        train.prune_block(block, indices, keep_bn, optimizer)
    return chosen


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    model.train()
    loss = F.cross_entropy(model(torch.randn(8, 3, 32, 32, generator=generator)),
                           torch.randint(0, 4, (8,), generator=generator))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def optimizer_of(model, kind):
    options = {"adam": dict(lr=0.01, weight_decay=0.0), "sgd": dict(lr=0.05, weight_decay=1e-2)}[kind]
    return train.make_optimizer(model, SimpleNamespace(optimizer=kind, **options))


def maps_of(model, training):
    """Every prunable block's output on a random batch."""
    maps = []
    hooks = [b.register_forward_hook(lambda _, __, out: maps.append(out.detach().clone())) for b in model.prunable]
    model.train(training)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(9)))
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("kind", ("adam", "sgd"))
@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_filter_leaves_no_trace_and_never_comes_back(name, kind):
    model = tiny_model(name)
    optimizer = optimizer_of(model, kind)
    for seed in range(2):  # the optimiser must have momentum to forget
        step(model, optimizer, seed)
    chosen = choose_half(model)
    assert any(out[:, i].any() for out, i in zip(maps_of(model, False), chosen)), "the test needs maps that live"
    prune_half(model, optimizer)

    masks = [block.mask.clone() for block in model.prunable]
    before = [block.conv.weight.detach().clone() for block in model.prunable]
    for seed in range(5):
        for training in (True, False):
            for out, indices in zip(maps_of(model, training), chosen):
                assert not out[:, indices].any()
        step(model, optimizer, 10 + seed)
        for block, indices, mask in zip(model.prunable, chosen, masks):
            for tensor in (*block.conv.parameters(), *block.bn.parameters()):
                assert not tensor[indices].any() and not tensor.grad[indices].any()
            assert torch.equal(block.mask, mask)
            assert sorted(set(range(len(mask))) - set(indices.tolist())) == mask.nonzero().flatten().tolist()
    assert any(not torch.equal(block.conv.weight, old) for block, old in zip(model.prunable, before))


@pytest.mark.parametrize("name", ("vgg11", "resnet18", "resnet20"))
def test_live_filters_still_get_a_gradient(name):
    model = tiny_model(name)
    chosen = prune_half(model)
    step(model, optimizer_of(model, "sgd"), 0)
    live = [block.conv.weight.grad[block.mask] for block in model.prunable]
    assert all(grad.any() for grad in live) and all(len(indices) for indices in chosen)


def test_pruning_again_only_removes_more():
    block = tiny_model("vgg11").prunable[-1]
    train.prune_block(block, torch.tensor([1, 4]))
    train.prune_block(block, torch.tensor([0, 4]))
    assert (~block.mask).nonzero().flatten().tolist() == [0, 1, 4]


@pytest.mark.parametrize("kind", ("adam", "sgd"))
@pytest.mark.parametrize("name", ("vgg11", "resnet18"))
def test_prune_bn_keep_takes_the_convolution_weights_only(name, kind):
    model = tiny_model(name)
    optimizer = optimizer_of(model, kind)
    step(model, optimizer, 0)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    chosen = prune_half(model, optimizer, keep_bn=True)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, old[k])}
    assert changed and all(k.endswith((".conv.weight", ".mask")) for k in changed)
    for seed in range(3):
        step(model, optimizer, seed)
    for block, indices in zip(model.prunable, chosen):
        assert not block.conv.weight[indices].any() and not block.conv.weight.grad[indices].any()
        assert block.bn.weight[indices].all() and block.bn.bias[indices].all()
    moved = [b.bn.bias.grad[i].any() for b, i in zip(model.prunable, chosen)]
    assert any(moved), "a kept batch norm still learns"


def test_a_kept_shortcut_still_reaches_the_map():
    model = tiny_model("resnet18")
    second = model.prunable[-1]
    everything = torch.arange(len(second.mask))
    train.prune_block(second, everything, keep_bn=True)
    out = maps_of(model, False)[-1]
    before = maps_of(model, False)[-3]  # the pair's input, which an identity shortcut carries past it
    expected = F.relu(before + (second.bn.bias - second.bn.weight * second.bn.running_mean
                                / (second.bn.running_var + 1e-5).sqrt()).view(-1, 1, 1))
    assert out.any() and torch.allclose(out, expected, atol=1e-5)


def test_a_shortcuts_own_parameters_are_untouched_by_pruning():
    model = tiny_model("resnet18")
    optimizer = optimizer_of(model, "adam")
    step(model, optimizer, 0)
    own = {name: p for name, p in model.named_parameters() if name.startswith("shortcuts")}
    assert len(own) == 3 * 3
    old = {name: (p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())) for name, p in own.items()}
    prune_half(model, optimizer)
    for name, p in own.items():
        assert all(torch.equal(a, b) for a, b in zip((p, *optimizer.state[p].values()), old[name]))


# The same network without its pruned filters, by functional calls on sliced tensors.

def live(block):
    return block.mask.nonzero().flatten()


def small_batch_norm(x, bn, kept, training):
    return F.batch_norm(x, bn.running_mean[kept], bn.running_var[kept], bn.weight[kept], bn.bias[kept], training)


def small_vgg(model, x, training):
    inputs = torch.arange(3)
    for layer in model.features:
        if not isinstance(layer, train.Block):
            continue
        kept = live(layer)
        x = F.conv2d(x, layer.conv.weight[kept][:, inputs], layer.conv.bias[kept], padding=1)
        x, inputs = F.relu(small_batch_norm(x, layer.bn, kept, training)), kept
        x = F.max_pool2d(x, 2) if layer.pool else x
    return x.mean((2, 3)) @ model.linear.weight[:, inputs].T + model.linear.bias


def small_resnet(model, x, training):
    stem = model.stem
    x = F.conv2d(x, stem.conv.weight, padding=1)
    x = F.relu(small_batch_norm(x, stem.bn, torch.arange(x.shape[1]), training))
    for (first, second), shortcut in zip(model.pairs, model.shortcuts):
        stride, c_out = first.conv.stride, second.conv.out_channels
        a, b = live(first), live(second)
        inside = F.conv2d(x, first.conv.weight[a], stride=stride, padding=1)
        inside = F.relu(small_batch_norm(inside, first.bn, a, training))
        inside = F.conv2d(inside, second.conv.weight[b][:, a], padding=1)
        inside = small_batch_norm(inside, second.bn, b, training)
        if len(list(shortcut.children())):
            projection, bn = shortcut
            past = small_batch_norm(F.conv2d(x, projection.weight[b], stride=stride), bn, b, training)
        else:
            spread = x.new_zeros(len(x), c_out, *inside.shape[2:])
            first_map = (c_out - x.shape[1]) // 2
            spread[:, first_map:first_map + x.shape[1]] = x[:, :, ::stride[0], ::stride[1]]
            past = spread[:, b]
        x = x.new_zeros(len(x), c_out, *inside.shape[2:])
        x[:, b] = F.relu(inside + past)
    return x.mean((2, 3)) @ model.linear.weight.T + model.linear.bias


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", MODELS)
def test_masked_and_physically_smaller_network_agree(name, training):
    model = randomise_batch_norm(tiny_model(name).double())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model.train(training)
    with torch.no_grad():
        whole = model(x).clone()
        prune_half(model)
        small = (small_vgg if name.startswith("vgg") else small_resnet)(model, x, training)
        masked = model(x)
    assert not torch.allclose(masked, whole, rtol=1e-3), "the pruned filters must have mattered"
    torch.testing.assert_close(masked, small, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", (0.04, 0.06, 0.1))  # stages of 1, 1 and 3, of 1, 2 and 4, and of 2, 3 and 6 filters
def test_shortcuts_of_very_narrow_networks_are_the_same_for_both_backends(width):
    model, x = tiny_model("resnet20", width).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(train.use_backend(model, "ext")(x), train.use_backend(model, "eager")(x))


@pytest.mark.parametrize("name", train.PRUNABLE_BLOCKS)
def test_cost_of_a_pruned_network_is_that_of_a_small_one_built_as_such(name):
    """Parameters and multiply-adds, against torch's own counter on the compact network of the live filters."""
    from torch.utils.flop_counter import FlopCounterMode
    model = train.build_model(name, 10, 0.25).eval()
    parameters, macs = train.cost(model, (32, 32, 3))
    assert parameters == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert 2 * macs == counter.get_total_flops()
    if name.startswith("vgg"):
        small = train.build_model(name, 10, 0.125)
        for block in model.prunable:
            train.prune_block(block, torch.arange(len(block.mask) // 2))
        assert train.cost(model, (32, 32, 3)) == train.cost(small, (32, 32, 3))
        assert train.cost(small, (32, 32, 3))[0] == sum(p.numel() for p in small.parameters())


def test_cost_of_pruned_residual_blocks():
    """Of ResNet20's first stage the second block's convolutions, one filter less each, by hand."""
    model = train.build_model("resnet20")
    whole = train.cost(model, (32, 32, 3))
    train.prune_block(model.prunable[0], torch.tensor([3]))
    less = train.cost(model, (32, 32, 3))
    assert whole[0] - less[0] == 2 * 16 * 9 + 2 and whole[1] - less[1] == 2 * 16 * 9 * 32 * 32
    train.prune_block(model.prunable[1], torch.tensor([5]))
    assert less[0] - train.cost(model, (32, 32, 3))[0] == 15 * 9 + 2 + 16 * 9, "the next block reads its map"


def test_a_projection_reads_every_second_pixel():
    """Of a whole stage: against the stride taken by the convolution itself."""
    model = train.build_model("resnet18", width=0.25).eval()
    (first, second), shortcut, x = model.pairs[2], model.shortcuts[2], torch.randn(4, 16, 10, 10)
    conv, bn = shortcut
    expected = second(first(x), bn(F.conv2d(x, conv.weight, stride=2)))
    model.stem, model.linear = torch.nn.Identity(), torch.nn.Identity()
    model.pairs, model.shortcuts = torch.nn.ModuleList([model.pairs[2]]), torch.nn.ModuleList([shortcut])
    model.linear.weight, model.linear.bias = torch.eye(32), torch.zeros(32)
    torch.testing.assert_close(model(x), expected.mean((2, 3)))


def test_the_gradient_of_a_narrow_projection_stays_in_its_memory():
    """oneDNN's own of a strided one with so few channels ends the process, sooner or later."""
    model = train.build_model("resnet18", width=0.06)
    for _ in range(20):
        model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
