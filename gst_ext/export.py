"""The small network alone: torch.nn layers of the live filters, in files that need nothing else.

compact(model) is a plain nn.Module, to train on or to count; save(model, folder, ...) writes
network.pt2 and network.onnx. docs/export.md shows how they are used.
"""
import importlib.util
import io
import json
import pathlib
from collections import OrderedDict

import torch
import torch.nn as nn

from .networks import PaddedShortcut, ResNet
from .rundir import write_atomically


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)).

    Args:
        index: (c_out,) int64, where each map of the body is in the shortcut's output; None if the
            order is the same.
    """

    def __init__(self, body, shortcut, index):
        super().__init__()
        self.body, self.shortcut, self.relu = body, shortcut, nn.ReLU(inplace=True)
        self.register_buffer("index", index)

    def forward(self, x):
        added = self.shortcut(x)
        if self.index is not None:
            added = added.index_select(1, self.index)
        return self.relu(self.body(x) + added)


class Normalised(nn.Module):
    """Normalises uint8 images (n, h, w, 3) as in training and applies a network to them."""

    def __init__(self, network, mean, std):
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, images):
        # Subtraction converts to float; a cast would tie the exported program to the CPU.
        return self.network(((images - self.mean) / self.std).permute(0, 3, 1, 2))


def cut(layer, original, outputs, inputs=None):
    """Gives a layer made on "meta" the original's values for these outputs and inputs."""
    def part(tensor):
        if tensor.ndim == 0:  # a batch norm's number of batches
            return tensor.clone()
        return tensor[outputs] if tensor.ndim == 1 else tensor[outputs][:, inputs]
    layer.load_state_dict({k: part(v) for k, v in original.state_dict().items()}, assign=True)
    return layer


def cut_conv(conv, filters, live_in):
    layer = nn.Conv2d(len(live_in), len(filters), conv.kernel_size, conv.stride, conv.padding,
                      bias=conv.bias is not None, device="meta")
    return cut(layer, conv, filters, live_in)


def cut_bn(bn, maps):
    return cut(nn.BatchNorm2d(len(maps), bn.eps, bn.momentum, device="meta"), bn, maps)


def zero_maps(n):
    """Returns a layer that puts n zero maps after the given ones."""
    return nn.ZeroPad3d((0, 0, 0, 0, 0, n))


def compact_block(block, live_in):
    """Returns a block's layers up to its batch norm, and the original numbers of its maps.

    Under --prune-bn keep, a pruned filter leaves its bias to its batch norm: such maps are last,
    zero maps, and the running mean takes the bias.
    """
    filters = block.mask.nonzero().flatten()
    kept = (block.bn_mask & ~block.mask).nonzero().flatten()
    maps = torch.cat([filters, kept])
    conv, bn = cut_conv(block.conv, filters, live_in), cut_bn(block.bn, maps)
    if not len(kept):
        return [conv, bn], maps
    if conv.bias is not None:
        bn.running_mean[len(filters):] -= block.conv.bias[kept]
    return [conv, zero_maps(len(kept)), bn], maps


def compact_shortcut(shortcut, stride, live_in, maps):
    """Returns a shortcut's layers and Residual's index for a body with these maps.

    A projection computes only the maps that the body has.
    """
    layers = [nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()]  # every second pixel
    if isinstance(shortcut, nn.Sequential):
        conv, bn = shortcut
        return nn.Sequential(*layers, cut_conv(conv, maps, live_in), cut_bn(bn, maps)), None
    before = shortcut.before if isinstance(shortcut, PaddedShortcut) else 0
    position = {channel + before: i for i, channel in enumerate(live_in.tolist())}
    index = [position.get(channel, len(live_in)) for channel in maps.tolist()]
    if index == list(range(len(live_in))):
        return nn.Sequential(*layers), None
    if len(live_in) in index:
        layers.append(zero_maps(1))  # the shortcut of the other maps
    return nn.Sequential(*layers), torch.tensor(index, device=maps.device)


@torch.no_grad()
def compact(model):
    """Makes a network of torch.nn layers that holds the live filters only.

    In eval and in training mode it computes what the model computes; it shares no memory with it.
    The parameters of what is pruned, and of a projection's maps that are not read, are gone.

    Args:
        model: A VGG or ResNet of gst_ext.networks, whose masks are taken as they are now.

    Returns:
        A nn.Module from normalised images (n, 3, h, w) to logits (n, classes), on the same device
        and in the same mode.
    """
    live, layers = torch.arange(3, device=model.linear.weight.device), []
    blocks = [model.stem] if isinstance(model, ResNet) else model.prunable
    for block in blocks:
        new, live = compact_block(block, live)
        layers += [*new, nn.ReLU(inplace=True), *[nn.MaxPool2d(2)] * block.pool]
    if isinstance(model, ResNet):
        for blocks, shortcut, stride in zip(model.pairs, model.shortcuts, model.strides):
            body, maps = [], live
            for block in blocks:
                new, maps = compact_block(block, maps)
                body += [*new, nn.ReLU(inplace=True)]
            layers.append(Residual(nn.Sequential(*body[:-1]),  # the sum has its own ReLU
                                   *compact_shortcut(shortcut, stride, live, maps)))
            live = maps
    linear = nn.Linear(len(live), len(model.linear.bias), device="meta")
    every_class = torch.arange(len(model.linear.bias), device=live.device)
    network = nn.Sequential(OrderedDict(
        features=nn.Sequential(*layers), average=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
        linear=cut(linear, model.linear, every_class, live)))
    return network.train(model.training).to(memory_format=torch.channels_last)


def save(model, folder, size, classes, mean, std, takes="uint8"):
    """Writes compact(model) in eval mode: network.pt2 and, with onnx and onnxscript, network.onnx.

    Both take any number of images. A JSON text of "takes", "size", "classes", "mean" and "std" is
    the extra file network.json in network.pt2, and "network" in network.onnx's metadata.

    Args:
        folder: Where the files are written.
        size: (height, width) of the images.
        classes: The names of the classes.
        mean, std: (3,), of the channels, in pixels from 0 to 255.
        takes: "uint8", images (n, h, w, 3) as they are, or "float", normalised ones (n, 3, h, w).

    Returns:
        The paths of the files.
    """
    # torch.export.save warns of channels-last weights, and torch.onnx indexes what they lead to; so
    # it does of images traced in channels-last memory (those given later may lie in any).
    network = compact(model).to(memory_format=torch.contiguous_format)
    images = torch.zeros(2, 3, *size, device=mean.device)
    if takes == "uint8":
        network = Normalised(network, mean, std)
        images = images.byte().permute(0, 2, 3, 1)
    about = json.dumps({"takes": takes, "size": list(size), "classes": list(classes),
                        "mean": mean.tolist(), "std": std.tolist()})
    program = torch.export.export(network.eval().requires_grad_(False), (images,),
                                  dynamic_shapes=({0: torch.export.Dim("n")},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source and their paths on this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"network.json": about})
    contents = {"network.pt2": buffer.getvalue()}
    if all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        onnx = torch.onnx.export(program, input_names=["images"], output_names=["logits"],
                                 dynamic_shapes=({0: "n"},), verbose=False)
        for node in onnx.model.graph:
            node.metadata_props.clear()
        onnx.model.metadata_props["network"] = about
        contents["network.onnx"] = onnx.model_proto.SerializeToString()
    else:
        pathlib.Path(folder, "network.onnx").unlink(missing_ok=True)  # of an earlier export
    for name, content in contents.items():
        write_atomically(pathlib.Path(folder, name), content)
    return [pathlib.Path(folder, name) for name in contents]
