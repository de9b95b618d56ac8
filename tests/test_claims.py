"""A run is trained by one process at a time, on whatever host, and a claim of the dead does not hold it for ever."""
import contextlib
import fcntl
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import without_seconds
from test_runs import error_line

from gst_ext import files, runs
import train

ELSEWHERE = "another-boot host9 123 0123abcd"
MARKS = ("checkpoint.pt", "epochs.jsonl", "done.json", "config.json")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.05)
    monkeypatch.setattr(files, "SILENCE", 0.8)
    monkeypatch.setattr(files, "DEAD", set())


@pytest.fixture
def claim(directory):
    """Writes the claim of a process on another host; gives its path."""
    directory().mkdir(parents=True)
    path = directory() / ".claim"
    path.write_text(ELSEWHERE)
    return path


@contextlib.contextmanager
def beating(path, clock=time.time):
    """Refreshes a claim from a thread, as a process on another host would, by that host's clock."""
    over = threading.Event()

    def beat():
        while not over.wait(0.02):
            os.utime(path, (clock(), clock()))
    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_a_claim_of_another_host_that_is_refreshed_is_one_line(run, directory, claim, capsys):
    with beating(claim):
        assert runs.state_of(directory()) == "running"
        assert run() == 1
    line = error_line(capsys)
    assert "process 123 on host9" in line and str(directory()) in line
    assert claim.read_text() == ELSEWHERE and not any((directory() / name).exists() for name in MARKS)


@pytest.mark.parametrize("text", (ELSEWHERE, "", "another-boot", "\0\xff cut"))
def test_a_claim_of_another_host_that_is_not_refreshed_or_cut_is_taken_over(run, directory, claim, text):
    claim.write_text(text)
    os.utime(claim, (0, 0))
    assert run() == 0
    assert (directory() / "done.json").exists() and not claim.exists(), "it goes with the run"


@pytest.mark.parametrize("jump", (-1e6, 1e6))
def test_no_clock_that_jumps_keeps_a_claim_or_loses_it(run, directory, claim, monkeypatch, capsys, jump):
    clock, ticks = time.time, itertools.count()
    with beating(claim, lambda: clock() + jump - 100 * next(ticks)):  # backwards
        monkeypatch.setattr(time, "time", lambda: clock() - jump * next(ticks))
        assert run() == 1 and "in use" in error_line(capsys)
    assert runs.state_of(directory()) == "waiting", "or --plan would leave it out for ever"
    assert run() == 0


def test_a_claim_of_this_host_whose_process_is_gone_is_taken_at_once(run, options, directory, monkeypatch):
    monkeypatch.setattr(files, "SILENCE", 1e9)
    code = ("import os, sys, train; train.train_epoch = lambda *_, **__: os._exit(9); train.main(sys.argv[1:])")
    killed = subprocess.run([sys.executable, "-c", code, *options()], cwd=train.__file__.rpartition("/")[0])
    assert killed.returncode == 9
    assert (directory() / ".claim").read_text().startswith(files.this_host())
    assert runs.state_of(directory()) == "waiting"
    assert run() == 0


def test_who_is_taken_over_writes_nothing_more(run, directory, monkeypatch, capsys):
    assert run(logs="whole") == 0
    train_epoch, epochs = train.train_epoch, []

    def sleep_through(*arguments, **more):
        result = train_epoch(*arguments, **more)
        epochs.append(1)
        if len(epochs) == 3:  # it sleeps, another host takes over, trains an epoch and goes on
            path = directory() / ".claim"
            path.unlink()
            path.write_text(ELSEWHERE)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", sleep_through)
        capsys.readouterr()
        assert run() == 1
    assert str(directory()) in error_line(capsys)
    assert len(without_seconds(directory())) == 2 and not (directory() / "failed.txt").exists()
    assert (directory() / ".claim").read_text() == ELSEWHERE, "the claim of the other stays"
    assert not list(directory().glob("*.partial"))
    assert run() == 0
    assert without_seconds(directory()) == without_seconds(directory(logs="whole"))


def test_a_write_that_hung_while_another_took_over_does_not_count(run, directory, monkeypatch, capsys):
    fsync, hung = os.fsync, []

    def hang(file):
        fsync(file)
        path = os.readlink(f"/proc/self/fd/{file}")
        if "checkpoint.pt" in path:
            hung.append(path)
            if len(hung) == 2:
                (directory() / ".claim").write_text(ELSEWHERE)

    monkeypatch.setattr(os, "fsync", hang)
    assert run() == 1
    error_line(capsys)
    assert files.read_checkpoint(directory() / "checkpoint.pt")["epoch"] == 1 == len(without_seconds(directory()))


def test_a_claim_is_refreshed_while_its_run_goes_on_and_never_anothers(directory):
    path = directory() / ".claim"

    def refreshed(seconds):
        before, end = files.read_claim(path), time.monotonic() + seconds
        while time.monotonic() < end:
            if files.read_claim(path) != before:
                return True
            time.sleep(0.01)
        return False

    with files.claimed(directory()) as still_ours:
        assert refreshed(20)
        still_ours()
        path.unlink()
        path.write_text(ELSEWHERE)
        assert not refreshed(0.3)
        with pytest.raises(files.UserError):
            still_ours()
    assert path.read_text() == ELSEWHERE


def test_a_full_disk_leaves_no_claim_that_nobody_holds(directory, monkeypatch):
    def full(path, *mode, real=open, **more):
        with real(path, *mode, **more) as file:
            return real("/dev/full", "w") if mode == ("x",) else os.fdopen(os.dup(file.fileno()), *mode, **more)

    directory().mkdir(parents=True)
    (directory() / ".claim").touch()
    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(files.UserError, match="No space left"), files.claimed(directory()):
        pass
    assert not (directory() / ".claim").exists()


def test_a_look_at_a_run_does_not_keep_it_from_starting(directory):
    directory().mkdir(parents=True)
    with open(directory() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (lock, fcntl.LOCK_UN)).start()
        with files.claimed(directory()):
            assert runs.state_of(directory()) == "running"
    assert runs.state_of(directory()) == "waiting"


def hold(directory, answers, host):
    """Claims the directory, as a process of a host of its own whose file system has no locks; says how that ended."""
    files.this_host, fcntl.flock = lambda: host, lambda *_: None
    try:
        with files.claimed(directory) as still_ours:
            time.sleep(1)
            still_ours()
            answers.put("held")
    except files.UserError as error:
        answers.put(str(error))


@pytest.mark.parametrize("before", (None, ELSEWHERE))
def test_of_many_hosts_without_locks_one_keeps_the_run(directory, before):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    directory().mkdir(parents=True)
    if before:
        (directory() / ".claim").write_text(before)
    hosts = [context.Process(target=hold, args=(directory(), answers, f"host{i}")) for i in range(6)]
    for host in hosts:
        host.start()
    said = [answers.get(timeout=60) for _ in hosts]
    for host in hosts:
        host.join(60)
    assert said.count("held") == 1, said


def test_a_run_held_elsewhere_is_no_failure_of_a_list(options, directory, tmp_path, capsys):
    seeds = [("--epochs", 1, "--lrs", "--seed", seed) for seed in (1, 2)]
    listed, busy = tmp_path / "listed", directory(*seeds[0])
    listed.write_text("".join(" ".join(options(*seed)) + "\n" for seed in seeds))
    busy.mkdir(parents=True)
    (busy / ".claim").write_text(ELSEWHERE)
    with beating(busy / ".claim"):
        assert train.main(["--runs", str(listed)]) == 0
    assert "in use" in error_line(capsys)
    assert (directory(*seeds[1]) / "done.json").exists() and not (busy / "done.json").exists()
