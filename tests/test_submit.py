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
from levit_study.matrix import Cell
from levit_study.slurm import Request, check_slurm


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


@pytest.fixture
def slurm():
    if shutil.which("sbatch") is None: pytest.skip("no Slurm on this machine; its notebook checks the same against stand-ins")
    if subprocess.run(["sinfo"], capture_output=True).returncode: pytest.skip("Slurm is installed here, but not running")


def test_slurm_names_what_it_refuses(slurm):
    with pytest.raises(StudyError, match="--partition nosuch: unknown to Slurm; it has"): check_slurm(Request(partition="nosuch"))
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
