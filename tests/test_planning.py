"""`levit-study plan` as a user runs it, on the records that the project ships."""
import subprocess

import pytest

from levit_study.commands import main
from levit_study.evidence.power import Design, detectable
from levit_study.evidence.spreads import Spreads, read_trainings


@pytest.fixture
def plan(root, monkeypatch, capsys):
    "Run the command in the project's folder; returns its status and what it printed"
    monkeypatch.chdir(root)
    def run(*arguments):
        status = main(["plan", *arguments])
        return status, *capsys.readouterr()
    return run


RECORDS = "reports/studies/acdc_128"


def test_the_plan_of_five_folds_and_two_seeds(root, environment):
    command = ["levit-study", "plan", RECORDS, "--patients", "100", "--folds", "5", "--seeds", "2", "--difference", "0.02"]
    done = subprocess.run(command, cwd=root, env={**environment, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:3] == ["100", "5", "2"]]
    assert [row[3:6] for row in rows] == [["focal", "-", "baseline"], ["focal_tversky", "-", "baseline"], ["focal_tversky", "-", "focal"]]
    assert all(.01 < float(row[6]) < .06 for row in rows)
    assert "10 patients, 3 trainings per loss" in done.stdout and "Fewest seeds" in done.stdout and "hours" in done.stdout


def test_without_records_the_spreads_must_be_given(plan, tmp_path):
    status, _, error = plan(str(tmp_path))
    assert status == 1 and "--patient-sd and --seed-sd" in error
    status, output, error = plan("--patients", "50", "--seeds", "3", "--patient-sd", "0.05", "--seed-sd", "0.01")
    assert status == 0, error
    assert f"{detectable(Design(50, 1, 3), Spreads(.05, .01 * 2**.5, assumed=.01)):.4f}" in output


@pytest.mark.parametrize("arguments, words", [
    (["--patients", "8", "--folds", "5"], "each fold needs two patients"),
    (["--difference", "-0.01"], "--difference -0.01"),
    (["--dataset", "synapse"], "no data set synapse; give --dataset, one of acdc"),
    (["--power", "80"], "--power 80"),
])
def test_bad_input_is_one_line(plan, arguments, words):
    status, output, error = plan(RECORDS, *arguments)
    assert status == 1 and words in error and len(error.splitlines()) == 1 and not output


def test_a_study_of_one_training_per_loss_says_what_is_missing(plan):
    single = "reports/studies/acdc_224"
    status, _, error = plan(single, "--patients", "100", "--seeds", "3")
    assert status == 1 and "give --seed-sd" in error
    assert plan(single, "--patients", "100", "--seeds", "3", "--seed-sd", "0.05")[0] == 0


def test_the_cases_of_an_ensemble_are_no_training(root):
    study = root / "reports/studies/acdc_recipe_seeds"
    cases, epochs = read_trainings(study)
    assert list(study.glob("ensembles/**/cases.csv")) and sorted(set(cases.seed)) == sorted(set(epochs.seed)) == [0, 1, 2]
    assert set(cases.dataset) == set(epochs.dataset)
