#!/usr/bin/env python3
"""What the flatness measures cost: Lanczos against the paper's power method, per-sample gradients against a loop.

    python bench/flatness.py --checkpoint logs/cifar10/vgg11/S-r4-w0.125-x0.025/seed1 --images 128 --k 30
    python bench/flatness.py --machine amd-epyc-2-threads

A run of VGG11 on CIFAR-10 is trained if --checkpoint names none. Both methods find the k leading eigenpairs of the same
Hessian. The power method runs twice: as in the paper (at most 100 steps a pair, until the value changes by less than
1e-4 of itself), and on until each pair's residual is 1e-3 of the largest eigenvalue, which is what Lanczos gives, in at
most 1,000 steps. Residuals are true ones, with respect to H itself. Writes bench/results/<machine>-flatness.json.
"""
import argparse
import pathlib
import platform
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import analyze  # noqa: E402
import train  # noqa: E402

RESIDUAL = 1e-3  # of the largest eigenvalue
PRODUCTS_TARGET, SPEED_TARGET = 0.1, 5


def checkpoint_of(cli):
    """The run to measure; trained here where it is not named."""
    if cli.checkpoint:
        return pathlib.Path(cli.checkpoint)
    options = ["--model", "vgg11", "--width", "0.125", "--scale-epochs", "0.025", "--log-dir", str(ROOT / "logs"),
               "--data-dir", cli.data_dir]
    train.require(train.main(options) == 0, "the run to measure could not be trained")
    return train.run_directory(train.parse_options(options))


def describe(name, values, vectors, apply, products, seconds):
    """A method's row: products and time, and the true residuals of its pairs relative to the largest eigenvalue."""
    residuals = np.array([float((apply(v) - float(value) * v).norm()) for value, v in zip(values, vectors)])
    relative = residuals / np.abs(values).max()
    row = {"method": name, "products": products, "seconds": round(seconds, 1), "eigenvalues": values.tolist(),
           "largest_residual": float(relative.max()), "median_residual": float(np.median(relative)),
           "pairs_within": int((relative <= RESIDUAL).sum()), "pairs": len(values)}
    print(f"{name}: {products} products, {seconds:.0f} s; residuals / |λ1| at most {row['largest_residual']:.2g}, "
          f"{row['pairs_within']} of {row['pairs']} within {RESIDUAL:g}", flush=True)
    return row


def compare_eigs(model, x, y, k):
    n = sum(p.numel() for p in model.parameters())
    rows = []
    for name, method in (
            ("Lanczos", lambda product, draw: analyze.lanczos(product, n, k, RESIDUAL, draw)),
            ("power, the paper's rule", lambda product, draw: analyze.power_method(product, n, k, draw)),
            ("power, equal residual", lambda product, draw: analyze.power_method(product, n, k, draw, RESIDUAL))):
        product, generator = analyze.hessian_product(model, x, y), torch.Generator().manual_seed(0)
        clock = time.monotonic()
        values, vectors = method(product, lambda: torch.randn(n, generator=generator))
        rows.append(describe(name, values, vectors, product, product.products, time.monotonic() - clock))
    return rows


def compare_gradients(data, images=512, rounds=3):
    """Median seconds for Tr(C) of `images` images at width 0.25, and of one backward pass for each image."""
    torch.manual_seed(0)
    model = train.build_model("vgg11", 10, 0.25).eval()
    x, y = train.normalise(data["test"][0][:images], data), data["test"][1][:images]
    params = list(model.parameters())

    def loop():
        total = 0.0
        for image, label in zip(x.split(1), y.split(1)):
            grads = torch.autograd.grad(F.cross_entropy(model(image), label), params)
            total += sum(float(g.square().sum()) for g in grads)
        return total / len(x)

    seconds, answers = {"ours": [], "loop": []}, {}
    for _ in range(rounds):  # interleaved
        for name, function in (("ours", lambda: analyze.gradient_covariance_trace(model, x, y)), ("loop", loop)):
            clock = time.monotonic()
            answers[name] = function()
            seconds[name].append(time.monotonic() - clock)
    assert abs(answers["ours"] / answers["loop"] - 1) < 1e-3, answers
    ratios = [a / b for a, b in zip(seconds["loop"], seconds["ours"])]
    return {"images": images, "width": 0.25, "rounds": rounds, "speedup": statistics.median(ratios),
            "speedups": ratios, **{f"{k}_seconds": statistics.median(v) for k, v in seconds.items()}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", metavar="RUN_DIR", help="(default: VGG11 at width 0.125, 8 epochs of CIFAR-10)")
    add("--k", type=int, default=30, help="leading eigenpairs (default: 30)")
    add("--images", type=int, default=128, help="of the Hessian (default: 128)")
    add("--data-dir", default=str(ROOT / "data"))
    add("--machine", default=platform.node(), help="the name of the results' file")
    cli = parser.parse_args()
    run_dir = checkpoint_of(cli)
    model, data, source = analyze.load_network(run_dir, cli.data_dir, torch.device("cpu"))
    x, y = train.normalise(data["test"][0][:cli.images], data), data["test"][1][:cli.images]
    results = {"checkpoint": {"run": "/".join(run_dir.absolute().parts[-4:]), **source}, "images": cli.images,
               "k": cli.k, "parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads(),
               "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    results["per_sample_gradients"] = gradients = compare_gradients(data)
    print(f"per-sample gradients, width 0.25, {gradients['images']} images: {gradients['speedup']:.1f} times faster than "
          f"a loop (at least {SPEED_TARGET})", flush=True)
    results["eigs"] = rows = compare_eigs(model, x, y, cli.k)
    ratio = results["products_ratio"] = rows[0]["products"] / rows[2]["products"]
    print(f"products at equal residual: {ratio:.3f} of the power method's (at most {PRODUCTS_TARGET})")
    train.write_json(ROOT / "bench" / "results" / f"{cli.machine}-flatness.json", results)


if __name__ == "__main__":
    try:
        main()
    except train.UserError as error:
        sys.exit(f"flatness.py: {error}")
