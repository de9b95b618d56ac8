"""No command line and no file, however wrong, ends in a traceback: each is read, or refused in one line."""
import argparse
import contextlib
import io
import json
import shlex
import types

import numpy as np
import pytest
import torch
from conftest import make_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import make_folder

import analyze
from gst_ext import files
from gst_ext.runs import check_same_run, print_plan, print_status, read_runs, resume, state_of
import train

JUNK = st.one_of(st.none(), st.booleans(), st.integers(-2, 2**70), st.floats(), st.text(max_size=4),
                 st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.none(), max_size=1))


def fuzz(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def refusals(code=None):
    """Lets a UserError of one line pass, and nothing else."""
    try:
        yield
    except files.UserError as error:
        assert str(error) and len(str(error).splitlines()) == 1, repr(str(error))
        assert error.code == (code or error.code) in (1, 2)


# +-- Command lines ---------------------------------------------------------------------------------------------------+

ACTIONS = [action for action in train.make_parser()._actions if action.dest != "help"]
WORDS = st.one_of(st.sampled_from([str(choice) for action in ACTIONS for choice in action.choices or ()]),
                  st.integers(-3, 400).map(str), st.floats().map(str), st.text(max_size=5),
                  st.tuples(st.integers(0, 400), st.integers(0, 1001)).map("{0[0]}x{0[1]}".format),
                  st.sampled_from(["", "1-3,7", "9-1", "1-99999999999", "-1-2", "1e400", "nan", "--", "-", "0" * 5000,
                                   "1x", "x3", "²", "１", "a\nb", "\0", "\udcff", "../..", "9" * 5000, "data.npz"]))
OPTION = st.tuples(st.sampled_from([name for action in ACTIONS for name in action.option_strings]),
                   st.lists(WORDS, max_size=4), st.booleans())


def flat(options):
    return [word for name, values, joined in options
            for word in ([f"{name}={values[0]}", *values[1:]] if joined and values else [name, *values])]


@fuzz(600)
@given(st.one_of(st.lists(OPTION, max_size=6).map(flat), st.lists(WORDS, max_size=4)))
def test_any_command_line_is_a_plan_or_one_line_and_exit_code_2(argv):
    with refusals(2):
        args = train.parse_options(argv)
        times = train.schedule(args)
        assert times["epochs"] >= 1 and train.run_directory(args).name == f"seed{args.seed}"


@fuzz(150)
@given(st.one_of(st.binary(max_size=60), st.lists(st.one_of(
    st.lists(OPTION, max_size=3).map(lambda options: shlex.join(flat(options))), st.text(max_size=20)),
    max_size=3).map(lambda lines: "\n".join(lines).encode(errors="surrogateescape"))))
def test_any_list_of_runs_is_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "listed"
    path.write_bytes(content)
    with refusals(2):
        for directory, run in read_runs(path, train.runs_of).items():
            assert train.run_directory(run.args) == directory
            assert state_of(directory) == "waiting"


# +-- What a run leaves -----------------------------------------------------------------------------------------------+

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; its options, its directory, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("fuzz")
    np.savez(folder / "tiny.npz", **make_arrays())
    argv = ["--model", "resnet20", "--width", "0.06", "--dataset", str(folder / "tiny.npz"), "--device", "cpu",
            "--target", "S", "--r", "30", "--scale-epochs", "0.02", "--batch-size", "16", "--log-dir",
            str(folder / "logs")]
    assert train.main(argv) == 0
    args = train.parse_options(argv)
    directory = train.run_directory(args)
    (folder / "listed").write_text(shlex.join(argv))
    facts = files.described(train.load_data(args.dataset))
    return types.SimpleNamespace(args=args, directory=directory, facts=facts, listed=str(folder / "listed"),
                                 logs=folder / "logs",
                                 files={path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()})


@st.composite
def damaged(draw, content):
    """Bytes with some of them changed, cut off, put in, or doubled."""
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


def replace_one(draw, value, junk):
    """A copy of nested dicts and lists with one value, at any depth, taken away or replaced by junk."""
    if isinstance(value, (dict, list, tuple)) and value and draw(st.integers(0, 5)):
        keys = sorted(value, key=str) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(list(keys)))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if draw(st.integers(0, 9)):
            copy[key] = replace_one(draw, copy[key], junk)
        else:
            del copy[key]
        return copy
    return draw(junk)


def every_change(value):
    """Copies of nested dicts and lists in which one value, the first of each list, is missing or of another kind."""
    yield from (None, True, -1, 1e999, "junk", [1], {"a": []})
    for key in list(value) if isinstance(value, dict) else range(isinstance(value, list) and len(value) > 0):
        for new in every_change(value[key]):
            copy = value.copy()
            copy[key] = new
            yield copy
        copy = value.copy()
        del copy[key]
        yield copy


def restore(finished):
    for name in (*finished.files, "failed.txt", "flatness.json"):
        (finished.directory / name).unlink(missing_ok=True)
    for name, content in finished.files.items():
        (finished.directory / name).write_bytes(content)


def check_logs(finished):
    """What reads logs reads these, or says in one line what is wrong with them; returns the runs analyze.py found."""
    found = analyze.find_runs(finished.logs)
    for (dataset, setting), runs in analyze.runs_of("4", found)[0].items():
        analyze.rest_command("4", dataset, setting, runs)
        if (finished.directory / "flatness.json").exists():
            analyze.with_flatness(runs, [], argparse.Namespace(split="test"))
    assert all(run["problem"] is None or len(run["problem"].splitlines()) == 1 for run in found)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        print_status([finished.listed], train.runs_of)
        assert len(out.getvalue().splitlines()) in (2, 3)
        with refusals(2):
            print_plan(read_runs(finished.listed, train.runs_of), False, train)
    with refusals(2):
        check_same_run(finished.directory, train.result_options(finished.args), finished.facts)
    return found


def test_undamaged_logs_have_no_problem(finished):
    restore(finished)
    run, = check_logs(finished)
    assert run["problem"] is None and (run["model"], run["method"]) == ("resnet20", "S-r30")


@pytest.mark.parametrize("name", ("config.json", "epochs.jsonl", "flatness.json"))
def test_logs_with_any_one_value_changed_are_read_or_named(finished, name):
    restore(finished)
    lines = finished.files.get(name, b'{"eigenvalues": [1.0], "images": 4}').splitlines()
    values = [json.loads(b"".join(lines))] if name == "config.json" else [json.loads(line) for line in lines]
    for new in every_change(values[-1]):
        (finished.directory / name).write_text("".join(json.dumps(value) + "\n" for value in (*values[:-1], new)))
        check_logs(finished)


@fuzz(150)
@given(st.sampled_from(("config.json", "epochs.jsonl", "done.json", "failed.txt", "flatness.json")), st.data(),
       st.booleans())
def test_logs_with_any_damage_are_read_or_named(finished, name, data, unfinished):
    restore(finished)
    content = data.draw(damaged(finished.files.get(name, b'{"eigenvalues": [1.0], "images": 4}')))
    if unfinished:
        (finished.directory / "done.json").unlink()
    (finished.directory / name).write_bytes(content)
    check_logs(finished)


@fuzz(60)
@given(st.data())
def test_a_checkpoint_with_any_value_changed_is_read_or_refused_in_one_line(finished, data):
    path = finished.directory / "fuzzed" / "checkpoint.pt"
    path.parent.mkdir(exist_ok=True)
    state = torch.load(io.BytesIO(finished.files["checkpoint.pt"]), weights_only=True)
    torch.save(replace_one(data.draw, state, st.one_of(JUNK, st.just(torch.zeros(2)))), path)
    run = train.new_run(finished.args, 4, torch.device("cpu"))
    run.directory = path.parent
    with refusals(1):
        resume(run)
        assert run.epoch == len(run.lines)


# +-- Data ------------------------------------------------------------------------------------------------------------+

ARRAYS = st.tuples(st.sampled_from(["u1", "i8", "f4", "U3", "?", "c8", "M8[s]", "V2"]),
                   st.lists(st.sampled_from([0, 1, 3, 12, 20, 32]), max_size=4)).map(lambda kind: np.zeros(kind[1],
                                                                                                          kind[0]))


@fuzz(200)
@given(st.data())
def test_any_npz_file_is_read_or_refused_in_one_line(tmp_path_factory, data):
    path, arrays, buffer = tmp_path_factory.getbasetemp() / "fuzzed.npz", make_arrays(20, 12), io.BytesIO()
    arrays |= data.draw(st.dictionaries(st.sampled_from([*arrays, "more"]), ARRAYS, max_size=2))
    data.draw(st.sampled_from((np.savez, np.savez_compressed)))(buffer, **arrays)
    path.write_bytes(data.draw(st.one_of(st.just(buffer.getvalue()), damaged(buffer.getvalue()))))
    with refusals(2):
        loaded = train.load_data(str(path))
        assert len(loaded["train_x"]) == len(loaded["train_y"]) and loaded["test_y"].max() < len(loaded["classes"])
        train.put_on_device(loaded, torch.device("cpu"))


@fuzz(100)
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_image_folder_is_read_or_refused_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "images"
    if not folder.exists():
        make_folder(folder, make_arrays(8, 4))
    image = data.draw(st.sampled_from(sorted(folder.glob("*/*/*.png"))))
    content = image.read_bytes()
    fuzzed = data.draw(damaged(content))
    more = image.with_name(data.draw(st.sampled_from([".hidden", "text.txt", "a\nb.png", "empty.jpg"])))
    try:
        image.write_bytes(fuzzed)
        more.write_bytes(b"")
        with refusals(2):
            assert len(train.load_data(str(folder))["train_x"]) >= 8
    finally:
        image.write_bytes(content)
        more.unlink()
