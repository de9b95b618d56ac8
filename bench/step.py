#!/usr/bin/env python3
"""What a training step costs: the extension against plain PyTorch, at three points of Figure 2's schedule (S, r 40).

    bash runs.sh bench                      # vgg11 and resnet18, full width, batch 128: about half an hour on 2 cores
    python bench/step.py --models vgg11 --rounds 3 --variants "eager masked" ext
    python bench/step.py --width 0.1 --batch-size 16 --rounds 2 --steps 1 --out step.json      # does it run
    python bench/step.py --device cuda --machine h100

A step is forward, cross entropy, backward, fused Adam and zero_grad on random 32x32 images in float32; evaluation is
train.evaluate on random images, scaled to 10,000. Every variant is a process of its own, started as a user starts one;
in each round each process is asked in turn, in rotating order, while the others are idle, so that noise hits all alike.
Ratios are taken within a round. Filters go by the l2 norm of the initial weights, the same ones in every variant, but
"eager dense" is never pruned. Writes bench/results/<machine>-step.json anew after each point of each network.
"""
import argparse
import contextlib
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gst_ext import files, ops, runs  # noqa: E402
import train  # noqa: E402

POINTS = ("unpruned", "half-way", "end")
DENSE, MASKED, ALLOCATOR = "eager dense", "eager masked", "eager masked + allocator"
VARIANTS = (DENSE, MASKED, "prune", "compile", ALLOCATOR, "ext")
KEEPS_FREED_MEMORY = ("ext", ALLOCATOR, "bn_act")
BN_WORKERS = ("bn_act", "bn_act, plain")  # PyTorch's operators are timed in both, ours where memory is kept
STEP_TARGETS = {("vgg11", "unpruned"): 0.72, ("vgg11", "end"): 0.55, ("resnet18", "unpruned"): 0.62,
                ("resnet18", "end"): 0.50}  # of eager masked's time, at most
EVALUATION_TARGETS = {("vgg11", "unpruned"): 0.60, ("resnet18", "unpruned"): 0.80}
BN_TARGET, BN_CALLS = 0.4, 10  # calls of one operator in one round

# +--------------------------------------------------------------------------------------------------------------------+
# | Networks: Figure 2's, pruned up to a point, and what they compute                                                  |
# +--------------------------------------------------------------------------------------------------------------------+


def options_of(job):
    """train.py's options of Figure 2's Prune_S, r 40, for a job: dict of model, width, batch_size, device."""
    given = [f"--{name.replace('_', '-')}={job[name]}" for name in ("model", "width", "batch_size", "device")]
    return train.parse_options([*given, "--target=S", "--r=40"])


def build(options, point, device, backend="eager"):
    """The network at "unpruned", "half-way" (half of all pruning events are over) or "end"."""
    files.require(ops.available or backend == "eager", f"the extension is not built: {ops.why_not}")
    torch.manual_seed(options.seed)
    model = train.build_model(options.model, 10, options.width).to(device)
    model.multiple = train.MULTIPLE[device.type]
    plan = train.pruning_plan(model, options, train.schedule(options))
    events = sorted((epoch, layer, kept) for layer, survivors in plan for epoch, kept in survivors.items())
    for _, layer, kept in events[:len(events) * POINTS.index(point) // 2]:
        block = model.prunable[layer]
        k = int(block.mask.sum()) - kept
        train.prune_block(block, train.select_filters(train.filter_scores(block, "l2"), block.mask, k, "S"))
    return train.use_backend(model, backend)  # connects the blocks too


def plain_forward(self, x, shortcut=None):
    """Block.forward without masks: what the network costs whoever does not prune it."""
    a = self.bn(self.conv(x))
    a = F.relu(a if shortcut is None else a + shortcut, inplace=True)
    return F.max_pool2d(a, 2) if self.pool else a


def network_of(variant, options, point, device):
    if variant not in (DENSE, "prune"):
        model = build(options, point, device, "ext" if variant == "ext" else "eager")
        torch._inductor.config.compile_threads = 1  # no helper processes, which would run on beside the others
        return torch.compile(model) if variant == "compile" else model
    train.Block.forward = plain_forward
    model = build(options, point if variant == "prune" else "unpruned", device)
    for block in model.prunable if variant == "prune" else ():
        mask = block.mask.view(-1, 1, 1, 1).expand_as(block.conv.weight)
        nn.utils.prune.custom_from_mask(block.conv, "weight", mask.clone(memory_format=torch.channels_last))
    return model


def convolutions(model):
    """(conv, live inputs, live filters, output's size, its block's shortcut or not; None: no block) for 32x32 images.

    A pruned filter's shortcut goes too, so what is live in a block's output is what is live in its mask.
    """
    def live(block):
        return int(block.mask.sum())

    size, c_in = 32, 3
    for layer in getattr(model, "features", [model.stem] if hasattr(model, "stem") else []):
        if isinstance(layer, train.Block):
            yield layer.conv, c_in, live(layer), size, False
            c_in = live(layer)
            size //= 1 + layer.pool
    for (first, second), shortcut in zip(getattr(model, "pairs", ()), getattr(model, "shortcuts", ())):
        size //= first.conv.stride[0]
        yield first.conv, c_in, live(first), size, False
        yield second.conv, live(first), live(second), size, True
        if isinstance(shortcut, nn.Sequential):
            yield shortcut[0], c_in, live(second), size, None
        c_in = live(second)


def forward_flops(model, n):
    """Of a forward pass with n images, by layer: the convolutions and the linear one; live filters and inputs only."""
    flops = [2 * n * c_in * c_out * conv.kernel_size[0] ** 2 * size ** 2
             for conv, c_in, c_out, size, _ in convolutions(model)]
    return flops + [2 * n * int(model.prunable[-1].mask.sum()) * model.linear.out_features]


def useful_flops(model, n):
    """Of a step with n images, which need no gradient themselves."""
    forward = forward_flops(model, n)
    return 3 * sum(forward) - forward[0]


# +--------------------------------------------------------------------------------------------------------------------+
# | Measuring                                                                                                          |
# +--------------------------------------------------------------------------------------------------------------------+

def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(function, device, n=1):
    """The seconds that each of n calls of function takes, after a call that is not timed."""
    seconds = []
    for _ in range(n + 1):
        sync(device)
        clock = time.perf_counter()
        function()
        sync(device)
        seconds.append(time.perf_counter() - clock)
    return seconds[1:]


def memory_mib(device, peak=False):
    """What this process holds now, or held at most since reset_peak: GPU allocations, or resident memory."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status, re.M)[1]) / 1024


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):  # where that is forbidden, the peak stays that of the process so far
            pathlib.Path("/proc/self/clear_refs").write_text("5")


def matrix_peak(device, dtype=torch.float32):
    """GFLOP/s of a large product or a large 3x3 convolution, whichever is faster, in sizes that fill the device."""
    n, images = (8192, 2048) if device.type == "cuda" else (2048, 128)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    x, weight = (torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
                 for shape in ((images, 256, 8, 8), (256, 256, 3, 3)))
    with torch.no_grad():
        product = 2 * n ** 3 / min(timed(lambda: a @ b, device, 3))
        convolution = 2 * images * 64 * 9 * 256 ** 2 / min(timed(lambda: F.conv2d(x, weight, padding=1), device, 3))
    return max(product, convolution) / 1e9


# +--------------------------------------------------------------------------------------------------------------------+
# | A worker: one variant in one process; a JSON line in, a JSON line out                                              |
# +--------------------------------------------------------------------------------------------------------------------+

def network_worker(job, device):
    """A function that answers n with the median of n steps (ms), an evaluation (s), and the steps' peak memory."""
    options = options_of(job)
    images = torch.randn(job["batch_size"], 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (job["batch_size"],), device=device)
    n_test = options.test_batch_size * job["batches"]
    data = {"test": (torch.randint(0, 256, (n_test, 32, 32, 3), dtype=torch.uint8, device=device),
                     torch.randint(0, 10, (n_test,), device=device)),
            "mean": torch.full((3,), 127.5, device=device), "std": torch.full((3,), 73.6, device=device)}
    before = memory_mib(device)
    model = network_of(job["variant"], options, job["point"], device)
    optimizer = train.make_optimizer(model, options)

    def step():
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def answer(n):
        model.train()
        step()
        if n == 0:
            return {"ms": profile(step), "tensor_mib": tensor_peak_mib(step, model, optimizer)}
        reset_peak(device)
        seconds = timed(step, device, n)
        peak = memory_mib(device, peak=True) - before
        evaluation = timed(lambda: train.evaluate(model, data, "test", options), device)[0]
        return {"steps": 1000 * statistics.median(seconds), "evaluation": evaluation / n_test * 10_000, "peak": peak}
    return answer


def tensor_peak_mib(step, model, optimizer):
    """The most that tensors held on the CPU at one time in a step: resident memory also counts what the allocator and
    the libraries keep, and falls with neither. None on a GPU, where memory_mib counts tensors."""
    state = [t for values in optimizer.state.values() for t in values.values()]
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *state])
    if next(model.parameters()).is_cuda:
        return None
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return round((held + max(itertools.accumulate(changes))) / 2**20, 1)


def profile(step):
    """Where the time of a step goes, in ms of the CPU's or the GPU's own time: the 12 operators that take most."""
    with torch.profiler.profile() as profiler:
        step()
    own = {e.key: (e.self_device_time_total or e.self_cpu_time_total) / 1000 for e in profiler.key_averages()}
    return {name: round(own[name], 2) for name in sorted(own, key=own.get, reverse=True)[:12]}


def bn_worker(job, device):
    """A function that answers (channels, size, shortcut) with the ms of bn_act and of PyTorch's chain in one round."""
    functions = ["ext", "eager"] if job["variant"] in KEEPS_FREED_MEMORY else ["eager"]

    def new(*shape):
        tensor = torch.randn(shape, device=device)
        return tensor.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else tensor

    def answer(shape):
        channels, size, shortcut = shape
        x, grad, residual = (new(job["batch_size"], channels, size, size) for _ in range(3))
        gamma, beta, mean, var = new(channels), new(channels), new(channels), torch.ones(channels, device=device)
        inputs = [tensor.requires_grad_() for tensor in [x, gamma, beta] + [residual] * shortcut]

        def chain():
            a = F.batch_norm(x, mean, var, gamma, beta, True, train.BN_MOMENTUM, train.BN_EPS)
            return F.relu(a + residual if shortcut else a, inplace=True)

        def bn_act():
            return ops.bn_act(x, gamma, beta, mean, var, residual=residual if shortcut else None)

        functions.reverse()  # so that each comes first in every second round
        run = {"ext": bn_act, "eager": chain}
        return {name: 1000 * statistics.median(timed(lambda: torch.autograd.grad(run[name](), inputs, grad), device,
                                                     BN_CALLS)) for name in functions}
    return answer


def work(job, new_worker):
    """Answers each line of standard input with a JSON line; new_worker(job) gives what answers, with the first."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    if job["variant"] in KEEPS_FREED_MEMORY:
        runs.keep_freed_memory()
    answer = None
    for line in sys.stdin:
        try:
            answer = answer or new_worker(job)
            found = answer(json.loads(line))
        except Exception as error:  # a variant that does not run here is a result too
            found = {"failed": f"{type(error).__name__}: {files.reason(error)}"}
        print(json.dumps(found), file=out, flush=True)


def new_worker(job):
    device = runs.choose_device(options_of(job))
    return (bn_worker if job["variant"] in BN_WORKERS else network_worker)(job, device)


def start_worker(job, script=__file__):
    return subprocess.Popen([sys.executable, script, "--worker", json.dumps(job)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE)


def ask(worker, question):
    """The worker's answer, or {"failed": reason}."""
    try:
        print(json.dumps(question), file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())
    except (BrokenPipeError, ValueError):
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
        return {"failed": f"the process ended with code {worker.wait()}"}


# +--------------------------------------------------------------------------------------------------------------------+
# | The benchmark                                                                                                      |
# +--------------------------------------------------------------------------------------------------------------------+

def spread(values, digits=4):
    return dict(zip(("q1", "median", "q3"), np.quantile(values, (0.25, 0.5, 0.75)).round(digits).tolist()))


def row_of(rows, model, point, variant):
    return next((row for row in rows if (model, point, variant) == (row["model"], row["point"], row["variant"])), {})


def ratio(rows, model, point, variant, to):
    """variant's time over that of `to`, round by round; None where one of them is missing."""
    a, b = (row_of(rows, model, point, name).get("rounds") for name in (variant, to))
    return spread(np.divide(a, b)) if a and b else None


def measure_point(model, point, cli, job, device, results):
    """Adds all rounds of one network at one point to results."""
    job = job | {"model": model, "point": point}
    flops = useful_flops(build(options_of(job), point, torch.device("cpu")), cli.batch_size)
    answers, failed, peaks = {variant: [] for variant in cli.variants}, {}, []
    with contextlib.ExitStack() as stack:  # which ends the processes by closing their stdin
        workers = {v: stack.enter_context(start_worker(job | {"variant": v})) for v in cli.variants}
        for i in range(-1, cli.rounds):  # the first only warms up: torch.compile compiles there, before the others run
            peaks += [matrix_peak(device)] if i >= 0 else []
            order = np.roll(cli.variants, -i).tolist() if i >= 0 else sorted(cli.variants, key=lambda v: v != "compile")
            for variant in order:
                if variant not in failed:
                    answer = ask(workers[variant], cli.steps if i >= 0 else 1)
                    failed |= {variant: answer["failed"]} if "failed" in answer else {}
                    answers[variant] += [answer] * (i >= 0)
        for variant in {MASKED, "ext"} & set(cli.variants) - set(failed):
            results["profile"].append({"model": model, "point": point, "variant": variant} | ask(workers[variant], 0))
    results["matrix_peak"].append({"model": model, "point": point, "gflops": spread(peaks, 1)})
    for kind, unit in (("steps", "ms"), ("evaluation", "seconds")):
        rows = results[kind]
        rows += [{"model": model, "point": point, "variant": variant} | (
            {"failed": failed[variant]} if variant in failed else {"rounds": [round(x[kind], 4) for x in given]})
            for variant, given in answers.items()]
        for row in rows[-len(answers):]:
            variant = row["variant"]
            if variant not in failed:
                row |= {unit: spread(row["rounds"]), "ratio": ratio(rows, model, point, variant, MASKED)}
            if variant == "ext":
                row["ratio_to_allocator"] = ratio(rows, model, point, variant, ALLOCATOR)
            if kind == "steps" and variant not in failed:
                row["share_of_peak"] = round(float(np.median(flops / 1e6 / np.multiply(row["rounds"], peaks))), 4)
                row["peak_mib"] = round(max(answer["peak"] for answer in answers[variant]), 1)


def measure_bn(cli, job, results):
    """Adds bn_act against PyTorch's operators, forward and backward, for every block's shape in the networks.

    "eager" is a process as a user of PyTorch starts it, "eager + allocator" one that keeps freed memory, as train.py
    and so bn_act do: the harder comparison.
    """
    shapes = set()
    for name in cli.models:
        layers = convolutions(build(options_of(job | {"model": name}), "unpruned", torch.device("cpu")))
        shapes |= {(conv.out_channels, size, with_) for conv, *_, size, with_ in layers if with_ is not None}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(start_worker(job | {"model": cli.models[0], "variant": v})) for v in BN_WORKERS]
        for shape in sorted(shapes, key=lambda shape: (-shape[1], *shape)):
            row, rounds = dict(zip(("channels", "size", "shortcut"), shape)), []
            for _ in range(cli.rounds):
                kept, plain = (ask(worker, shape) for worker in workers)
                if failed := kept.get("failed") or plain.get("failed"):
                    row["failed"] = failed
                    break
                rounds.append((kept["ext"], plain["eager"], kept["eager"]))
            else:
                ext, eager, allocator = zip(*rounds)
                row |= {"ext_ms": spread(ext), "eager_ms": spread(eager), "eager_allocator_ms": spread(allocator),
                        "ratio": spread(np.divide(ext, eager)),
                        "ratio_to_allocator": spread(np.divide(ext, allocator))}
            results["bn_act"].append(row)


def targets(results):
    """What the extension is held to, as far as it was measured: what, the highest value allowed, the value, if met."""
    found = []

    def add(what, target, measured):
        if target is not None and measured is not None:
            found.append({"what": what, "target": target, "measured": measured, "met": measured <= target})

    for peak in results["matrix_peak"]:
        at = peak["model"], peak["point"]
        for kind, limits in (("steps", STEP_TARGETS), ("evaluation", EVALUATION_TARGETS)):
            for other, limit in ((MASKED, limits.get(at)), (DENSE, 1.0)):
                add(f"{kind}, {' '.join(at)}: ext / {other}", limit,
                    (ratio(results[kind], *at, "ext", other) or {}).get("median"))
        add(f"peak MiB, {' '.join(at)}: ext, at most {MASKED}'s", *(
            row_of(results["steps"], *at, variant).get("peak_mib") for variant in (MASKED, "ext")))
        ext, eager = (row_of(results["profile"], *at, variant).get("tensor_mib") for variant in ("ext", MASKED))
        add(f"peak MiB of tensors, {' '.join(at)}: ext, at most {MASKED}'s", eager, ext)
        if at[1] == "end":
            unpruned = row_of(results["profile"], at[0], "unpruned", "ext").get("tensor_mib")
            add(f"peak MiB of tensors, {' '.join(at)}: ext, at most unpruned", unpruned, ext)
    for row in results["bn_act"]:
        for to, key in (("eager", "ratio"), ("eager + allocator", "ratio_to_allocator")):
            add(f"bn_act, {row['channels']} channels {row['size']}x{row['size']}{' + shortcut' * row['shortcut']}: "
                f"ext / {to}", BN_TARGET, row.get(key, {}).get("median"))
    return found


def print_point(results, model, point):
    def cell(values, digits):
        return "{median:.{d}f} ({q1:.{d}f}-{q3:.{d}f})".format(**values, d=digits) if values else "-"

    print(f"\n{model} {point}, matrix peak {results['matrix_peak'][-1]['gflops']['median']} GFLOP/s\n"
          f"{'':24} {'step, ms':>25} {'to eager masked':>20} {'of peak':>8} {'MiB':>5} {'evaluation, s':>14} "
          f"{'to eager masked':>20}")
    for step, test in zip(results["steps"], results["evaluation"]):
        if (step["model"], step["point"]) == (model, point):
            print(f"{step['variant']:24} " + (f"failed: {step['failed']}" if "failed" in step else
                  f"{cell(step['ms'], 1):>25} {cell(step['ratio'], 3):>20} {step['share_of_peak']:8.1%} "
                  f"{step['peak_mib']:5.0f} {test['seconds']['median']:14.2f} {cell(test['ratio'], 3):>20}"))
    sys.stdout.flush()


def describe_machine(device):
    cpu = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.M)
    git = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {"cpu": cpu[1].strip() if cpu else "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__,
            "git": git.stdout.strip() or None, "load_before": round(os.getloadavg()[0], 2),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}


def results_path(machine, what, name=None):
    """bench/results/<name>-<what>.json, the name made of the machine's (describe_machine) where none is given."""
    made = machine["gpu"] or f"{machine['cpu']} {machine['threads']} threads"
    return ROOT / "bench" / "results" / f"{name or re.sub('[^a-z0-9]+', '-', made.lower()).strip('-')}-{what}.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=train.PRUNABLE_BLOCKS, default=["vgg11", "resnet18"])
    add("--points", nargs="+", choices=POINTS, default=list(POINTS))
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--batch-size", type=int, default=128, help="of the training steps; evaluation takes 128 (default: 128)")
    add("--width", type=float, default=1.0, help="(default: 1)")
    add("--rounds", type=int, default=5, help="(default: 5)")
    add("--steps", type=int, default=2, help="timed steps of each variant in each round (default: 2)")
    add("--batches", type=int, default=2, help="batches of each timed evaluation (default: 2)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--machine", help="what the results are called (default: made of the processor's name and the threads)")
    add("--out", metavar="FILE", help="(default: bench/results/<machine>-step.json)")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    cli = parser.parse_args()
    if cli.worker:
        return work(cli.worker, new_worker)

    job = {name: getattr(cli, name) for name in ("width", "batch_size", "device", "batches")}
    device = runs.choose_device(options_of(job | {"model": cli.models[0]}))
    runs.keep_freed_memory()  # this process measures the matrix peak, which page faults would lower
    machine = describe_machine(device)
    path = pathlib.Path(cli.out or results_path(machine, "step", cli.machine))
    results = {"machine": machine, "settings": {k: v for k, v in vars(cli).items() if k not in ("worker", "out")},
               "steps": [], "evaluation": [], "matrix_peak": [], "bn_act": [], "profile": [], "targets": []}
    measure_bn(cli, job, results)
    for row in results["bn_act"]:
        shape = f"{row['channels']} channels {row['size']}x{row['size']}{' + shortcut' * row['shortcut']}"
        print(f"bn_act, {shape}: " + (row.get("failed") or "{:.3f} ms, eager {:.3f} ms, eager + allocator "
              "{:.3f} ms".format(*(row[k]["median"] for k in ("ext_ms", "eager_ms", "eager_allocator_ms")))),
              flush=True)
    for model in cli.models:
        for point in cli.points:
            measure_point(model, point, cli, job, device, results)
            print_point(results, model, point)
            results["targets"] = targets(results)
            files.write_json(path, results)
    print()
    for row in results["targets"]:
        print(f"{'met   ' if row['met'] else 'missed'} {row['measured']:9.3f} of {row['target']:9.3f}  {row['what']}")
    print(path)


def run():
    try:
        main()
    except files.UserError as error:
        sys.exit(f"step.py: {error}")


if __name__ == "__main__":
    run()
