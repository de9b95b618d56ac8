"""Many runs: lists of them, what became of each, how they take turns in one process, and what a run says meanwhile.

A run's files are those that train.py leaves in its directory. What a line of options means, and how a run is trained,
is told by whoever calls: runs_of gives a line's runs, training(args, shared) is a generator that yields once an epoch.
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

from . import files, graphs
from .files import UserError, reason, require, say

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # before CUDA starts: as many streams at once as runs

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


def print_plan(runs, retry_failed, loaded, check_finished):
    """--plan: what is left of the runs, in numbers on stderr, as lines on stdout.

    loaded(args, shared) loads a run's data, check_finished(args, directory, shared) raises UserError where what is
    finished is another run; shared: a dict where both keep data sets.
    """
    finished, running, failed, waiting = by_state(runs).values()
    shared = {}
    for directory in finished:
        check_finished(runs[directory].args, directory, shared)
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
        loaded(run.args, shared)  # a download that fails should fail here, once
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


def train_all(runs, at_once, training, choose_device):
    """--runs, --seeds: so many at once take turns; a run that fails is reported, and the others go on.

    at_once: None for one, and on a GPU, once the first run has shown what memory it takes, for as many as fit.
    choose_device(args) is the device that a run works on, for its stream there, which the next run takes over.
    """
    require((at_once or 1) <= graphs.STREAMS, f"--at-once {at_once}: give {graphs.STREAMS} or fewer")
    waiting, going, streams, shared, failed, limit = list(runs), {}, {}, {}, 0, at_once or 1
    free, first_epoch = collections.defaultdict(list), True
    try:
        while waiting or going:
            while waiting and len(going) < limit:
                directory = waiting.pop(0)
                going[directory] = training(runs[directory].args, shared)
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
