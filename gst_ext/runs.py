"""Many runs: lists of them, what became of each, how they take turns in one process; and one, from options to files.

What an experiment is, is told by whoever calls: runs_of gives the runs of a line of options, and script is the module
train, whose functions read data, make a run, train it and describe it.
"""
import collections
import contextlib
import ctypes
import json
import os
import pathlib
import shlex
import signal
import sys

import torch
from tqdm import tqdm

from . import files, graphs, ops
from .files import UserError, reason, require, say, short

# Before CUDA starts: as many streams at once as runs, and what cuBLAS needs to be deterministic for whoever asks.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CHECKPOINT_EVERY = {"cpu": 0, "cuda": 30}  # seconds at least; on a GPU, writing may take longer than an epoch
AT_ONCE = 16  # runs in one process at most, unless --at-once says more
# Its options, the line that gives them, how many epochs; and what its directory's name does not tell: where its data
# lie, and what it leaves beside its logs.
Run = collections.namedtuple("Run", "args line epochs unnamed")

# +--------------------------------------------------------------------------------------------------------------------+
# | Lists of runs, and what became of each                                                                             |
# +--------------------------------------------------------------------------------------------------------------------+

def read_runs(path, runs_of):
    """The runs listed in a file, a line of options each, as once_each gives them."""
    try:
        commands = [shlex.split(line) for line in open(path) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as lines of options: {reason(error)}") from None
    return once_each(commands, runs_of)


def once_each(commands, runs_of):
    """The runs of option lists: {directory: Run}, each directory once. runs_of: an option list's (directory, Run)s."""
    found = {}
    for command in commands:
        for directory, run in runs_of(command):
            first = found.setdefault(directory, run)
            require(first.unnamed == run.unnamed, f"two of the runs would share {directory}, but differ in --dataset, "
                    "--data-dir, --save-epoch or --tensorboard: give one of them another --log-dir")
    return found


def log_of(directory):
    """The lines of the epochs that a run has logged."""
    log = directory / "epochs.jsonl"
    return log.read_bytes().split(b"\n")[:-1] if log.exists() else []


def state_of(directory):
    """"done", "running", "failed" or "waiting" (half-done runs too)."""
    if (directory / "done.json").exists():
        return "done"
    if files.in_use(directory):
        return "running"
    return "failed" if (directory / "failed.txt").exists() else "waiting"


def by_state(runs):
    """The directories of runs under each of the states."""
    found = {state: [] for state in ("done", "running", "failed", "waiting")}
    for directory in runs:
        found[state_of(directory)].append(directory)
    return found


def print_plan(runs, retry_failed, script):
    """--plan: what is left of the runs, in numbers on stderr, as lines on stdout.

    script: the module train. Raises UserError where what is finished is another run.
    """
    finished, running, failed, waiting = by_state(runs).values()
    shared = {}
    for directory in finished:
        check_finished(runs[directory].args, directory, shared, script)
    left = {*waiting, *failed} if retry_failed else {*waiting}
    todo = {directory: run for directory, run in runs.items() if directory in left}
    done = [len(log_of(directory)) for directory in todo]
    epochs = sum(run.epochs for run in todo.values()) - sum(done)
    say(f"{len(runs)} runs: {len(finished)} finished, {sum(map(bool, done))} half-done; to do now: "
        f"{len(todo)} runs, {epochs:,} epochs", sys.stderr)
    if running:
        say(f"{len(running)} runs are being trained by another process, such as {running[0]}", sys.stderr)
    if failed and not retry_failed:
        say(f"{len(failed)} runs that failed before are left alone, such as {failed[0]}: "
            f"{files.why_failed(failed[0])} (--retry-failed trains them again)", sys.stderr)
    for run in todo.values():
        loaded(run.args, shared, script)  # a download that fails should fail here, once
    for run in todo.values():
        say(run.line)


def print_status(lists, runs_of):
    """--status: a line for each list of runs, a file, named after it, and a line for each run that failed."""
    say(f"{'':12} {'runs':>6} {'done':>6} {'running':>8} {'failed':>7} {'waiting':>8}  time left")
    for file in lists:
        runs, pace = read_runs(file, runs_of), []
        done, running, failed, waiting = by_state(runs).values()
        for directory in runs:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # no epoch, or a damaged one
                pace.append(float(json.loads(log_of(directory)[-1])["seconds"]))
        left = [max(0, runs[d].epochs - len(log_of(d))) for d in running + waiting]
        at_once = max(1, len(running))
        hours = sum(left) * sum(pace) / max(1, len(pace)) / at_once / 3600
        time_left = f"{hours:.1f} h, {at_once} at once" if pace else "not known"
        say(f"{pathlib.Path(file).name:12} {len(runs):6} {len(done):6} {len(running):8} {len(failed):7} "
            f"{len(waiting):8}  {time_left if left else 'nothing to do'}")
        for directory in failed:
            say(f"  failed: {directory}: {files.why_failed(directory)}")


# +--------------------------------------------------------------------------------------------------------------------+
# | The device that a run works on                                                                                     |
# +--------------------------------------------------------------------------------------------------------------------+

def choose_device(args):
    """The torch device, with precision and determinism set; UserError where the machine lacks what was asked."""
    cuda = torch.cuda.is_available()
    require(cuda or args.device != "cuda", "--device cuda, but torch sees no CUDA device here: use --device cpu, or "
            "check the driver")
    device = torch.device("cuda" if cuda and args.device != "cpu" else "cpu")
    require(device.type == "cuda" or args.precision != "tf32", "--precision tf32 needs a CUDA device: use fp32 here")
    torch.set_float32_matmul_precision("high" if args.precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    return device


def choose_backend(args, device):
    """"ext" or "eager", as --backend says; one line where "auto" has to do without the extension."""
    there, why_not = ops.computes_on(device), ops.why_not or "it has no CUDA kernels: there was no CUDA toolkit"
    require(there or args.backend != "ext", f"--backend ext, but the extension is not built for this device ({why_not})"
            ": run bash runs.sh setup, or use --backend eager")
    if not there and args.backend == "auto":
        files.say_once(f"train.py: the extension is not built for this device ({why_not}); plain PyTorch takes its "
                       "place. bash runs.sh setup builds it")
    return "ext" if there and args.backend != "eager" else "eager"


# +--------------------------------------------------------------------------------------------------------------------+
# | Runs that take turns in one process                                                                                |
# +--------------------------------------------------------------------------------------------------------------------+

def keep_freed_memory():
    """Tells glibc to keep freed activations: it would give them back each step, and page faults cost a fifth of it."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: no shrinking of the heap


def terminate(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb what ends the run
    raise KeyboardInterrupt("terminated")


def fit_at_once(peak, free):
    """How many runs a GPU holds when the first takes `peak` bytes at most and `free` are left beside it."""
    return max(1, min(AT_ONCE, 1 + int(0.8 * free / max(1, peak))))


def train_all(runs, at_once, script):
    """--runs, --seeds: so many at once take turns; a run that fails is reported, and the others go on.

    at_once: None for one, and on a GPU, once the first run has shown what memory it takes, for as many as fit.
    script: the module train. A run works on a stream of its own, which the next run takes over.
    """
    require((at_once or 1) <= graphs.STREAMS, f"--at-once {at_once}: give {graphs.STREAMS} or fewer")
    waiting, going, streams, shared, failed, limit = list(runs), {}, {}, {}, 0, at_once or 1
    free, first_epoch = collections.defaultdict(list), True
    try:
        while waiting or going:
            while waiting and len(going) < limit:
                directory = waiting.pop(0)
                going[directory] = training(runs[directory].args, shared, script)
            for directory, run in list(going.items()):
                try:
                    if directory not in streams:
                        device = choose_device(runs[directory].args)
                        streams[directory] = device, free[device].pop() if free[device] else graphs.stream_of(device)
                    with streams[directory][1]:
                        next(run)
                except StopIteration:
                    del going[directory]
                except Exception as error:
                    del going[directory]
                    if going and isinstance(error, torch.OutOfMemoryError):
                        limit = at_once = len(going)
                        waiting.append(directory)
                        say(f"train.py: the GPU's memory holds {limit} runs at once: {directory} goes on when one of "
                            "them has ended", sys.stderr)
                        continue
                    files.tell(error, "train.py")
                    refused = isinstance(error, UserError) and error.code == 2
                    if refused or state_of(directory) not in ("running", "done"):  # by another process
                        say(f"failed: train.py {runs[directory].line}", sys.stderr)
                        failed += 1
                finally:
                    if directory not in going and directory in streams:
                        device, stream = streams.pop(directory)
                        free[device].append(stream)
                        torch.cuda.empty_cache()  # of its graphs: a capture that lacks memory cannot ask for it
            if at_once is None and torch.cuda.is_available() and torch.cuda.max_memory_reserved():
                if first_epoch:  # its peak is that of the data's coming and of the search for the fastest algorithms
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    first_epoch = False
                else:
                    peak = torch.cuda.max_memory_reserved() - shared.get("bytes", 0)
                    limit = at_once = fit_at_once(peak, torch.cuda.mem_get_info()[0])
    finally:
        for run in going.values():
            run.close()  # which writes the checkpoints that are not on disk yet
    require(not failed, f"{failed} of {len(runs)} runs failed; the same command continues them", 1)


# +--------------------------------------------------------------------------------------------------------------------+
# | What a run says while it goes on                                                                                   |
# +--------------------------------------------------------------------------------------------------------------------+

@contextlib.contextmanager
def tensorboard(wanted, directory, first_epoch):
    """Gives what writes an epoch's numbers for TensorBoard, under --tensorboard; else what does nothing."""
    if not wanted:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install tensorboard, or leave the option out") from None
    with files.writing(directory), SummaryWriter(directory / "tensorboard", purge_step=first_epoch) as writer:
        def write(record):
            for name in ("lr", "train_loss", "train_acc", "test_acc_before", "test_acc", "val_acc", "stability"):
                if record[name] is not None:
                    writer.add_scalar(name, record[name], record["epoch"])
            writer.add_scalar("live_filters", sum(record["live"]), record["epoch"])
        yield write


def progress_bar(label, epochs, first_epoch):
    on_a_terminal = sys.stderr.isatty() and sys.stdout.isatty()
    return tqdm(total=epochs, initial=first_epoch, desc=label, disable=not on_a_terminal,
                bar_format="{desc} |{bar:20}| epoch {n_fmt}/{total_fmt}{postfix} {remaining} left")


def report(label, records, stability, bar):
    """The epoch just done, for whoever watches: the bar on a terminal, a plain line in a file.

    stability: the mean one so far, in %.
    """
    record = records[-1]
    bar.update()
    if not bar.disable:
        bar.set_postfix_str(f"test {record['test_acc']:.2f}% stability {stability:.2f}%")
        return
    event = f" -> {record['test_acc']:.2f}% ({sum(record['removed'])} filters)" if any(record["removed"]) else ""
    left = sum(r["seconds"] for r in records[-5:]) / len(records[-5:]) * (bar.total - len(records)) / 60
    say(f"{label} epoch {len(records)}/{bar.total} lr {record['lr']:g} loss {record['train_loss']:.4f} train "
        f"{record['train_acc']:.2f}% test {record['test_acc_before']:.2f}%{event} stability {stability:.2f}% "
        f"{record['seconds']:.1f} s, {left:.0f} min left")


# +--------------------------------------------------------------------------------------------------------------------+
# | One run's directory: is it the same run, where it stands, what an epoch adds                                       |
# +--------------------------------------------------------------------------------------------------------------------+

def check_same_run(directory, options, facts):
    """Refuses a directory, half-done or finished, whose config.json says another experiment or other data.

    options: those that decide a result; facts: what files.described says of the data. An option that an older version
    did not have is not compared: directories' names hold every option that differs from its default.
    """
    try:
        old = json.loads((directory / "config.json").read_text())
        different = [k for k, v in options.items() if k != "dataset" and old["options"].get(k, v) != v]
        different += ["data set"] * any(old["data"][k] != facts[k] for k in ("classes", "image", "crc32"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{directory}/config.json is missing or damaged: move the directory away to train this run "
                        "afresh") from None
    require(not different, f"{directory} holds a run with another {', '.join(different)}: move it away, or choose "
            "another --log-dir")


def what_it_lacks(directory, times, tensorboard, epoch):
    """Says, for the end of a line, what was asked for that a run which has come to `epoch` did not leave."""
    names = [f"epoch{times['save_epoch']}.pt"] * (0 < times["save_epoch"] <= epoch)
    names += ["tensorboard"] * (tensorboard and epoch == times["epochs"])
    names = [name for name in names if not (directory / name).exists()]
    return f", without {' and '.join(names)}: move it away to train it with that" * bool(names)


def resume(run):
    """Puts a run (train.new_run's namespace) back to where its checkpoint was written."""
    path = run.directory / "checkpoint.pt"
    try:
        state = files.read_checkpoint(path)
        require(isinstance(state, dict), "not a checkpoint")
        epochs = [json.loads(line)["epoch"] for line in state["log"]]
        require(epochs == list(range(state["epoch"])), "its log is of other epochs")
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        for group in run.optimizer.param_groups:
            if "capturable" in group:  # the checkpoint may come from another device
                group["capturable"] = run.device.type == "cuda"
        for name, generator in run.generators.items():
            generator.set_state(state["generators"][name])
        for layer_state, saved in zip(run.noise, state["noise"], strict=True):
            layer_state.update(saved)
            if saved["active"] is not None:
                layer_state["active"] = saved["active"].to(run.device)
                layer_state["backup"] = saved["backup"] and [tensor.to(run.device) for tensor in saved["backup"]]
        run.epoch, run.step, run.lines = state["epoch"], state["step"], state["log"]
    except Exception as error:  # zip, pickle and torch each have their own for a damaged file
        raise UserError(f"{path} is damaged or of another version ({reason(error)}): move it away to train this run "
                        "afresh", 1) from None
    lacking = what_it_lacks(run.directory, run.times, run.args.tensorboard, run.epoch)
    say(f"{run.label}: continues after epoch {run.epoch} of {run.times['epochs']}{lacking}")


@contextlib.contextmanager
def recorder(run, summarize, still_ours):
    """Gives what takes an epoch's record into the run's files, and to whoever watches.

    summarize: records → their summary; still_ours: what files.claimed gives; nothing is written once the run is
    another's.
    """
    epochs, directory = run.times["epochs"], run.directory

    def record(found):
        run.records.append(found)
        run.lines.append(json.dumps(found))
        still_ours()
        if run.epoch == run.times["save_epoch"]:
            files.save_checkpoint(directory / f"epoch{run.epoch}.pt",
                                  {"epoch": run.epoch, "model": run.model.state_dict()}, still_ours)
        keep({"epoch": run.epoch, "step": run.step, "model": run.model.state_dict(),
              "optimizer": run.optimizer.state_dict(), "noise": run.noise,
              "generators": {name: g.get_state() for name, g in run.generators.items()}, "log": run.lines},
             last=run.epoch == epochs)
        files.append_line(directory / "epochs.jsonl", run.lines[-1])  # after the checkpoint, which can rebuild it
        scalars(found)
        report(run.label, run.records, summarize(run.records)["mean_stability"], bar)

    with (progress_bar(run.label, epochs, run.epoch) as bar,
          tensorboard(run.args.tensorboard, directory, run.epoch) as scalars,
          files.checkpoints(directory / "checkpoint.pt", CHECKPOINT_EVERY[run.device.type], still_ours) as keep):
        yield record


def say_ties(run, tied):
    """One line where filters went because of their order (prune_now)."""
    if tied:
        say(f"{run.label}: equal {run.args.score} scores, so that the first of them went: " +
            ", ".join(f"{n} filters of layer {layer}" for layer, n in tied.items()))


# +--------------------------------------------------------------------------------------------------------------------+
# | One run, from its options to its summary                                                                           |
# +--------------------------------------------------------------------------------------------------------------------+

def loaded(args, shared, script):
    """(arrays, what files.described says of them) of a run's data set, read once for all runs that share `shared`."""
    source = args.dataset, args.data_dir
    if source not in shared:
        arrays = script.load_data(*source)
        shared[source] = arrays, files.described(arrays)
    return shared[source]


def check_finished(args, directory, shared, script):
    """check_same_run of a finished run; a built-in data set that is not here is not fetched for it."""
    if args.dataset not in script.CIFAR or script.data_path(args.dataset, args.data_dir).exists():
        check_same_run(directory, script.result_options(args), loaded(args, shared, script)[1])


def on_device(args, device, shared, script):
    """(what files.described says of a run's data set, its images on the device), shared as by loaded."""
    source = args.dataset, args.data_dir, device, *(getattr(args, name) for name in vars(script.DATA_OPTIONS))
    if source not in shared:
        arrays, facts = loaded(args, shared, script)
        data = script.put_on_device(arrays, device, args)
        if device.type == "cuda":
            torch.cuda.synchronize()  # the other runs' streams do not wait for this one
            shared["bytes"] = torch.cuda.memory_allocated()  # which no further run takes
        shared[source] = facts, data
    return shared[source]


def doubts_about_rate(args, script):
    """What the user may not have meant of the learning rate's epochs, a list of lines. A fall at the very end that was
    asked for is a way to say never."""
    def spelled(epochs):
        return " ".join(map(str, epochs))

    times = script.schedule(args)
    usual = args.lrs == script.paper_settings(args.model, args.optimizer)["lrs"]
    late = [x for x in args.lrs if x > args.epochs - usual]
    lines = [f"the learning rate never falls at --lrs {spelled(late)}, since epochs count from 0 to {args.epochs - 1}: "
             "give --lrs that fit --epochs, or --lrs alone for none"] * bool(late)
    kept, scaled = ([x for x in lrs if x < n] for lrs, n in ((args.lrs, args.epochs), (times["lrs"], times["epochs"])))
    if len(set(scaled)) < len(set(kept)) or 0 in scaled and 0 not in kept:
        lines.append(f"--scale-epochs {short(args.scale_epochs)} rounds --lrs {spelled(kept)} of {args.epochs} epochs "
                     f"to {spelled(times['lrs'])} of {times['epochs']}, which loses a fall: give --epochs and --lrs")
    return lines


def training(args, shared, script):
    """Trains, prunes and logs one run as args say: a generator, which returns its summary, and yields once an epoch,
    when the device has work and the host would wait for it.

    shared: a dict where runs of one process keep the data sets they share on the device. script: the module train,
    whose experiment this keeps in a directory of its own.
    """
    directory, times = script.run_directory(args), script.schedule(args)
    if (directory / "done.json").exists():
        check_finished(args, directory, shared, script)
        lacking = what_it_lacks(directory, times, args.tensorboard, times["epochs"])
        say(f"{directory}: finished already{lacking}")
        return None
    for line in doubts_about_rate(args, script):
        files.say_once(f"train.py: {line}")
    device = choose_device(args)
    facts, data = on_device(args, device, shared, script)
    with contextlib.ExitStack() as stack:
        still_ours = stack.enter_context(files.claimed(directory))
        if (directory / "checkpoint.pt").exists():  # a refusal is not noted as a failure of the run that is there
            check_same_run(directory, script.result_options(args), facts)
        stack.enter_context(files.failure_noted(directory, still_ours))
        run = script.new_run(args, facts["classes"], device)
        config = script.describe_run(run, facts)
        if (directory / "checkpoint.pt").exists():
            resume(run)
            script.use_backend(run.model, run.model.backend)
        else:
            files.write_json(directory / "config.json", config | {"tied": script.prune_scratch(run)})
        files.write_atomically(directory / "epochs.jsonl", "".join(line + "\n" for line in run.lines).encode())
        run.records = [json.loads(line) for line in run.lines]
        with recorder(run, lambda records: script.summarize_epochs(records, config), still_ours) as record:
            for _ in script.experiment(run, data, record):
                yield
                choose_device(args)  # whoever had its turn may have set another precision
        summary = script.summarize_epochs(run.records, config)
        files.write_json(directory / "done.json", summary)
        say(f"{run.label}: best accuracy {summary['best_acc']:.2f}% (epoch {summary['best_epoch']}), last "
            f"{summary['last_acc']:.2f}%, mean stability {summary['mean_stability']:.2f}% over {summary['events']} "
            "pruning events")
        return summary


def train_one(args, script):
    """`training` of one run alone; returns its summary."""
    run = training(args, {}, script)
    with graphs.stream_of(choose_device(args)):
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value
