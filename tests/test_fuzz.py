"""No command line and no file, however wrong, ends in a traceback: each is read, or refused."""
import contextlib
import io
import json
import random
import shlex
import types

import numpy as np
import pytest
import torch
from conftest import make_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import analyze
from gst_ext import datasets
from gst_ext.errors import UserError
import train


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def refusals():
    """Lets a UserError of one line and exit code 2 pass, and nothing else."""
    try:
        yield
    except UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1 and error.code == 2


ACTIONS = [action for action in train.make_parser()._actions if action.dest != "help"]
CHOICES = [str(choice) for action in ACTIONS for choice in action.choices or ()]
WORDS = st.one_of(
    st.sampled_from(CHOICES), st.integers(-3, 400).map(str), st.floats().map(str),
    st.text(max_size=5), st.builds("{}x{}".format, st.integers(0, 400), st.integers(0, 1001)),
    st.sampled_from(["", "1-3,7", "9-1", "1-99999999999", "-1-2", "1e400", "nan", "--", "-", "act",
                     "0" * 5000, "1x", "x3", "²", "１", "a\nb", "\0", "\udcff", "../..", "x:y",
                     "9" * 5000, "data.npz"]))
OPTION = st.tuples(st.sampled_from([name for action in ACTIONS for name in action.option_strings]),
                   st.lists(WORDS, max_size=4), st.booleans())


def words(options):
    return [word for name, values, joined in options for word in (
        [f"{name}={values[0]}", *values[1:]] if joined and values else [name, *values])]


@fuzz(400)
@given(st.one_of(st.lists(OPTION, max_size=6).map(words), st.lists(WORDS, max_size=4)))
def test_any_command_line_is_a_run_or_one_line_and_exit_code_2(tmp_path_factory, argv):
    with refusals():
        options = train.parse_options(argv)
        assert train.scaled_schedule(options)["epochs"] >= 1
        assert train.run_path(options).name == f"seed{options.seed}"
    path = tmp_path_factory.getbasetemp() / "listed"
    path.write_bytes(shlex.join(argv).encode(errors="surrogateescape"))
    with refusals():
        for directory, (options, _) in train.read_runs(path).items():
            assert train.run_path(options) == directory


# --- What a run leaves ---

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its options, its directory, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("fuzz")
    np.savez(folder / "tiny.npz", **make_arrays())
    argv = ["--model", "resnet20", "--width", "0.06", "--dataset", str(folder / "tiny.npz"),
            "--device", "cpu", "--target", "S", "--r", "30", "--scale-epochs", "0.02", "--p", "0.5",
            "--s", "40", "--e", "100", "--batch-size", "16", "--log-dir", str(folder / "logs")]
    assert train.main(argv) == 0
    options = train.parse_options(argv)
    path = train.run_path(options)
    (folder / "listed").write_text(shlex.join(argv))
    (path / "flatness.json").write_text('{"eigenvalues": [1.0], "converged": [true], "images": 4}')
    return types.SimpleNamespace(
        options=options, path=path, listed=str(folder / "listed"), logs=folder / "logs",
        files={file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})


def restore(finished):
    (finished.path / "failed.txt").unlink(missing_ok=True)
    for name, content in finished.files.items():
        (finished.path / name).write_bytes(content)


def check_logs(finished):
    """Checks that what reads logs reads these, or says in one line what is wrong with them."""
    runs = analyze.find_runs(finished.logs)
    for run in runs:
        run |= analyze.read_flatness(run["dir"], "test", None)
        assert run["problem"] is None or len(run["problem"].splitlines()) == 1
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        assert analyze.main(["--list", "--log-dir", str(finished.logs)]) == 0
        assert train.main(["--status", finished.listed]) == 0
        assert train.main(["--plan", finished.listed]) in (0, 2)
    assert "Traceback" not in out.getvalue()
    with refusals():
        train.check_finished(finished.path, finished.options)


def test_undamaged_logs_have_no_problem(finished):
    restore(finished)
    run, = analyze.find_runs(finished.logs)
    assert run["problem"] is None and (run["model"], run["events"]) == ("resnet20", 2)
    check_logs(finished)


def changes(value):
    """Yields copies of nested dicts and lists in which one value is missing or of another kind."""
    yield from (None, True, -1, 1e999, "junk", [1], {"a": []})
    keys = list(value) if isinstance(value, dict) else range(isinstance(value, list) and len(value))
    for key in keys:
        for new in changes(value[key]):
            copy = value.copy()
            copy[key] = new
            yield copy
        copy = value.copy()
        del copy[key]
        yield copy


@pytest.mark.parametrize("name", ("config.json", "epochs.jsonl", "flatness.json"))
def test_logs_with_one_value_changed_are_read_or_named(finished, name):
    restore(finished)
    text = finished.files[name].decode()
    *before, last = text.splitlines() if name == "epochs.jsonl" else [text]
    for new in random.Random(0).sample(list(changes(json.loads(last))), 10):
        (finished.path / name).write_text("\n".join([*before, json.dumps(new)]) + "\n")
        check_logs(finished)


@st.composite
def damaged(draw, content):
    """Draws bytes with some of them changed, cut off, put in, or doubled."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(("flip", "cut", "put", "drop", "double")))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at:]
        elif kind == "put":
            content[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "drop":
            del content[at:at + draw(st.integers(1, 40))]
        else:
            content += content[at:]
    return bytes(content)


@fuzz(100)
@given(st.sampled_from(("config.json", "epochs.jsonl", "done.json", "failed.txt",
                        "flatness.json")), st.data(), st.booleans())
def test_logs_with_any_damage_are_read_or_named(finished, name, data, done):
    restore(finished)
    if not done:
        (finished.path / "done.json").unlink()
    (finished.path / name).write_bytes(data.draw(damaged(finished.files.get(name, b"a\nb"))))
    check_logs(finished)


# --- Data ---

ARRAYS = st.builds(lambda kind, shape: np.zeros(shape, kind),
                   st.sampled_from(["u1", "i8", "f4", "U3", "?", "c8", "M8[s]", "V2"]),
                   st.lists(st.sampled_from([0, 1, 3, 12, 20, 32]), max_size=4))


@fuzz(150)
@given(st.data())
def test_any_npz_file_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path, buffer = tmp_path_factory.getbasetemp() / "fuzzed.npz", io.BytesIO()
    arrays = make_arrays(20, 12)
    arrays |= data.draw(st.dictionaries(st.sampled_from([*arrays, "val_x", "val_y", "more"]),
                                        ARRAYS, max_size=2))
    data.draw(st.sampled_from((np.savez, np.savez_compressed)))(buffer, **arrays)
    content = buffer.getvalue()
    path.write_bytes(data.draw(st.one_of(st.just(content), damaged(content))))
    with refusals():
        loaded = datasets.load_dataset(str(path))
        assert len(loaded["train_x"]) == len(loaded["train_y"])
        assert loaded["test_y"].max() < len(loaded["classes"])
        datasets.prepare_data(loaded, torch.device("cpu"))
