"""`levit-study submit`: what is told before anything runs; on a machine with Slurm, what Slurm itself says. The run side by side is in test_pipeline.py."""
import contextlib
import shutil
import subprocess

import pytest

from levit_study.commands import main
from levit_study.files import StudyError
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
