"""Files and errors: all writes are atomic, one process a run directory, on whatever host, and errors of one line.

    with files.claimed(directory) as still_ours, files.failure_noted(directory, still_ours):
        with files.checkpoints(directory / "checkpoint.pt", 30, still_ours) as keep:
            for epoch in range(epochs):
                ...
                still_ours()
                keep({"epoch": epoch + 1, "model": model.state_dict()}, last=epoch + 1 == epochs)

What the user can mend is a UserError, which `tell` prints as one line. A claim keeps other processes off a directory.
"""
import argparse
import collections
import contextlib
import errno
import fcntl
import io
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
import traceback
import uuid
import zipfile
import zlib

import numpy as np
import torch
from torch.utils._pytree import tree_map

BEAT, SILENCE = 30, 120  # seconds: how often a run's claim is refreshed, and when one that is not belongs to the dead
PROCESS = uuid.uuid4().hex  # tells this process from an earlier one of the same number
EXIF_ORIENTATION = 0x0112
SAID = set()  # lines of say_once
DEAD = set()  # claims of other hosts' processes that were seen not to be refreshed any more

# +--------------------------------------------------------------------------------------------------------------------+
# | Errors of one line                                                                                                 |
# +--------------------------------------------------------------------------------------------------------------------+

class UserError(Exception):
    """Something the user can mend: printed as one line. `code` is the exit code, 2 before the run and 1 during it."""

    def __init__(self, message, code=2):
        super().__init__(" ".join(message.splitlines()))  # a file's name may hold anything
        self.code = code


def require(ok, message, code=2):
    if not ok:
        raise UserError(message, code)


def reason(error):
    """The first line of an exception's message, or its name."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists every option)")

    def print_help(self, file=None):
        say(self.format_help().rstrip(), file)


def say(line, file=None):
    """Prints a line (to stdout). Where nobody reads any more, as behind `| head`, that ends the printing, and not what
    is being trained; a full disk raises OSError as ever."""
    file = file or sys.stdout
    try:
        print(line, file=file, flush=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), file.fileno())  # what is still to be printed goes there, at exit too


def say_once(line):
    """One line on stderr, once in a process, however many runs it concerns."""
    if line not in SAID:
        SAID.add(line)
        say(line, sys.stderr)


def tell(error, program, interrupted="the same command goes on from the last finished epoch"):
    """One line on stderr, which begins with the program's name, for whatever the user can mend, a traceback for what is
    a bug; returns the exit code."""
    line, code = str(error), 1
    if isinstance(error, UserError):
        code = error.code
    elif isinstance(error, torch.OutOfMemoryError):
        line = ("the GPU's memory is full: lower --batch-size or wait for other programs; the same command continues "
                "this run")
    elif isinstance(error, OSError):  # a folder that may not even be looked into, and its kind
        line += ": mend that, or choose other folders with --log-dir and --data-dir"
    elif isinstance(error, KeyboardInterrupt):
        code = 143 if line else 130
        line = f"{line or 'interrupted'}; {interrupted}"
    else:
        line = "".join(traceback.format_exception(error)).rstrip()
    say(f"{program}: {line}", sys.stderr)
    return code


# +--------------------------------------------------------------------------------------------------------------------+
# | Command lines: values as they are given and as they are named                                                      |
# +--------------------------------------------------------------------------------------------------------------------+

def short(value):
    """A value as it stands in names and messages: 0.25, 3,4,5,6, 0.1x16."""
    if isinstance(value, (list, tuple)):
        return f"{short(value[0])}x{len(value)}" if len(value) > 1 == len(set(value)) else ",".join(map(short, value))
    return str(value).removesuffix(".0")


def repeated(kind):
    """An argparse type for list options: `V` is one value, `VxN` is V repeated N times; gives a list."""
    def parse(text):
        value, _, times = text.partition("x")
        if not 1 <= int(times or 1) <= 1000:
            raise ValueError
        return [kind(value)] * int(times or 1)
    parse.__name__ = f"{kind.__name__} or VxN"
    return parse


def seed_list(text):
    """An argparse type: 1-3,7 is [1, 2, 3, 7]."""
    parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
    spans = [range(part[0], part[-1] + 1) for part in parts]
    if not all(spans) or sum(map(len, spans)) > 10_000 or max(map(len, parts)) > 2 or max(map(max, parts)) >= 2**32:
        raise ValueError  # a span that holds no seed, such as 3-1, too
    return [seed for span in spans for seed in span]


seed_list.__name__ = "range or list of seeds"  # as argparse names it


# +--------------------------------------------------------------------------------------------------------------------+
# | Writes                                                                                                             |
# +--------------------------------------------------------------------------------------------------------------------+

@contextlib.contextmanager
def writing(path):
    """Turns a full disk, a read-only folder and their kind into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({reason(error)}): make room or choose another folder, then start the "
                        "same command again", 1) from None


def write_atomically(path, content, check=None):
    """Writes bytes to `path` so that a reader, or a crash, sees the old file or the new one and nothing between.

    check: called last of all before the new file counts, since a write may hang for minutes on a network.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.partial")  # nobody else's
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if check:
                check()
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def append_line(path, line):
    with writing(path), open(path, "a") as file:
        file.write(line + "\n")


# +--------------------------------------------------------------------------------------------------------------------+
# | Claims: who trains a run                                                                                           |
# +--------------------------------------------------------------------------------------------------------------------+

def lock_directory(directory, wait=False):
    """Takes a directory for this process, and returns the lock, which goes with the process, however it ends."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    for _ in range(10):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return lock
        time.sleep(0.05)  # in_use holds it for a moment
    lock.close()
    raise UserError(f"{directory} is in use by another process: wait for it, or choose another --seed", 1)


def this_host():
    """What tells this host, since it was started, from every other."""
    with contextlib.suppress(OSError):
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{uuid.getnode():x}"


def read_claim(path):
    """(a claim's text, when it was last refreshed), (None, 0) without one; opened, since network file systems may
    answer from memory otherwise."""
    try:
        with open(path, errors="replace") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def is_foreign(claim):
    """Whether a claim's text is of another host, or cut."""
    return claim is not None and claim.split(" ")[0] != this_host()


def in_use(directory):
    """Whether a process of this host or another has claimed the directory."""
    claim, refreshed = read_claim(directory / ".claim")
    if is_foreign(claim) and abs(time.time() - refreshed / 1e9) < SILENCE:
        return True
    with contextlib.suppress(FileNotFoundError), open(directory / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def claimed(directory):
    """Holds a run for this process; gives a function that raises UserError once another process has taken it over.

    A lock keeps processes of one host apart, and goes with its process. Hosts that share only a file system, which may
    not share locks, are kept apart by a claim that its holder refreshes. The claim of another host is taken over when
    it was watched for SILENCE seconds without being refreshed, so that no two clocks need agree.
    """
    lock, path, pause = lock_directory(directory), directory / ".claim", min(1, SILENCE / 10)
    mine = f"{this_host()} {platform.node() or 'unnamed'} {os.getpid()} {PROCESS}"
    over = threading.Event()

    def still_ours():
        require(read_claim(path)[0] == mine, f"{directory} was taken over by another process, or deleted: nothing was "
                "written since", 1)

    def refresh(file):  # the file and not its name, which may be another's by now
        while not over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(file.fileno())

    with lock:
        seen, until, silent = read_claim(path), time.monotonic() + SILENCE, False
        while is_foreign(seen[0]) and seen[0] not in DEAD and not silent:
            silent = time.monotonic() > until  # before it is read for the last time
            time.sleep(pause)
            _, name, number, *_ = f"{seen[0]} ? ? ?".split(" ")
            require(read_claim(path) == seen, f"{directory} is in use by process {number} on {name}: leave it to that, "
                    "or choose another --seed", 1)
        with writing(path):
            if seen[0] is not None:
                DEAD.add(seen[0])
                path.unlink(missing_ok=True)
            for partial in directory.glob("*.partial"):
                partial.unlink(missing_ok=True)  # of a process that was killed, or must not finish it any more
            try:
                with contextlib.suppress(FileExistsError), open(path, "x") as file:  # else another host was quicker
                    file.write(mine)
            except OSError:
                path.unlink(missing_ok=True)
                raise
        if is_foreign(seen[0]):
            time.sleep(pause)  # another host that saw the same silence has replaced our claim by now, or will not
        still_ours()
        with open(path) as file:
            beat = threading.Thread(target=refresh, args=(file,), daemon=True)
            beat.start()
            try:
                yield still_ours
            finally:
                over.set()
                beat.join()
                with contextlib.suppress(OSError):
                    if read_claim(path)[0] == mine:
                        path.unlink()


@contextlib.contextmanager
def failure_noted(directory, still_ours):
    """Leaves the reason of a failure in failed.txt, for --status; an earlier one is forgotten."""
    path = directory / "failed.txt"
    with writing(path):
        path.unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        with contextlib.suppress(UserError, OSError):  # a full disk, or a run that is another's now
            kind = "" if isinstance(error, (UserError, OSError)) else f"{type(error).__name__}: "
            write_atomically(path, f"{kind}{str(error).strip()}\n".encode(errors="replace"), still_ours)
        raise


def why_failed(directory):
    """The first line of a run's failed.txt."""
    return ((directory / "failed.txt").read_text(errors="replace").splitlines() or ["no reason was noted"])[0]


# +--------------------------------------------------------------------------------------------------------------------+
# | Checkpoints                                                                                                        |
# +--------------------------------------------------------------------------------------------------------------------+

def save_checkpoint(path, state, check=None):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer(), check)


@contextlib.contextmanager
def checkpoints(path, every, still_ours):
    """Gives keep(state, last), which writes a run's state at most every so many seconds, and the last one always.

    What is not written stays in memory, and is written when the run ends in whatever way but a kill -9. A GPU then has
    epochs in its queues, which whoever stops a run will not wait for: only the copy that is written has to be there.
    """
    pending, copied, written = None, None, -math.inf

    def keep(state, last):
        nonlocal pending, copied, written
        if last or time.monotonic() - written >= every:
            save_checkpoint(path, state, still_ours)
            pending, written = None, time.monotonic()
        else:
            pending = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, state)
            copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None

    try:
        yield keep
    finally:
        if pending:
            with torch.cuda.stream(copied and torch.cuda.default_stream()):  # on its own it would wait its turn
                if copied:
                    copied.synchronize()
                save_checkpoint(path, pending, still_ours)


def read_checkpoint(path, mmap=False):
    """What save_checkpoint wrote; damage raises one of many exceptions, and a flipped bit, which torch loads, too."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    require(not damaged, f"{damaged} in it fails its checksum")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


# +--------------------------------------------------------------------------------------------------------------------+
# | Arrays and images of others' making                                                                                |
# +--------------------------------------------------------------------------------------------------------------------+

def read_npz(path):
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"{path} cannot be read as .npz ({reason(error)}): make it again, or delete it if it came from "
                        "a download") from None


def read_image(path, notes):
    """An image as it is to be seen, (32, 32, 3) uint8; UserError where it cannot be read or its pixels have no range.

    It is turned as its EXIF orientation says; 16 bits are scaled to 8; what is transparent lies on white. notes (a
    Counter) counts such images.
    """
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as file:
            several, turned = getattr(file, "n_frames", 1) > 1, file.getexif().get(EXIF_ORIENTATION, 1) != 1
            file.load()
            tags = getattr(file, "tag_v2", {})  # of a TIFF: bits of a pixel, and whether 0 is black
            wide = (file.format, file.mode) in (("PNG", "I"), ("PPM", "I")) or file.mode.startswith("I;16") and (
                file.format != "TIFF" or (tags.get(258), tags.get(262)) == ((16,), 1))
            image = ImageOps.exif_transpose(file)
    except Exception:  # Pillow has many for a damaged file
        raise UserError(f"{path} is not a readable image: repair or remove it") from None
    clear = "transparency" in image.info or image.mode in ("LA", "PA", "RGBA")
    require(image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr") or wide and not clear,
            f"{path} has pixels whose range, colours or transparency are not defined here (mode {image.mode}): save it "
            "as an 8-bit PNG")
    if wide:
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if clear:
        image = image.convert("RGBA")
        clear = image.getextrema()[3][0] < 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    for happened, what in ((several, "read to their first frame"), (turned, "turned as their EXIF data say"),
                           (wide, "scaled from 16 bits to 8"), (clear, "with transparency laid on white"),
                           (image.mode == "CMYK", "converted from CMYK")):
        notes[what] += happened
    return np.asarray(image.convert("RGB").resize((32, 32), Image.BILINEAR))


def read_image_folder(folder):
    """The images of folder/train/<class>/ and folder/test/<class>/; what was made of them is said in one line."""
    def seen(path):
        return sorted(p for p in path.glob("*") if not p.name.startswith("."))  # .ipynb_checkpoints is no class

    classes, notes = [p.name for p in seen(folder / "train") if p.is_dir()], collections.Counter()
    unknown = {p.name for p in seen(folder / "test") if p.is_dir()} - set(classes)
    require(classes, f"{folder}/train has no class folders: lay the images out as train/<class>/<image>")
    require(not unknown, f"{folder}/test/{min(unknown, default='')} is no class of {folder}/train: rename or remove it")
    data = {"classes": np.array(classes)}
    for split in ("train", "test"):
        found = [(path, label) for label, name in enumerate(classes) for path in seen(folder / split / name)]
        for label in set(range(len(classes))) - {label for _, label in found}:
            raise UserError(f"{folder}/{split}/{classes[label]} has no images: put some there, or remove the class")
        notes["beside the class folders left out"] += sum(not p.is_dir() for p in seen(folder / split))
        data[f"{split}_x"] = np.stack([read_image(path, notes) for path, _ in found])
        data[f"{split}_y"] = np.array([label for _, label in found], np.int64)
    if +notes:
        say_once(f"train.py: images of {folder}: " + ", ".join(f"{n} {what}" for what, n in (+notes).items()))
    return data


def download_cifar(name, data_dir):
    try:
        import torchvision
        kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
        train, test = (kind(data_dir, train=flag, download=True) for flag in (True, False))
    except Exception as error:
        raise UserError(f"cannot download {name} ({reason(error)}): put {name}.npz into {data_dir}/, or the official "
                        f"cifar-{name[5:]}-python.tar.gz, or use --dataset digits, which needs no download") from None
    return dict(train_x=train.data, train_y=np.array(train.targets), test_x=test.data, test_y=np.array(test.targets),
                classes=np.array(train.classes))


def checked_arrays(path, data):
    """A data set's arrays (train.load_data), labels as int64; UserError, which names path, for what does not fit."""
    missing = [k for k in ("train_x", "train_y", "test_x", "test_y", "classes") if k not in data]
    require(not missing, f"{path} lacks {', '.join(missing)}: it needs train_x, train_y, test_x, test_y and classes")
    k = len(data["classes"]) if data["classes"].ndim == 1 else 0
    require(k >= 2, f"{path}: classes must be a list of at least two names")
    for split in ("train", "test"):
        x, y = data[f"{split}_x"], data[f"{split}_y"]
        require(x.dtype == np.uint8 and x.ndim == 4 and x.shape[3] == 3 and min(x.shape[1:3]) >= 32,
                f"{path}: {split}_x is {x.dtype} {x.shape}; it must be uint8 (n, height, width, 3), at least 32x32")
        require(len(x) > 0 and y.shape == (len(x),) and y.dtype.kind in "iu",
                f"{path}: {split}_y is {y.dtype} {y.shape}; it must hold one whole number for each of {len(x)} images")
        require(0 <= y.min() and y.max() < k,
                f"{path}: {split}_y goes from {y.min()} to {y.max()}; the labels of {k} classes are 0 to {k - 1}")
        data[f"{split}_y"] = y.astype(np.int64)
    require(data["train_x"].shape[1:] == data["test_x"].shape[1:], f"{path}: training and test images differ in size")
    return data


def load_digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, as 32x32 in three equal channels: 1,000 train, 797 test."""
    import sklearn.datasets
    from PIL import Image
    digits = sklearn.datasets.load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    x = np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.BILINEAR)) for image in grey])
    x = np.repeat(x[..., None], 3, axis=3)
    order = np.random.RandomState(0).permutation(len(x))  # one split for everybody: the bundled order is by writer
    train, test = order[:1000], order[1000:]
    return dict(train_x=x[train], train_y=digits.target[train], test_x=x[test], test_y=digits.target[test],
                classes=digits.target_names.astype(str))


def described(arrays):
    """What config.json says of a data set."""
    return {"train": len(arrays["train_x"]), "test": len(arrays["test_x"]), "classes": len(arrays["classes"]),
            "image": list(arrays["train_x"].shape[1:]),
            "crc32": {k: zlib.crc32(np.ascontiguousarray(arrays[k])) for k in sorted(arrays) if k != "classes"}}


def commit_of(path):
    """The git commit that holds a file, "-dirty" where something was changed since; None without git."""
    command = ["git", "-C", pathlib.Path(path).resolve().parent, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
