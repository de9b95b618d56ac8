"""Messages to the user, errors of one line, and the types of command-line values.

What a user can put right is a UserError, which `report_error` prints as one line; everything else
is a bug and keeps its traceback.
"""
import argparse
import errno
import os
import runpy
import sys
import traceback

import torch

WARNED = set()  # the lines that warn_once has printed in this process


class UserError(Exception):
    """An error that the user can put right, printed as one line.

    Args:
        message: What is wrong and what to do next; line breaks become spaces.
        code: The exit code: 2 for a refused command, 1 for a failure during a run.
    """

    def __init__(self, message, code=2):
        super().__init__(" ".join(message.splitlines()))
        self.code = code


def check(condition, message, code=2):
    """Raises UserError(message, code) unless the condition is true."""
    if not condition:
        raise UserError(message, code)


def first_line(error):
    """Returns the first line of an exception's message, or its class name if it has none."""
    message = getattr(error, "strerror", None) or str(error)
    return (message.splitlines() or [type(error).__name__])[0]


def print_line(line, file=None):
    """Prints a line, to stdout by default, and flushes it.

    On a closed pipe (`... | head`) printing stops and the program goes on. A full disk raises
    OSError as usual.
    """
    file = file or sys.stdout
    try:
        print(line + "\n", end="", file=file, flush=True)  # one write: other processes print, too
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), file.fileno())  # later output, also at exit, is discarded


def warn_once(line):
    """Prints a line to stderr, once per process however many runs it concerns."""
    if line not in WARNED:
        WARNED.add(line)
        print_line(line, sys.stderr)


def report_error(error, program, interrupted):
    """Prints an exception to stderr: one line where the user can act, a traceback for a bug.

    Args:
        error: The exception.
        program: The name that begins the line, such as "train.py".
        interrupted: What the line says after an interruption, for example how to continue.

    Returns:
        The exit code.
    """
    line, code = str(error), 1
    if isinstance(error, UserError):
        code = error.code
    elif isinstance(error, torch.OutOfMemoryError):
        line = "the GPU's memory is full: lower --batch-size, or wait for other programs to end"
    elif isinstance(error, OSError):
        line += ": fix this, or choose other folders with --log-dir and --data-dir"
    elif isinstance(error, KeyboardInterrupt):
        code = 143 if line else 130
        line = f"{line or 'interrupted'}; {interrupted}"
    else:
        line = "".join(traceback.format_exception(error)).rstrip()
    print_line(f"{program}: {line}", sys.stderr)
    return code


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message):
        if message.startswith("argument "):
            message = message.removeprefix("argument ").replace(": ", " ", 1)
        raise UserError(f"{message} ({self.prog} --help lists every option)")

    def print_help(self, file=None):
        print_line(self.format_help().rstrip(), file)


def format_value(value):
    """Formats an option's value for names and messages: 0.25, 3,4,5,6 or 0.1x16."""
    if isinstance(value, (list, tuple)):
        if len(value) > 1 == len(set(value)):
            return f"{format_value(value[0])}x{len(value)}"
        return ",".join(map(format_value, value))
    return str(value).removesuffix(".0")


def number(kind, accepts, what):
    """Returns an argparse type: an int or float (`kind`) that `accepts`, a function, is true of."""
    def parse(text):
        value = kind(text)
        if not accepts(value):
            raise argparse.ArgumentTypeError(f"{text}: give {what}")
        return value
    parse.__name__ = kind.__name__
    return parse


def repeated(kind):
    """Returns an argparse type for list options: V is one value, VxN is V repeated N times."""
    def parse(text):
        value, _, times = text.partition("x")
        if not 1 <= int(times or 1) <= 1000:
            raise ValueError
        return [kind(value)] * int(times or 1)
    parse.__name__ = f"{kind.__name__} or VxN"
    return parse


def read_function(text, papers, others):
    """Reads an option's value that is a name or FILE.py:FUNCTION.

    Args:
        papers: The paper's names, which no function may have.
        others: The names of functions that were read before.

    Returns:
        The name, and all that the file defines, a dict; None for a name alone.
    """
    file, _, name = text.rpartition(":")
    try:
        if not file:
            check(name in papers or name in others, "give one of "
                  f"{', '.join(dict.fromkeys([*papers, *others]))}, or FILE.py:FUNCTION")
            return name, None
        check(name not in papers, f"the paper has its own {name}: rename the function")
        defined = runpy.run_path(file)
        check(callable(defined.get(name)), f"the file defines no function {name}")
        return name, defined
    except Exception as error:
        raise argparse.ArgumentTypeError(f"{text}: {first_line(error)}") from None


def seed_list(text):
    """An argparse type for seeds: "1-3,7" is [1, 2, 3, 7]."""
    parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
    if max(map(len, parts)) > 2 or max(map(max, parts)) >= 2**32:
        raise ValueError
    spans = [range(part[0], part[-1] + 1) for part in parts]
    if not all(spans) or sum(map(len, spans)) > 10_000:  # 3-1 holds no seed
        raise ValueError
    return [seed for span in spans for seed in span]


seed_list.__name__ = "range or list of seeds"  # as argparse names the type in its errors
