#!/usr/bin/env python3
"""Lanczos (ARPACK's) against the power method, and per-sample gradients against a loop, on a network of CIFAR-10.

    python bench/flatness.py                            # 100 pairs of vgg11, width 0.25, 512 images: hours on 2 cores
    python bench/flatness.py --eigs 30 --images 128     # a quarter of an hour

Trains the network first (3 epochs, into logs/) where it is missing. Three searches for the same eigenpairs: Lanczos, to
residuals of 1e-3 |λ_1|; the power method by the paper's rule (100 steps, 1e-4); and the power method until each pair's
residual is that of Lanczos, stopped at --cap times Lanczos's products. Products are those of the search itself; every
residual is then recomputed. Writes bench/results/<machine>-flatness.json anew after each of them.
"""
import argparse
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
import step  # noqa: E402  (bench/step.py, for the machine's description)
from gst_ext import files, runs  # noqa: E402
import train  # noqa: E402
from gst_ext import flatness  # noqa: E402

TOLERANCE = 1e-3


class OutOfProducts(Exception):
    pass


def search(method, model, x, y, k, cap=None):
    """One search for k pairs: products, seconds, residuals / |λ_1|, and how many of them are within 1e-3."""
    product, generator = flatness.hessian_product(model, x, y), torch.Generator().manual_seed(0)
    n = sum(p.numel() for p in model.parameters())

    def counted(v):
        if cap and product.products >= cap:
            raise OutOfProducts
        return product(v)

    def draw():
        return torch.randn(n, generator=generator)
    clock = time.monotonic()
    try:
        if method == "lanczos":
            values, vectors = flatness.lanczos(counted, n, k, TOLERANCE, draw)
        else:
            values, vectors = flatness.power_method(counted, n, k, draw, TOLERANCE if method == "residual" else None)
    except OutOfProducts:
        return {"method": method, "products": product.products, "finished": False,
                "seconds": round(time.monotonic() - clock, 1)}
    seconds, products = time.monotonic() - clock, product.products
    residuals = [float((product(v) - value * v).norm()) / np.abs(values).max()
                 for value, v in zip(values.tolist(), vectors)]
    return {"method": method, "products": products, "finished": True, "seconds": round(seconds, 1),
            "within_1e-3": sum(bool(r <= TOLERANCE) for r in residuals),
            "largest_residual": float(max(residuals)), "residuals": [float(r) for r in residuals],
            "eigenvalues": values.tolist()}


def per_sample(model, x, y, rounds=3):
    """Milliseconds an image for Tr(C): a loop of batch-1 backward passes against flatness, in turn, and their ratio."""
    params = list(model.parameters())

    def loop():
        return sum(float(sum(g.square().sum() for g in torch.autograd.grad(
            F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]), params))) for i in range(len(x))) / len(x)

    def timed(function):
        clock = time.perf_counter()
        value = function()
        return value, 1e3 * (time.perf_counter() - clock) / len(x)

    ours = [None] * rounds
    theirs = [None] * rounds
    flatness.gradient_covariance_trace(model, x, y)
    for i in range(rounds):
        (a, theirs[i]), (b, ours[i]) = timed(loop), timed(lambda: flatness.gradient_covariance_trace(model, x, y))
    return {"loop_ms": theirs, "ms": ours, "images": len(x), "relative_difference": abs(b / a - 1),
            "ratio": statistics.median(t / o for t, o in zip(theirs, ours))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--eigs", type=int, default=100, help="(default: 100)")
    add("--images", type=int, default=512, help="(default: 512)")
    add("--width", type=float, default=0.25, help="(default: 0.25)")
    add("--epochs", type=int, default=3, help="of the training (default: 3)")
    add("--cap", type=float, default=20, help="stop the power method at so many times Lanczos's products")
    add("--data-dir", default="data", help="(default: data)")
    add("--machine", help="what the results are called (default: made of the processor's name and the threads)")
    cli = parser.parse_args()
    options = train.parse_options([
        "--model", "vgg11", "--width", str(cli.width), "--epochs", str(cli.epochs), "--lrs", "--device", "cpu",
        "--data-dir", cli.data_dir, "--log-dir", str(ROOT / "logs" / "bench")])
    runs.keep_freed_memory()
    runs.train_one(options, train)
    model, data, source = analyze.load_network(train.run_directory(options), cli.data_dir, torch.device("cpu"))

    def images(n):
        return train.normalise(data["test"][0][:n], data), data["test"][1][:n]

    x, y = images(cli.images)
    machine = step.describe_machine(torch.device("cpu"))
    path = step.results_path(machine, "flatness", cli.machine)
    results = {"machine": machine, "settings": vars(cli), "epoch": source["epoch"],
               "parameters": sum(p.numel() for p in model.parameters()),
               "per_sample": per_sample(model, *images(512)), "searches": []}
    print("per-sample gradients: {ratio:.1f} times faster than the loop (goal: 5)".format(**results["per_sample"]))
    for method in ("lanczos", "paper", "residual"):
        cap = int(cli.cap * results["searches"][0]["products"]) if method == "residual" else None
        row = search(method, model, x, y, cli.eigs, cap)
        row["products_over_lanczos"] = row["products"] / (results["searches"] or [row])[0]["products"]
        results["searches"].append(row)
        files.write_json(path, results)
        print(f"{method:9} {row['products']:6} products ({row['products_over_lanczos']:.1f} times Lanczos's), "
              f"{row['seconds']:.0f} s, " + ("{within_1e-3} of {0} pairs within 1e-3, largest residual "
              "{largest_residual:.2g}".format(cli.eigs, **row) if row["finished"] else "stopped there"), flush=True)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except files.UserError as error:
        sys.exit(f"flatness.py: {error}")
