"""What a training must survive: being killed at any moment, damaged files, several processes."""
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file
from toy import toy_run, toy_store

from levit_study.evaluation.ensemble import load_ensemble
from levit_study.evaluation.inference import load_network, predict_volume
from levit_study.files import StudyError
from levit_study.losses import build_loss
from levit_study.params import Model
from levit_study.training import checkpoint
from levit_study.training.fit import fit
from levit_study.training.record import Stopped
from levit_study.training.identity import TRAINING, training_code

TOY = Path(__file__).with_name("toy.py")
TIMES = ["seconds", "images_per_second"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# An ordinary job of two nodes and four tasks, as Slurm describes it to the batch script.
SLURM = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NNODES": "2",
         "SLURM_JOB_NUM_NODES": "2", "SLURM_NODELIST": "node[1-2]", "SLURM_NODEID": "0",
         "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "2(x2)"}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "A folder with a prepared store"
    folder = tmp_path_factory.mktemp("toy")
    toy_store(folder / "toy.h5")
    return folder


@pytest.fixture(scope="module")
def whole(toys, environment):
    "That folder with a run that nothing interrupted, and its duration"
    started = time.monotonic()
    command = [sys.executable, TOY, "fit", toys / "toy.h5", toys / "whole"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
    (toys / "duration.json").write_text(json.dumps(time.monotonic() - started))
    return toys


def same(a, b):
    "Raise unless two runs have the same course and the same weights, to the bit"
    courses = (pd.read_csv(folder / "epochs.csv").drop(columns=TIMES) for folder in (a, b))
    pd.testing.assert_frame_equal(*courses, check_exact=True)
    left, right = (load_file(f / "best.safetensors") for f in (a, b))
    assert left and left.keys() == right.keys()
    assert [name for name in left if not (left[name] == right[name]).all()] == []


def start(folder, name, environment):
    command = [sys.executable, TOY, "fit", folder / "toy.h5", folder / name]
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, env=environment, **silent)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_runs_end_with_the_same_result(whole, environment, number):
    name, moment, within = f"killed{number}", random.Random(int(number)), 0
    deadline = time.monotonic() + 900   # a busy machine needs long
    seconds = json.loads((whole / "duration.json").read_text())
    for kills in range(20):
        process = start(whole, name, environment)
        try: process.wait(moment.uniform(0, seconds) if kills < 4 or not within else 240)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            process.wait(60)
            within += any((whole / name).rglob("*.pt"))  # it trained, and did not just start
        else:
            assert process.returncode == 0
            if within: break
            shutil.rmtree(whole / name)  # it ended before it could be killed: once more
        assert time.monotonic() < deadline
    assert within, "no kill hit the training"
    same(whole / "whole", whole / name)


def test_a_damaged_checkpoint_falls_back(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_EVERY", 0)
    def stop_late(line):
        if "epoch 3/" in line: os.kill(os.getpid(), signal.SIGTERM)
    store = toys / "toy.h5"
    with pytest.raises(Stopped):
        fit(toy_run(), store, tmp_path, tmp_path, "cpu", stop_late, progress=False)
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    lines = []
    fit(toy_run(), store, tmp_path, tmp_path, "cpu", lines.append, progress=False)
    assert "damaged" in lines[0] and "resuming from epoch 4" in lines[1]
    epochs = pd.read_csv(tmp_path / "epochs.csv")
    assert list(epochs.epoch) == [1, 2, 3, 4]


def test_a_first_training_goes_on_where_dvc_took_its_best_weights_away(toys, tmp_path):
    "`dvc exp run` begins with taking away the outputs that no run has recorded yet"
    def stop_late(line):
        if "epoch 3/" in line: os.kill(os.getpid(), signal.SIGTERM)
    def train(name, say):
        folder = tmp_path / name
        return fit(toy_run(), toys / "toy.h5", folder, folder, "cpu", say, progress=False)
    with pytest.raises(Stopped): train("untouched", stop_late)
    shutil.copytree(tmp_path / "untouched", tmp_path / "taken")
    (tmp_path / "taken" / "best.safetensors").unlink()
    for name in ("untouched", "taken"):
        train(name, (lines := []).append)
        assert "resuming from epoch 4" in lines[0]
    same(tmp_path / "untouched", tmp_path / "taken")


def test_a_complete_run_goes_on_for_more_epochs_as_if_it_had_been_asked_for_them(toys, tmp_path):
    "With `keep_state` and a constant rate; otherwise it says why it starts anew"
    def train(name, epochs, **settings):
        run = toy_run(epochs=epochs, **{"schedule": "constant", "keep_state": True, **settings})
        fit(run, toys / "toy.h5", tmp_path / name, tmp_path / name, "cpu", (lines := []).append, progress=False)
        return lines
    train("on", 2)
    assert "resuming from epoch 3" in train("on", 4)[0]
    train("straight", 4)
    same(tmp_path / "on", tmp_path / "straight")
    train("other", 1, keep_state=False)
    assert "training.epochs: 2, was 1; training.keep_state: true would have kept" in train("other", 2, keep_state=False)[0]
    train("cosine", 1, schedule="cosine")
    assert "was 1; the rates of schedule cosine depend on it); starting over" in train("cosine", 2, schedule="cosine")[0]
    assert "starting over" in train("on", 3)[0]   # fewer than are done


def test_a_run_that_resumes_with_other_threads_says_so_and_keeps_its_parts(toys, tmp_path):
    def stop(line):
        if "epoch 1/" in line: os.kill(os.getpid(), signal.SIGTERM)

    def train(say): fit(toy_run(epochs=3), toys / "toy.h5", tmp_path, tmp_path, "cpu", say, progress=False)

    before = torch.get_num_threads()
    with pytest.raises(Stopped): train(stop)
    try:
        torch.set_num_threads(before + 1)
        train((lines := []).append)
    finally: torch.set_num_threads(before)
    assert f"threads {before} until epoch 1, now {before + 1}" in lines[1]
    parts = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert [(part["first_epoch"], part["last_epoch"], part["machine"]["threads"]) for part in parts] == [(1, 1, before), (2, 3, before + 1)]


def test_a_training_of_a_fold_sees_its_own_cases_alone(toys, tmp_path):
    roles = ["fold train", "train fold", "train train", "valid train", "train valid", "test test"]
    shutil.copy(toys / "toy.h5", tmp_path / "toy.h5")
    with h5py.File(tmp_path / "toy.h5", "a") as file: file["cases/folds"] = [role.encode() for role in roles]
    run = toy_run(epochs=1)
    for fold in (0, 1):
        one = run.model_copy(update={"fold": fold})
        fit(one, tmp_path / "toy.h5", tmp_path / f"{fold}", tmp_path / f"{fold}", "cpu", print, progress=False)
        assert json.loads((tmp_path / f"{fold}/run.json").read_text())["parameters"]["fold"] == fold
    curves = [pd.read_csv(tmp_path / f"{fold}/epochs.csv") for fold in (0, 1)]
    assert (curves[0].valid_dice != curves[1].valid_dice).all() and curves[0].train_case_dice.notna().all()
    with pytest.raises(StudyError, match="no fold2; its data are divided into 2 folds"):
        fit(run.model_copy(update={"fold": 2}), tmp_path / "toy.h5", tmp_path / "2", tmp_path / "2", "cpu", print, progress=False)


@pytest.fixture(scope="module")
def validated(toys, environment):
    "What one process and two found of the same data, see `toy.validate_toy`"
    for world in (1, 2):
        torchrun = [*TORCHRUN, "--nproc_per_node", str(world), "--master_port", "29411"]
        command = [*torchrun, TOY, "validate", toys / "toy.h5", toys]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((toys / f"scores{world}.json").read_text()) for world in (1, 2)]


def test_each_process_goes_on_with_its_own_sums_and_draws(validated):
    together = validated[1]["together"]
    assert together["sums"] == [[1, 10], [2, 10]] and together["counts"] == [1, 2]
    first, second = together["drawn"]
    assert first != second and together["again"] == together["drawn"]


def test_a_loss_that_learns_weights_sees_float32_in_several_processes(validated):
    together = validated[1]["together"]
    assert together["types"] == ["torch.float32"]
    first, second = together["gradient"]
    assert first == second and any(first)


def test_validation_is_the_same_with_two_processes(validated):
    one, two = validated
    assert one["counts"] == two["counts"] and one["valid_dice"] == two["valid_dice"]
    assert abs(one["loss"] - two["loss"]) < 1e-6


def test_two_processes_train(toys, environment):
    torchrun = [*TORCHRUN, "--nproc_per_node", "2", "--master_port", "29412"]
    command = [*torchrun, TOY, "fit", toys / "toy.h5", toys / "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((toys / "two" / "run.json").read_text())["processes"] == 2
    assert len(pd.read_csv(toys / "two" / "epochs.csv")) == 4


@pytest.fixture
def several(toys, tmp_path):
    "A folder like the project's, whose params.yaml asks for two processes"
    training = {"epochs": 2, "batch_size": 2, "valid_batch_size": 3, "precision": "fp32"}
    training |= {"processes": 2}
    data = {"folder": "raw", "structures": {"disc": 1, "square": 2}, "size": 32}
    toy = {"title": "Toys", "data": data, "model": {"variant": "128s"}, "training": training}
    study = {"datasets": ["toy"], "losses": ["baseline"], "seeds": [0]}
    losses = {"baseline": {"kind": "baseline"}}
    params = {"study": study, "losses": losses, "datasets": {"toy": toy}}
    params["compute"] = {"device": "cpu"}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    shutil.copy(toys / "toy.h5", tmp_path / "data" / "prepared" / "toy.h5")
    return tmp_path


def change_training(folder, **changes):
    params = json.loads((folder / "params.yaml").read_text())
    params["datasets"]["toy"]["training"] |= changes
    (folder / "params.yaml").write_text(json.dumps(params))


def notebook_training(root, folder, environment):
    stage = ["levit-study", "notebook", root / "nbs/study/train.ipynb", folder / "done.ipynb"]
    names = ["-p", "dataset", "toy", "-p", "loss", "baseline", "-p", "seed", "0"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([*stage, *names], cwd=folder, env=environment, **pipes)


def test_the_notebook_trains_in_several_processes(root, several, environment):
    "And shows what they say"
    process = notebook_training(root, several, environment)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]
    run = several / "reports/runs/toy/baseline/seed0"
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    assert len(pd.read_csv(run / "epochs.csv")) == 2
    shown = (several / "done.ipynb").read_text()
    assert "epoch 2/2, train loss" in shown and "error" not in shown.lower()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_slurm_job_without_srun_is_one_training(several, environment, processes):
    "Whatever Slurm's variables say: one process, or as many as params.yaml asks for"
    change_training(several, processes=processes, epochs=1)
    command = ["levit-study", "train", "toy", "baseline"]
    done = subprocess.run(command, cwd=several, env=environment | SLURM | {"WORLD_SIZE": "4"},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((several / "reports/runs/toy/baseline/seed0/run.json").read_text())
    assert record["processes"] == processes


def test_ctrl_c_in_a_training_is_one_line(root, several, environment):
    change_training(several, processes=1, epochs=100_000)
    process = notebook_training(root, several, environment)
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if "epoch 1/100000, train loss" in line: process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert "Traceback" not in "".join(lines) and lines[-1] == "levit-study: stopped"
    assert list((several / "models/toy/baseline/seed0/checkpoints").glob("epoch*.pt"))


def is_kernel(process):
    "Of a notebook; a process that has ended meanwhile is none"
    try: return "ipykernel_launcher" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess): return False


def test_processes_end_with_what_started_them(root, several, environment):
    def training():
        found = psutil.process_iter(["cmdline", "cwd"])
        here = [p for p in found if p.info["cwd"] == str(several)]
        return [p for p in here if "train" in (p.info["cmdline"] or [])]

    change_training(several, epochs=100_000)
    process = notebook_training(root, several, environment)
    kernels = []
    for _ in range(1200):
        if len(training()) >= 3:  # torchrun and its two
            children = psutil.Process(process.pid).children(recursive=True)
            kernels = [p for p in children if is_kernel(p)]
            break
        if process.poll() is not None: break
        time.sleep(0.1)
    assert kernels, "the processes never came up"
    process.kill()
    for kernel in kernels: kernel.kill()
    gone = time.monotonic() + 60
    while training() and time.monotonic() < gone: time.sleep(0.2)
    assert not training()


def test_a_wrong_number_of_processes_is_one_line(several, environment):
    three = {"WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "none"}
    done = subprocess.run(["levit-study", "train", "toy", "baseline"], cwd=several,
                          env=environment | three, capture_output=True, text=True, timeout=120)
    message = "processes = 2, but 3 processes were started; make them equal"
    assert done.returncode == 1 and done.stderr.strip().endswith(message)


STATEFUL = [
    {"kind": "tvmf_dice"},
    {"kind": "dice_weighted", "of": {"kind": "cross_entropy"}},
    {"kind": "uncertainty_weighted", "terms": [{"kind": "cross_entropy"}, {"kind": "dice"}]},
]


@pytest.mark.parametrize("settings", STATEFUL, ids=lambda s: s["kind"])
def test_a_loss_with_state_resumes(toys, tmp_path, settings):
    def stop(line):
        if "epoch 2/" in line: os.kill(os.getpid(), signal.SIGTERM)
    run = toy_run(epochs=3).model_copy(update={"loss": settings["kind"], "loss_settings": settings})
    def train(name, say=lambda line: None):
        folder = tmp_path / name
        return fit(run, toys / "toy.h5", folder, folder, "cpu", say, progress=False)
    train("whole")
    with pytest.raises(Stopped): train("stopped", stop)
    train("stopped")
    same(tmp_path / "whole", tmp_path / "stopped")


OTHER = [
    Model(network="unet", settings={"widths": [4, 8, 16]}),
    Model(network="monai.networks.nets.AttentionUnet",
          settings={"spatial_dims": 2, "channels": [4, 8], "strides": [2]}),
]


@pytest.mark.parametrize("about", OTHER, ids=lambda about: about.network)
def test_another_network_trains_resumes_and_predicts(toys, tmp_path, about):
    def stop(line):
        if "epoch 1/" in line: os.kill(os.getpid(), signal.SIGTERM)
    run = toy_run(epochs=2).model_copy(update={"model": about})
    def train(name, say=lambda line: None):
        return fit(run, toys / "toy.h5", tmp_path / name, tmp_path / name, "cpu", say, progress=False)
    train("whole")
    with pytest.raises(Stopped): train("stopped", stop)
    train("stopped")
    same(tmp_path / "whole", tmp_path / "stopped")
    network = load_network(tmp_path / "whole/best.safetensors", device="cpu")
    assert network.card["network"] == about.network and network.card["settings"] == about.settings
    labels = predict_volume(network, np.random.default_rng(0).random((2, 40, 50)))
    assert labels.shape == (2, 40, 50)
    pair = [tmp_path / name / "best.safetensors" for name in ("whole", "stopped")]
    assert load_ensemble(pair, device="cpu").card["members"][0]["network"] == about.network


def test_older_records_mean_the_same_network():
    run = toy_run()
    assert "network" not in run.record()["model"] and "settings" not in run.record()["model"]


def drawn_on(root, room):
    "The rooms that a room's module imports"
    path = root / "levit_study" / f"{room.replace('.', '/')}.py"
    package = ["levit_study", *room.split(".")][:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*package[:len(package) - node.level + 1], *node.module.split(".")]
            yield ".".join(parts[1:])


def test_what_decides_a_training_draws_on_nothing_that_is_not_counted(root):
    "Beside files, what checks, picks and fills in settings, which count themselves, and what only identifies and records"
    losses = {"losses.paper", "losses.more", "losses.adaptive"}
    counted = set(TRAINING) | losses
    others = {other for room in TRAINING for other in drawn_on(root, room)} - counted
    assert others == {"files", "params", "settings", "kinds", "networks", "training.identity", "training.record"}


@pytest.mark.parametrize("kind", ["baseline", "focal", "focal_tversky"])
def test_a_training_depends_on_its_own_loss_alone(kind):
    code = training_code(build_loss(kind))
    assert "losses.paper" in code and not {"losses.more", "losses.adaptive"} & set(code)


def test_a_loss_counts_with_its_bases_and_parts():
    weighted = build_loss("dice_weighted", of={"kind": "dice_focal"})
    assert {"losses.paper", "losses.more", "losses.adaptive"} <= set(training_code(weighted))
