"""The CIFAR networks, made of blocks that know their live filters.

A network has `prunable`, the list of blocks that may be pruned, in network order; `linear`, its
last layer; `round_to` (see Block); and update_live_channels(), which updates every block and sets
`live`, the channels that reach the last layer.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import ops
from .errors import UserError, check

BN_MOMENTUM, BN_EPS = 0.1, 1e-5
ACT_EMA_DECAY = 0.9  # the EMA of mean |a| is 0.9 * old + 0.1 * new (A.4, footnote 4)
PRUNABLE_BLOCKS = {"vgg11": 8, "vgg19": 16, "resnet18": 16, "resnet20": 18, "resnet56": 54}
OWN_NETWORKS = {}  # name: a user's function (num_classes, width) → network (docs/networks.md)


class Block(nn.Module):
    """conv → batch norm → (+ shortcut) → ReLU (→ 2x2 max-pool), with a mask of its filters.

    The backend "eager" multiplies by the masks. The backend "ext" computes compact maps: those of
    the live filters, filled up with zero maps of pruned ones to a multiple of model.round_to. Call
    set_backend again after changing a mask: it updates the channel indices.

    Buffers:
        mask: (c_out,) bool, True for a live filter.
        bn_mask: (c_out,) bool, the same for the batch norm and the shortcut of each filter; it
            differs from mask under --prune-bn keep only.
        act: (c_out,) the EMA of mean |a|, a the map before ReLU.
    """

    def __init__(self, c_in, c_out, kernel=3, stride=1, bias=False):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(c_out, BN_EPS, BN_MOMENTUM)
        self.register_buffer("mask", torch.ones(c_out, dtype=torch.bool))
        self.register_buffer("bn_mask", torch.ones(c_out, dtype=torch.bool))
        self.register_buffer("act", torch.zeros(c_out))
        self.pool = False
        self.update_act = False  # whether the next training batches update act
        self.backend, self.bn_kept = "eager", False  # bn_kept: mask and bn_mask differ
        # Channel indices, int64, None for all: those of the compact input and output, and where
        # each output channel is in the compact shortcut (-1: nowhere).
        self.live_in, self.live_out, self.shortcut_map = None, None, None

    def forward(self, x, shortcut=None):
        """Maps x (n, c_in, h, w) and a shortcut (n, c_out, h', w') or None to (n, c_out, h', w').

        A pruned map is exactly 0. The parameters are masked, and not the map only, so that the
        gradient of a pruned filter is exactly 0.
        """
        conv, bn = self.conv, self.bn
        act = self.act if self.update_act and self.training else None
        if self.backend == "ext":
            weight = conv.weight * self.mask.view(-1, 1, 1, 1) if self.bn_kept else conv.weight
            return ops.masked_conv_bn_act(
                x, weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var,
                self.live_out, self.live_in, conv.stride[0], conv.padding[0], shortcut,
                self.shortcut_map, act, training=self.training, momentum=bn.momentum, eps=bn.eps,
                ema_decay=ACT_EMA_DECAY, pool=self.pool)
        a = call_layer(conv, x, weight=conv.weight * self.mask.view(-1, 1, 1, 1))
        a = call_layer(bn, a, weight=bn.weight * self.bn_mask, bias=bn.bias * self.bn_mask,
                       num_batches_tracked=None)
        if shortcut is not None:
            a = a + shortcut * self.bn_mask.view(-1, 1, 1)
        if act is not None:
            mean = a.detach().abs().mean((0, 2, 3), dtype=torch.float32)
            act.mul_(ACT_EMA_DECAY).add_(mean, alpha=1 - ACT_EMA_DECAY)
        a = F.relu(a, inplace=True)
        return F.max_pool2d(a, 2) if self.pool else a

    def update_live_channels(self, live_in, round_to):
        """Sets the input's channel indices and returns the output's (None for all)."""
        self.bn_kept = not torch.equal(self.mask, self.bn_mask)
        n = min(len(self.mask), math.ceil(int(self.bn_mask.sum()) / round_to) * round_to)
        live_out = None
        if n < len(self.mask):
            live_out = torch.argsort(~self.bn_mask, stable=True)[:n].sort().values
        self.live_in, self.live_out = live_in, copy_into(self.live_out, live_out)
        return self.live_out

    def num_computed_filters(self):
        all_computed = self.backend == "eager" or self.live_out is None
        return len(self.mask) if all_computed else len(self.live_out)


def call_layer(layer, x, **attributes):
    """Calls a layer with other attributes than its own, so that its hooks see the call.

    torch.func.functional_call takes five times as long for it.
    """
    vars(layer).update(attributes)  # found before the parameters and buffers of the same names
    try:
        return layer(x)
    finally:
        for name in attributes:
            del vars(layer)[name]


def copy_into(old, new):
    """Copies `new` into `old` if the shapes match, else returns `new`.

    A captured CUDA graph keeps reading its channel indices from the old address.
    """
    fits = old is not None and new is not None and old.shape == new.shape
    return old.copy_(new) if fits else new


def all_blocks(model):
    """Returns the model's blocks, those that are never pruned (a stem) among them."""
    return [module for module in model.modules() if isinstance(module, Block)]


def set_backend(model, backend):
    """Makes every block compute by "ext" or "eager", with its present masks; returns the model."""
    for block in all_blocks(model):
        block.backend = backend
    model.backend = backend
    if backend == "ext":
        model.update_live_channels()
    return model


def graph_key(model):
    """Returns what of the network a captured CUDA graph holds as constants."""
    return [(block.bn_kept, block.num_computed_filters(), block.shortcut_map is None)
            for block in model.prunable]


def average_and_classify(model, x):
    """Returns the last layer's logits for the mean of each map of x (n, c, h, w)."""
    x, linear = x.mean((2, 3)), model.linear
    if model.backend == "eager" or model.live is None:
        return linear(x)
    return F.linear(x, linear.weight[:, model.live], linear.bias)


class PaddedShortcut(nn.Module):
    """ResNet's shortcut without parameters (option A): zero maps around the given ones."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.c_in, self.before = c_in, (c_out - c_in) // 2
        self.after = c_out - c_in - self.before

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class VGG(nn.Module):
    """VGG with batch norm; `widths` lists the filters of each block, and "pool" for a max-pool."""

    def __init__(self, widths, num_classes):
        super().__init__()
        layers, c_in = [], 3
        for c_out in widths:
            if c_out == "pool":
                layers[-1].pool = True
                layers.append(nn.Identity())  # keeps the layers' numbers those of the paper's VGG
            else:
                layers.append(Block(c_in, c_out, bias=True))
                c_in = c_out
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(c_in, num_classes)
        self.prunable = [layer for layer in layers if isinstance(layer, Block)]
        nn.init.normal_(self.linear.weight, 0, 0.01)
        nn.init.zeros_(self.linear.bias)

    def update_live_channels(self):
        self.live = None
        for block in self.prunable:
            self.live = block.update_live_channels(self.live, self.round_to)

    def forward(self, x):
        return average_and_classify(self, self.features(x))  # of 32x32 images a map has one pixel


def basic_branch(c_in, c_out, stride):
    """Returns the two blocks beside a shortcut of the paper's ResNets."""
    return [Block(c_in, c_out, stride=stride), Block(c_out, c_out)]


class ResNet(nn.Module):
    """A stem and stages of branches, each beside a shortcut that its last block adds.

    Args:
        stem: The filters of the first block, which is not pruned.
        stages: The channels of each stage. Every stage but the first halves the maps.
        depth: The branches of a stage.
        projection: Whether shortcuts between other shapes are 1x1 convolutions (option B) or
            padded with zeros (A).
        branch: The function (c_in, c_out, stride) → list of the Blocks of a branch.
    """

    def __init__(self, stem, stages, depth, projection, num_classes, branch=basic_branch):
        super().__init__()
        self.stem = Block(3, stem)
        self.pairs = nn.ModuleList()  # the branches; checkpoints name their blocks so
        self.shortcuts, self.strides, c_in = nn.ModuleList(), [], stem
        for stage, c_out in enumerate(stages):
            for i in range(depth):
                stride = 2 if stage and not i else 1
                self.pairs.append(nn.ModuleList(branch(c_in, c_out, stride)))
                self.strides.append(stride)
                if stride == 1 and c_in == c_out:
                    shortcut = nn.Identity()
                elif projection:
                    shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False),
                                             nn.BatchNorm2d(c_out, BN_EPS, BN_MOMENTUM))
                else:
                    shortcut = PaddedShortcut(c_in, c_out)
                self.shortcuts.append(shortcut)
                c_in = c_out
        self.linear = nn.Linear(c_in, num_classes)
        self.prunable = [block for blocks in self.pairs for block in blocks]

    def update_live_channels(self):
        self.live = self.stem.update_live_channels(None, 1)
        for blocks, shortcut in zip(self.pairs, self.shortcuts):
            live_in = self.live
            for block in blocks:
                self.live = block.update_live_channels(self.live, self.round_to)
            block.shortcut_map = copy_into(block.shortcut_map,
                                           map_shortcut(shortcut, live_in, block))

    def forward(self, x):
        x = self.stem(x)
        for blocks, shortcut, stride in zip(self.pairs, self.shortcuts, self.strides):
            # The stride is taken here, since oneDNN is not safe with one in the shortcut.
            strided = x[:, :, ::stride, ::stride]
            compact = self.backend == "ext"
            added = compact_shortcut(shortcut, strided, blocks[0]) if compact else shortcut(strided)
            *inner, last = blocks
            for block in inner:
                x = block(x)
            x = last(x, added)
        return average_and_classify(self, x)


def map_shortcut(shortcut, live_in, block):
    """Finds where each filter that `block` computes is in compact_shortcut's output.

    Args:
        shortcut: The module of the shortcut.
        live_in: The channel indices of the shortcut's input (None for all).
        block: The block that adds the shortcut; a pruned filter's shortcut is pruned, too.

    Returns:
        An int64 index, -1 for nowhere; None if the order is the same.
    """
    before, n = 0, len(block.mask)
    if isinstance(shortcut, PaddedShortcut):
        before, n = shortcut.before, shortcut.c_in
    if isinstance(shortcut, nn.Sequential):
        live_in = None  # a projection computes all its maps
    live = block.bn_mask.tolist()
    if n == len(live) and live_in is block.live_out is None and all(live):
        return None
    channels = range(n) if live_in is None else live_in.tolist()
    position = {channel + before: i for i, channel in enumerate(channels)}
    filters = range(len(live)) if block.live_out is None else block.live_out.tolist()
    return torch.tensor([position.get(f, -1) if live[f] else -1 for f in filters],
                        dtype=torch.int64, device=block.mask.device)


def compact_shortcut(shortcut, x, first):
    """Computes a shortcut of compact maps x: all maps of a projection, else x itself.

    Args:
        first: The first block of the branch, which has the same input as the shortcut.
    """
    if not isinstance(shortcut, nn.Sequential):
        return x
    conv, bn = shortcut
    if first.training:
        bn.num_batches_tracked.add_(1)  # as the module itself does
    return ops.masked_conv_bn_act(x, conv.weight, None, bn.weight, bn.bias, bn.running_mean,
                                  bn.running_var, None, first.live_in, 1, 0,
                                  training=first.training, relu=False, momentum=bn.momentum,
                                  eps=bn.eps)


def count_params_and_macs(model, image):
    """Counts the parameters left and the multiply-adds of one image (height, width, ...).

    Live filters and their inputs that are not constantly 0 count, and projection shortcuts in
    full; convolutions and the last layer multiply.
    """
    num_params, macs, c_in, size = 0, 0, 3, image[:2]

    def count(conv, size, c_in, filters, maps):
        nonlocal num_params, macs
        k, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
        size = [(s + 2 * padding - k) // stride + 1 for s in size]
        num_params += c_in * filters * k * k + filters * (conv.bias is not None) + 2 * maps
        macs += c_in * filters * k * k * math.prod(size)
        return size

    ends = {blocks[-1]: (blocks[0], shortcut) for blocks, shortcut in zip(
        getattr(model, "pairs", ()), getattr(model, "shortcuts", ()))}
    inputs = {}  # block: its input channels that are not 0
    for block in all_blocks(model):
        maps, inputs[block] = int(block.bn_mask.sum()), c_in
        size = count(block.conv, size, c_in, int(block.mask.sum()), maps)
        first, shortcut = ends.get(block, (None, None))
        if isinstance(shortcut, nn.Sequential):
            count(shortcut[0], size, inputs[first], len(block.mask), len(block.mask))
        size = [s // 2 if block.pool else s for s in size]
        c_in = maps
    num_classes = len(model.linear.bias)
    return num_params + num_classes * (c_in + 1), macs + num_classes * c_in


def build_model(name, num_classes=10, width=1.0):
    """Builds a CIFAR network, initialised from torch's global generator, in channels-last memory.

    It maps (n, 3, h, w), h and w at least 32, to logits (n, num_classes); `.prunable` lists the
    blocks that may be pruned, in network order.
    """
    def widths(*counts):
        return [c if c == "pool" else max(1, math.floor(c * width + 0.5)) for c in counts]

    if name == "vgg11":
        model = VGG(widths(64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512,
                           "pool"), num_classes)
    elif name == "vgg19":
        model = VGG(widths(64, 64, "pool", 128, 128, "pool", *[256] * 4, "pool", *[512] * 4, "pool",
                           *[512] * 4, "pool"), num_classes)
    elif name == "resnet18":
        stages = widths(64, 128, 256, 512)
        model = ResNet(stages[0], stages, 2, True, num_classes)
    elif name in ("resnet20", "resnet56"):
        stages = widths(16, 32, 64)
        model = ResNet(stages[0], stages, 3 if name == "resnet20" else 9, False, num_classes)
    elif name in OWN_NETWORKS:
        model = OWN_NETWORKS[name](num_classes, width)
    else:
        raise UserError(f"no model {name}: choose from {', '.join(PRUNABLE_BLOCKS)}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    model.round_to = 1
    return set_backend(model.to(memory_format=torch.channels_last), "eager")


def add_own_network(name, function):
    """Lets build_model(name) build a user's network; returns the number of its prunable blocks.

    Args:
        function: (num_classes, width) → a VGG, a ResNet, or a module with what these have.
    """
    OWN_NETWORKS[name] = function
    with torch.device("meta"):
        model = build_model(name)
    for block in all_blocks(model):
        block.mask = block.bn_mask = torch.ones(len(block.mask), dtype=torch.bool)  # to be counted
    others = sum(p.numel() for p in model.parameters()) - count_params_and_macs(model, (32, 32))[0]
    check(not others, f"{others} of its parameters are not those of Blocks, each with the one "
          "before as its input, shortcuts and the linear layer")
    return len(model.prunable)
