#!/usr/bin/env python3
"""Times forward passes of masked networks and of the small ones that are exported from them.

    python bench/export.py                           # the table of docs/export.md, on the CPU
    python bench/export.py --width 0.05 --rounds 1   # does it run?

The weights are random. Random filters are pruned: as many as Figure 2 prunes, or 80% of every
layer. In a round each variant passes two batches of uint8 images, of which the second is timed, so
that all of them meet the same state of the machine; a time is the median of the rounds.
"""
import argparse
import copy
import pathlib
import statistics
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gst_ext import export, networks, ops  # noqa: E402
import train  # noqa: E402


def build(name, fractions, width):
    """Returns a network in eval mode whose last layers have lost these fractions of filters."""
    torch.manual_seed(0)
    model = networks.build_model(name, 10, width).eval()
    for block, p in zip(model.prunable[-len(fractions):], fractions):
        n = len(block.mask)
        keep, = train.num_filters_to_keep(n, p, 1)
        train.prune_filters(block, torch.randperm(n)[keep:])
    return model


def variants(model, folder, data):
    """Returns ({variant: function of uint8 images}, {file: bytes})."""
    def masked(backend):
        network = networks.set_backend(copy.deepcopy(model), backend)
        return lambda images: network(train.normalise(images, data))

    small = export.Normalised(export.compact(model), data["mean"], data["std"])
    files = export.save(model, folder, (32, 32), map(str, range(10)), data["mean"], data["std"])
    forwards = {"masked, eager": masked("eager")}
    if ops.available:
        forwards["masked, ext"] = masked("ext")
    forwards |= {"compact(model)": small,
                 "network.pt2": torch.export.load(files[0]).module()}
    if len(files) > 1:
        import onnxruntime
        session = onnxruntime.InferenceSession(files[1])
        forwards["network.onnx"] = lambda images: session.run(None, {"images": images.numpy()})
    sizes = {"full": 4 * sum(p.numel() for p in model.parameters()),
             **{file.name: file.stat().st_size for file in files}}
    return forwards, sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    data = {"mean": torch.full((3,), 120.0), "std": torch.full((3,), 60.0)}
    for name in ("vgg11", "resnet18"):
        paper = train.ADAM_PRUNING[name.rstrip("0123456789")]["p"]
        for pruned, fractions in (("Figure 2", paper),
                                  ("80%", [0.8] * networks.PRUNABLE_BLOCKS[name])):
            model = build(name, fractions, options.width)
            params, macs = networks.count_params_and_macs(model, (32, 32))
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                forwards, sizes = variants(model, folder, data)
                print(f"{name}, {pruned}: {params:,} parameters, {macs:,} multiply-adds; MB: "
                      + ", ".join(f"{k} {v / 1e6:.2f}" for k, v in sizes.items()))
                for n in (1, 128):
                    images = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8)
                    seconds = {variant: [] for variant in forwards}
                    for _ in range(options.rounds):
                        for variant, forward in forwards.items():
                            forward(images)
                            start = time.perf_counter()
                            forward(images)
                            seconds[variant].append(time.perf_counter() - start)
                    print(f"  batch {n:3}, ms: " + ", ".join(
                        f"{variant} {1000 * statistics.median(times):.2f}"
                        for variant, times in seconds.items()), flush=True)


if __name__ == "__main__":
    main()
