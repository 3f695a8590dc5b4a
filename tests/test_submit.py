"""`levit-study submit`: what is told before anything runs; on a machine with Slurm, what Slurm itself says. The run side by side is in test_pipeline.py."""
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from levit_study.commands import main
from levit_study.files import StudyError
from levit_study.job import Job, study_digest
from levit_study.matrix import Cell, Cost
from levit_study.slurm import Request, check_slurm, check_time


@pytest.mark.parametrize(("options", "said"), [
    ("--local 0", "--local 0: "),
    ("--local 100000", "--local 100000: "),
    ("--slurm", "no Slurm here"),
    ("--slurm --options account", "--options account: write NAME=VALUE"),
])
def test_bad_input_is_one_line(root, monkeypatch, capsys, options, said):
    monkeypatch.setenv("PATH", "/nowhere")
    with contextlib.chdir(root): assert main(["submit", *options.split(), "--dry-run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


STAND_INS = {
    "sinfo": """case "$*" in *--all*) echo 'vip infinite';; *%N*) echo node7;; *) printf 'cpu* 1:00:00\\ngpu 1-00:00:00\\n';; esac""",
    "sbatch": "echo \"sbatch: unrecognized option '--nosuch=1'\" >&2; echo 'Try \"sbatch --help\" for more information' >&2; exit 1",
    **dict.fromkeys(("squeue", "scontrol", "srun"), "exit 0"),
}


@pytest.mark.parametrize(("options", "said"), [
    ("--partition tpu", "--partition tpu: unknown to Slurm; use one of cpu, gpu"),
    ("--partition cpu,vip", "--partition vip: closed to "),
    ("--time 2:00:00", "--time 2:00:00: partition cpu ends jobs after 1:00:00"),
    ("--at-once 0", "--at-once 0: too few; give 1 or more"),
    ("--cpus 0", "--cpus 0: too few"),
    ("--options time=5", "--options time=5: write --time instead"),
    ("--options ntasks_per_node=2", "--options ntasks-per-node=2: levit-study sets it itself"),
    ("--partition gpu --options nosuch=1", "Slurm refuses (sbatch: unrecognized option '--nosuch=1')"),
])
def test_what_slurm_would_refuse_is_one_line(root, tmp_path, monkeypatch, capsys, options, said):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with contextlib.chdir(root): assert main(["submit", "--slurm", *options.split(), "--dry-run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_a_time_limit_that_leaves_no_time_to_train_is_refused():
    cell, unknown = Cell("acdc", "focal", 0), Cost(float("nan"), 30)
    check_time(Request(time="5"), cell, unknown)
    with pytest.raises(StudyError, match="--time 2: leaves 0 s to train, .*; ask for --time 5 or more"): check_time(Request(time="2"), cell, unknown)
    with pytest.raises(StudyError, match="an epoch of acdc focal seed 0 took 5.0 min .*; ask for --time 9"):
        check_time(Request(time="6"), cell, Cost(300, 30, "some Xeon"))


@pytest.fixture
def slurm():
    if shutil.which("sbatch") is None: pytest.skip("no Slurm on this machine; its notebook checks the same against stand-ins")
    if subprocess.run(["sinfo"], capture_output=True).returncode: pytest.skip("Slurm is installed here, but not running")


def test_slurm_names_what_it_refuses(slurm):
    with pytest.raises(StudyError, match="--partition nosuch: unknown to Slurm; use one of"): check_slurm(Request(partition="nosuch"))
    with pytest.raises(StudyError, match="Slurm refuses"): check_slurm(Request(cpus=100_000))


SAVING = """
import signal, time
from pathlib import Path
asked = []
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2): signal.signal(each, lambda *_: asked.append(1))
Path("training").touch()
while not asked: time.sleep(0.05)
time.sleep(6)  # longer than a kernel that is given up has left
Path("saved").touch()
raise InterruptedError("stopped")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the processes of a job are found in Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_all_processes_of_a_job_lets_its_training_save(tmp_path, number):
    "Slurm sends its signals to each process of a task, and the job sends SIGINT for them: together they must not count as a second Ctrl-C"
    (tmp_path / "params.yaml").touch()
    cells = [new_code_cell("a = 1", metadata={"tags": ["parameters"]}), new_code_cell(SAVING)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "train.ipynb")
    start = "from levit_study.pipeline import run_notebook; run_notebook('train.ipynb', 'out.ipynb', {})"

    class Stage(Job):
        def command(self): return [sys.executable, "-c", start]

    job, ended = Stage(Cell("acdc", "focal", 0), str(tmp_path), study_digest(tmp_path), log=str(tmp_path / "log")), []

    def work():
        try: job()
        except StudyError as error: ended.append(str(error))

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive() and not (tmp_path / "training").exists(): time.sleep(0.05)
    for process in descendants(job.process.pid): os.kill(process, number)
    job.stop()
    worker.join()
    assert (tmp_path / "saved").exists(), (tmp_path / "log").read_text()
    assert ended == ["acdc focal seed 0: stopped; started again, it resumes"]


def descendants(process):
    "The process and all that it started"
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError): parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [process]
    for each in found: found += [child for child, parent in parents.items() if parent == each]
    return found
