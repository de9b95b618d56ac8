"""A target goes through a real Slurm: every task is stopped, requeued alone, and continues."""
import contextlib
import getpass
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from conftest import read_lines, without_seconds
from test_runs_sh import copy_project

import train

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """
ClusterName=gst
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=node Default=YES MaxTime=INFINITE
"""

BLOCK = "[study]\n--model vgg11 --target none\n" + "".join(
    f"--model vgg11 --target {target} --r {r}\n" for target in "SL" for r in (4, 40))


def call(command, cwd=None):
    result = subprocess.run(command.split(), cwd=cwd, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, (command, result.stdout, result.stderr)
    return result.stdout


def wait_for(what, seconds, happened):
    """Waits until happened() is true and returns it; fails after seconds, which a fault takes."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"{what} took longer than {seconds} s"
        time.sleep(0.1)
    return found


def free_ports():
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def kill_remaining(folder):
    """Kills the processes of this Slurm's jobs: its configuration is in their environment."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def slurm(monkeypatch):
    """A Slurm of one node with two CPUs on this machine, shut down whatever happens."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gst-slurm-"))  # a socket's path must be short
    for name in ("", "state", "spool", "munge"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name).chmod(0o755)
    (folder / "munge/key").write_bytes(os.urandom(128))
    (folder / "munge/key").chmod(0o400)
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "slurm.conf").write_text(CONF.format(
        host=socket.gethostname().split(".")[0], user=getpass.getuser(), folder=folder,
        ports=free_ports()))
    munge = [f"--{name}={folder}/munge/{name.split('-')[0]}"
             for name in ("key-file", "socket", "pid-file", "seed-file", "log-file")]
    daemons = []

    def start(*command):
        with open(folder / f"{command[0]}.log", "wb") as log:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    def is_idle():
        logs = [path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log")]
        assert all(daemon.poll() is None for daemon in daemons), "\n".join(logs)
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, timeout=60)
        return state.stdout.strip() == b"idle"

    try:
        start("munged", "--foreground", "--force", *munge)
        wait_for("munged", 60, (folder / "munge/socket").exists)
        monkeypatch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-N", "node")
        wait_for("Slurm's start", 60, is_idle)
        yield
    finally:
        if len(daemons) == len(DAEMONS):
            subprocess.run(["scancel", "--user", getpass.getuser()], timeout=60)
        for daemon in reversed(daemons):
            daemon.kill()
            daemon.wait()
        kill_remaining(folder)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_figure_goes_through_slurm_though_every_task_is_stopped(slurm, tmp_path, monkeypatch):
    copy_project(tmp_path, BLOCK)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call("bash runs.sh study --quick --seeds 1 --jobs 2 --group 2 --slurm --time=10 -- "
         "--width 0.05 --batch-size 32 --scale-epochs 0.03", tmp_path)
    folder, = (tmp_path / "logs/slurm").iterdir()
    array = re.search(r"(\d+)_", call("squeue -h -r -o %i"))[1]
    lists = {task: (folder / f"list.{task}").read_text().splitlines() for task in (1, 2, 3)}
    assert [len(lines) for lines in lists.values()] == [2, 2, 1]
    paths = {line: tmp_path / train.run_path(train.parse_options(line.split()))
             for lines in lists.values() for line in lines}

    def half_done(task):
        """The line of the run that the task is training, once it has two epochs, or None."""
        return next((line for line in lists[task] if not (paths[line] / "done.json").exists()
                     and (paths[line] / "epochs.jsonl").exists()
                     and len(read_lines(paths[line])) >= 2), None)

    def shows(task, field):
        return re.search(rf"{field}=(\S+)", call(f"scontrol show job {array}_{task}"))[1]

    for task in lists:  # with the signal that Slurm sends before the time limit
        stopped = wait_for(f"two epochs of task {task}", 120, lambda: half_done(task))
        call(f"scancel --batch --signal USR1 {array}_{task}")
        wait_for(f"the requeue of task {task}", 60, lambda: shows(task, "Restarts") == "1")
    wait_for("the array and the figure", 300, lambda: not call("squeue -h"))

    logs = {path.name: path.read_text() for path in folder.glob("*.log")}
    assert [shows(task, "Restarts") for task in lists] == ["1"] * 3, "each task, and only once"
    assert all((path / "done.json").exists() for path in paths.values()), logs
    assert len(list(tmp_path.glob("figures/*stability*.pdf"))) == 1, logs
    assert all("continues after epoch" in logs[f"{task}.log"] for task in lists), logs
    options = [*stopped.split(), "--log-dir", str(tmp_path / "alone")]
    assert train.main(options) == 0
    alone = train.run_path(train.parse_options(options))
    assert without_seconds(paths[stopped]) == without_seconds(alone)
