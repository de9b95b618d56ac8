"""A target goes through a real Slurm: one array of tasks, killed, stopped by the time limit, requeued, and drawn."""
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

from gst_ext.runs import log_of
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
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
KillWait=5
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=node Default=YES MaxTime=INFINITE
"""


def call(*command, cwd=None):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, (command, result.stdout, result.stderr)
    return result.stdout


def wait_for(what, seconds, happened):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} took longer than {seconds} s"
        time.sleep(0.1)


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def kill_what_is_left(folder):
    """Kills this Slurm's steps and their processes, which know its configuration from their environment."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # gone, or another's
            pass


@pytest.fixture
def slurm(monkeypatch):
    """A Slurm of one node with two CPUs on this machine, shut down whatever happens; gives its folder."""
    monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin:/sbin")
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge, then this test runs")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gst-slurm-"))  # short, for the socket's sake
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(mode=0o755)
    folder.chmod(0o755)
    (folder / "munge/key").write_bytes(os.urandom(128))
    (folder / "munge/key").chmod(0o400)
    (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname().split(".")[0], user=getpass.getuser(),
                                                   folder=folder, ports=free_ports(2)))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    munge = [f"--{name}={folder}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file",
                                                                         "seed-file", "log-file")]
    daemons = []

    def start(*command):
        with open(folder / f"{command[0]}.log", "wb") as log:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))

    def idle():
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, timeout=60).stdout
        assert all(daemon.poll() is None for daemon in daemons), logs()
        return state.strip() == "idle"

    def logs():
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))

    try:
        start("munged", "--foreground", "--force", *munge)
        wait_for("munged", 20, (folder / "munge/socket").exists)
        monkeypatch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D", "-N", "node")
        wait_for("Slurm's start", 40, idle)
        yield folder
    finally:
        if len(daemons) == len(DAEMONS):
            subprocess.run(["scancel", "--user", getpass.getuser()], timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        kill_what_is_left(folder)
        shutil.rmtree(folder, ignore_errors=True)


def test_figure_2_goes_through_slurm_though_its_tasks_are_killed(slurm, tmp_path, monkeypatch):
    copy_project(tmp_path)
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ("--quick", "--seeds", "1", "--", "--width", "0.05", "--batch-size", "32", "--scale-epochs", "0.02")
    submit = ("bash", "runs.sh", "fig2", "--slurm", "--time 10", "--jobs", "2", "--group", "3", *small)

    printed = call(*submit[:3], "--print", *submit[3:], cwd=tmp_path)
    assert "--array 1-3%2" in printed and "--time 10" in printed and "--requeue" in printed
    assert len(re.findall("^sbatch ", printed, re.M)) == 2 and len(re.findall("^--model", printed, re.M)) == 8
    assert not (tmp_path / "logs").exists() and not call("squeue", "-h"), "nothing is submitted"

    call(*submit, cwd=tmp_path)
    folder, = (tmp_path / "logs/slurm").iterdir()
    array = re.search(r"(\d+)_", call("squeue", "-h", "-r", "-o", "%i")).group(1)
    lists = [path.read_text().splitlines() for path in sorted(folder.glob("list.*"))]
    assert [len(lines) for lines in lists] == [3, 3, 2]
    runs = [[train.run_directory(train.parse_options(line.split())) for line in lines] for lines in lists]
    disturbed = {}  # by task: the number in its list of the run that it trained then

    def half_done(task):
        for number, directory in enumerate(runs[task - 1]):
            if not (tmp_path / directory / "done.json").exists() and len(log_of(tmp_path / directory)) >= 2:
                disturbed[task] = number
                return True
        return False

    def state(task):
        return re.search(r"JobState=(\w+)", call("scontrol", "show", "job", f"{array}_{task}")).group(1)

    wait_for("two epochs of task 1", 60, lambda: half_done(1))
    os.kill(int((tmp_path / runs[0][disturbed[1]] / ".claim").read_text().split()[2]), signal.SIGKILL)
    wait_for("the end of task 1", 30, lambda: state(1) == "FAILED")
    call("scontrol", "requeue", f"{array}_1")
    wait_for("two epochs of task 2", 60, lambda: half_done(2))
    call("scancel", "--batch", "--signal", "USR1", f"{array}_2")  # what Slurm sends before the time limit
    wait_for("task 2 back in the queue", 30, lambda: state(2) == "PENDING")
    wait_for("the array and the figure", 150, lambda: not call("squeue", "-h"))

    logs = {path.name: path.read_text() for path in folder.glob("*.log")}
    assert all((tmp_path / directory / "done.json").exists() for task in runs for directory in task), logs
    assert len(list(tmp_path.glob("figures/fig2-*.pdf"))) == 1, logs
    assert all("continues after epoch" in logs[f"{task}.log"] for task in (1, 2)) and "continues" not in logs["3.log"]

    for task, number in disturbed.items():
        options = [*lists[task - 1][number].split(), "--log-dir", str(tmp_path / "alone")]
        assert train.main(options) == 0
        alone = train.run_directory(train.parse_options(options))
        assert without_seconds(tmp_path / runs[task - 1][number]) == without_seconds(alone)
        assert len(read_lines(alone)) == 7

    status = call("bash", "runs.sh", "status", *small, cwd=tmp_path)
    assert re.search(r"^fig2 +8 +8 +0 +0 +0 +nothing to do$", status, re.M), status
    (tmp_path / runs[0][0] / "done.json").unlink()
    again = call(*submit[:3], "--print", *submit[3:], cwd=tmp_path)
    assert "--array 1-1%2" in again and len(re.findall("^--model", again, re.M)) == 1, "finished runs are skipped"
