"""The directory of one run: its lock, its files, and how a stopped run continues.

    with RunDirectory(path, num_epochs) as directory:
        if directory.has_checkpoint():
            directory.resume(restore)
        directory.begin(config)
        for epoch in range(len(directory.records), num_epochs):
            ...
            directory.save_epoch(record, state)
        directory.finish(summary)

Files are written atomically: a reader, or a crash, sees the old content or the new, never a part.
One process at a time holds a directory, by a lock that ends with the process.
"""
import contextlib
import copy
import fcntl
import io
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from .errors import UserError, check, first_line, print_line, warn_once

# +-- Files ---------------------------------------------------------------------------------------+

@contextlib.contextmanager
def readable_write_errors(path):
    """Turns a full disk, a read-only folder and similar errors into a UserError of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({first_line(error)}): make room or choose another "
                        "folder, then start the same command again", 1) from None


def write_atomically(path, content):
    """Writes bytes to `path`, synced to the disk, replacing what was there."""
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.partial")
    with readable_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def append_line(path, line):
    with readable_write_errors(path), open(path, "a") as file:
        file.write(line + "\n")


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain values with torch.save, atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path, mmap=False):
    """Returns what save_checkpoint wrote, on the CPU.

    Raises:
        UserError: A checksum is wrong, which torch.load by itself does not notice.
        Exception: One of many kinds for a file that is damaged otherwise.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    check(not damaged, f"the checksum of {damaged} in it is wrong")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def environment(device, backend, script):
    """Returns what decides the last bits of a run beside its options, for config.json.

    Args:
        device: The torch.device.
        backend: "ext" or "eager".
        script: A file of the repository whose commit is recorded.
    """
    return {"backend": backend, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "machine": platform.machine(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "git": git_commit(script),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "numpy": np.__version__}}


def git_commit(path):
    """Returns the git commit that holds a file, with "-dirty" after changes; None without git."""
    command = ["git", "-C", pathlib.Path(path).resolve().parent, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


# +-- What a directory says about its run ---------------------------------------------------------+

def read_log_lines(path):
    """Returns the complete lines of a run's epochs.jsonl as a list of str; [] without a log."""
    log = path / "epochs.jsonl"
    return log.read_text(errors="replace").split("\n")[:-1] if log.exists() else []


def read_config(path):
    """Returns a run's config.json as a dict; raises UserError if it is missing or damaged."""
    try:
        config = json.loads((path / "config.json").read_text())
        for part in config["options"], config.get("data", {}), config.get("own_model") or {}:
            part.items()
        return config
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}/config.json is missing or damaged: move the directory away to "
                        "train this run from the start") from None


def sources(config):
    """Returns {"score spread": checksum} of a run's own score and own model; None for others."""
    options = config["options"]
    return {f"score {options.get('score')}": config.get("score_crc32"),
            f"model {options.get('model')}": (config.get("own_model") or {}).get("crc32")}


def check_same_run(path, new):
    """Refuses a directory that holds a run with another config than `new`; returns its config.

    An option or data that `new` does not have are not compared, nor where the data are.
    """
    config = read_config(path)
    different = [k for k, v in new["options"].items()
                 if k != "dataset" and v is not None and config["options"].get(k, v) != v]
    different += [f"source of the {what}" for what, crc32 in sources(new).items()
                  if sources(config).get(what) != crc32]
    data = config.get("data", {})
    if new["data"] and any(data.get(k) != new["data"][k] for k in ("classes", "image", "crc32")):
        different.append("data set")
    check(not different, f"{path} holds a run with another {', '.join(different)}: move it away, "
          "or choose another --log-dir")
    return config


def continued_config(path, new):
    """Returns the config of a run that continues, and sets torch to the threads it began with.

    What else differs in its environment is printed and added to the config.

    Args:
        path: The run's directory.
        new: The config of the run if it started now (check_same_run).
    """
    old = check_same_run(path, new)
    torch.set_num_threads(old.get("threads", new["threads"]))
    changes = {k: [old.get(k), new[k]] for k in ("backend", "device", "instruction_set", "versions")
               if old.get(k, new[k]) != new[k]}
    if not changes:
        return old
    print_line(f"the run continues with another {', '.join(changes)} than it began with: the last "
               "bits of its numbers may differ; config.json records it")
    return old | {"continued": old.get("continued", []) + [changes]}


def warn_missing_outputs(path, schedule, tensorboard):
    """Prints which outputs are asked for now that the finished epochs did not write.

    Args:
        schedule: As in config.json.
    """
    done = len(read_log_lines(path))
    names = [f"epoch{schedule['save_epoch']}.pt"] * (0 < schedule["save_epoch"] <= done)
    names += ["tensorboard"] * (tensorboard and done == schedule["epochs"])
    missing = " and ".join(name for name in names if not (path / name).exists())
    if missing:
        print_line(f"{path}: trained without {missing}: move it away to train it with that")


def is_locked(path):
    """Returns whether a process holds the directory."""
    with contextlib.suppress(OSError), open(path / ".lock") as lock:  # which may be missing
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def run_status(path):
    """Returns "done", "running", "failed" or "waiting" (a run that was stopped waits, too)."""
    if (path / "done.json").exists():
        return "done"
    if is_locked(path):
        return "running"
    return "failed" if (path / "failed.txt").exists() else "waiting"


def group_by_status(paths):
    """Returns {status: [path, ...]} with all four statuses of run_status."""
    groups = {status: [] for status in ("done", "running", "failed", "waiting")}
    for path in paths:
        groups[run_status(path)].append(path)
    return groups


def failure_reason(path):
    """Returns the first line of a run's failed.txt."""
    text = (path / "failed.txt").read_text(errors="replace")
    return (text.splitlines() or ["no reason was recorded"])[0]


def seconds_per_epoch(path):
    """Returns the seconds of a run's last epoch, or None without one."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return float(json.loads(read_log_lines(path)[-1])["seconds"])


# +-- A run's directory while the run is trained --------------------------------------------------+

def lock_directory(path, wait=False):
    """Creates a directory if needed and locks it for this process; returns the open lock file.

    Raises:
        UserError: Another process holds it, and `wait` is false.
    """
    with readable_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "w")
    for _ in range(10):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return lock
        except BlockingIOError:
            time.sleep(0.05)  # is_locked of another process holds the lock for a moment
        except OSError as error:
            warn_once(f"the file system has no locks ({first_line(error)}): make sure that no two "
                      "processes work on the same files")
            return lock
    lock.close()
    raise UserError(f"{path} is in use by another process: wait for it, or choose another --seed",
                    1)


class RunDirectory:
    """The directory of one run, locked while the context manager is entered.

    Args:
        path: The directory (pathlib.Path); created if missing.
        num_epochs: The epochs of the whole run.
        tensorboard: Whether to write the metrics for TensorBoard, too.
        checkpoint_seconds: The least time between two checkpoints. The latest state is kept in
            memory and written when the run ends, except by SIGKILL.

    Attributes:
        label: The directory's last three parts, for printing.
        records: The epochs logged so far, as dicts.
    """

    def __init__(self, path, num_epochs, tensorboard=False, checkpoint_seconds=0):
        self.path, self.num_epochs, self.tensorboard = path, num_epochs, tensorboard
        self.checkpoint_seconds, self.last_checkpoint = checkpoint_seconds, -math.inf
        self.pending = None  # the state of a later epoch than the checkpoint's
        self.label, self.lines, self.records = "/".join(path.parts[-3:]), [], []
        self.resources = contextlib.ExitStack()

    def __enter__(self):
        self.resources.enter_context(lock_directory(self.path))
        with readable_write_errors(self.path):
            for partial in self.path.glob("*.partial"):
                partial.unlink(missing_ok=True)  # left by a process that was killed
        return self

    def __exit__(self, kind, error, trace):
        with self.resources:
            refused = isinstance(error, UserError) and error.code == 2
            if isinstance(error, Exception) and not refused:
                with contextlib.suppress(UserError):  # a full disk
                    known = isinstance(error, (UserError, OSError))
                    reason = str(error) if known else f"{kind.__name__}: {error}"
                    write_atomically(self.path / "failed.txt",
                                     f"{reason.strip()}\n".encode(errors="replace"))
            if self.pending:
                save_checkpoint(self.path / "checkpoint.pt", self.pending)

    def has_checkpoint(self):
        return (self.path / "checkpoint.pt").exists()

    def resume(self, restore=None):
        """Reads the checkpoint and its log, and calls restore(state) if given.

        Raises:
            UserError: The checkpoint is damaged.
        """
        path = self.path / "checkpoint.pt"
        try:
            state = load_checkpoint(path)
            self.lines, self.records = state["log"], [json.loads(x) for x in state["log"]]
            check([record["epoch"] for record in self.records] == list(range(state["epoch"])),
                  "its log is of other epochs")
            if restore:
                restore(state)
        except Exception as error:  # zipfile, pickle and torch raise many kinds
            raise UserError(f"{path} is damaged or of another version ({first_line(error)}): move "
                            "it away to train this run from the start", 1) from None
        if restore:
            print_line(f"{self.label}: continues after epoch {state['epoch']} of {self.num_epochs}")

    def begin(self, config):
        """Writes config.json, and epochs.jsonl as the checkpoint has it, and opens the outputs."""
        logged = len(read_log_lines(self.path))
        if logged and not self.records:
            print_line(f"{self.label}: {logged} epochs are logged, but checkpoint.pt is missing: "
                       "the run starts again")
        with readable_write_errors(self.path):
            (self.path / "failed.txt").unlink(missing_ok=True)
        write_json(self.path / "config.json", config)
        self.write_log()
        on_terminal = sys.stderr.isatty() and sys.stdout.isatty()
        self.bar = self.resources.enter_context(tqdm(
            total=self.num_epochs, initial=len(self.records), desc=self.label,
            disable=not on_terminal,
            bar_format="{desc} |{bar:20}| epoch {n_fmt}/{total_fmt}{postfix} {remaining} left"))
        self.write_metrics = lambda record: None
        if self.tensorboard:
            self.write_metrics = self.resources.enter_context(
                tensorboard_writer(self.path, len(self.records)))

    def write_log(self):
        write_atomically(self.path / "epochs.jsonl",
                         "".join(line + "\n" for line in self.lines).encode())

    def save_epoch(self, record, state, keep_weights=False):
        """Saves an epoch: the checkpoint first, since the log can be rebuilt from it.

        Args:
            record: What the epoch's log line holds, a dict.
            state: What the run continues from, a dict with "epoch" and "model" among others.
            keep_weights: Whether to keep the weights as epoch<N>.pt, too.
        """
        self.records.append(record)
        self.lines.append(json.dumps(record))
        if keep_weights:
            save_checkpoint(self.path / f"epoch{state['epoch']}.pt",
                            {"epoch": state["epoch"], "model": state["model"]})
        state = state | {"log": self.lines}
        if (time.monotonic() - self.last_checkpoint >= self.checkpoint_seconds
                or state["epoch"] == self.num_epochs):
            save_checkpoint(self.path / "checkpoint.pt", state)
            self.pending, self.last_checkpoint = None, time.monotonic()
        else:
            self.pending = copy.deepcopy(state)  # training goes on in the same tensors
        append_line(self.path / "epochs.jsonl", self.lines[-1])
        self.write_metrics(record)

    def print_epoch(self, mean_stability):
        """Prints the last epoch: on a terminal by the progress bar, else as a line.

        Args:
            mean_stability: The mean over the run's pruning events so far, in %.
        """
        record = self.records[-1]
        self.bar.update()
        if not self.bar.disable:
            self.bar.set_postfix_str(f"test {record['test_acc']:.2f}% "
                                     f"mean stability {mean_stability:.2f}%")
            return
        event, num_filters = "", sum(record["removed"])
        if num_filters:
            event = f" -> {record['test_acc']:.2f}% ({num_filters} filters)"
        seconds = [r["seconds"] for r in self.records[-5:]]
        minutes_left = (self.num_epochs - len(self.records)) * sum(seconds) / len(seconds) / 60
        print_line(
            f"{self.label} epoch {len(self.records)}/{self.num_epochs} lr {record['lr']:g} loss "
            f"{record['train_loss']:.4f} train {record['train_acc']:.2f}% test "
            f"{record['test_acc_before']:.2f}%{event} mean stability {mean_stability:.2f}% "
            f"{record['seconds']:.1f} s, {minutes_left:.0f} min left")

    def finish(self, summary):
        """Writes done.json, after the log has reached the disk; returns the summary."""
        self.write_log()
        write_json(self.path / "done.json", summary)
        print_line(f"{self.label}: best accuracy {summary['best_acc']:.2f}% (epoch "
                   f"{summary['best_epoch']}), last {summary['last_acc']:.2f}%, mean stability "
                   f"{summary['mean_stability']:.2f}% over {summary['events']} pruning events")
        return summary


def report_finished(path, num_epochs):
    """Prints that a run is finished; restores lines missing in its log from its checkpoint."""
    if len(read_log_lines(path)) < num_epochs:
        with RunDirectory(path, num_epochs) as directory:
            try:
                directory.resume()
            except UserError:
                raise UserError(f"{path}: epochs.jsonl was cut, and checkpoint.pt cannot repair "
                                "it: move the directory away to train this run again") from None
            directory.write_log()
        print_line(f"{path}: epochs.jsonl was cut; it is written again from checkpoint.pt")
    print_line(f"{path}: finished already")


def report_plan(num_epochs, retry_failed):
    """Prints on stderr how many runs are left; returns their paths.

    Args:
        num_epochs: {path: the epochs of the run}.
        retry_failed: Whether failed runs count as left.
    """
    status = group_by_status(num_epochs)
    left = {*status["waiting"], *(status["failed"] if retry_failed else ())}
    left = [path for path in num_epochs if path in left]
    done = [len(read_log_lines(path)) for path in left]
    epochs = sum(num_epochs[path] for path in left) - sum(done)
    print_line(f"{len(num_epochs)} runs: {len(status['done'])} finished, {sum(map(bool, done))} "
               f"half-done; to do now: {len(left)} runs, {epochs:,} epochs", sys.stderr)
    if status["running"]:
        print_line(f"{len(status['running'])} runs are being trained by another process, such as "
                   f"{status['running'][0]}", sys.stderr)
    if status["failed"] and not retry_failed:
        first = status["failed"][0]
        print_line(f"{len(status['failed'])} runs that failed before are left alone, such as "
                   f"{first}: {failure_reason(first)} (--retry-failed trains them again)",
                   sys.stderr)
    return left


def print_status(lists):
    """Prints a line for each list of runs, and one for each run that failed.

    In a terminal a bar shows the share of the list's epochs that are trained.

    Args:
        lists: {file: {path: the epochs of the run}}.
    """
    on_terminal = sys.stdout.isatty()
    print_line(f"{'':12} {' ' * 9 * on_terminal}{'runs':>6} {'done':>6} {'running':>8} "
               f"{'failed':>7} {'waiting':>8}  time left")
    for file, num_epochs in lists.items():
        status, bar = group_by_status(num_epochs), ""
        epochs = {path: max(0, n - len(read_log_lines(path))) for path, n in num_epochs.items()}
        left = [epochs[path] for path in status["running"] + status["waiting"]]
        if on_terminal:
            total = max(1, sum(num_epochs.values()))
            symbols = "░▏▎▍▌▋▊▉█" if "utf" in sys.stdout.encoding.lower() else "-#"
            bar = tqdm.format_meter(total - sum(epochs.values()), total, 0, ascii=symbols,
                                    bar_format="{bar:8} ")
        seconds = [s for path in num_epochs if (s := seconds_per_epoch(path)) is not None]
        at_once, time_left = max(1, len(status["running"])), "not known"
        if seconds:
            hours = sum(left) * sum(seconds) / len(seconds) / at_once / 3600
            time_left = f"{hours:.1f} h, {at_once} at once"
        counts = [len(status[name]) for name in ("done", "running", "failed", "waiting")]
        print_line("{:12} {}{:6} {:6} {:8} {:7} {:8}  ".format(
            pathlib.Path(file).name, bar, len(num_epochs), *counts)
            + (time_left if left else "nothing to do"))
        for path in status["failed"]:
            print_line(f"  failed: {path}: {failure_reason(path)}")


@contextlib.contextmanager
def tensorboard_writer(path, first_epoch):
    """Opens path/tensorboard and yields a function that writes the numbers of a record there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install tensorboard, or leave the "
                        "option out") from None
    with (readable_write_errors(path),
          SummaryWriter(path / "tensorboard", purge_step=first_epoch) as writer):
        def write(record):
            for name, value in (record | {"live_filters": sum(record["live"])}).items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, record["epoch"])
        yield write
