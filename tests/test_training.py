"""What a training must survive: being killed at any moment, damaged checkpoints, several processes."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
from safetensors.torch import load_file
from toy import toy_run, toy_store

from levit_study.training.record import Stopped
from levit_study.training.fit import fit

TOY = Path(__file__).with_name("toy.py")
TIMES = ["seconds", "images_per_second"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    "The store, and a run that nothing interrupted"
    folder = tmp_path_factory.mktemp("toy")
    toy_store(folder / "toy.h5")
    started = time.monotonic()
    subprocess.run([sys.executable, TOY, "fit", folder / "toy.h5", folder / "whole"], env=environment, check=True, capture_output=True, timeout=300)
    (folder / "duration.json").write_text(json.dumps(time.monotonic() - started))
    return folder


def same(a, b):
    "Raise unless two runs have the same course and the same weights, to the bit"
    pd.testing.assert_frame_equal(*(pd.read_csv(f / "epochs.csv").drop(columns=TIMES) for f in (a, b)), check_exact=True)
    left, right = (load_file(f / "best.safetensors") for f in (a, b))
    assert left.keys() == right.keys() and all((left[k] == right[k]).all() for k in left)


def start(folder, name, environment):
    return subprocess.Popen([sys.executable, TOY, "fit", folder / "toy.h5", folder / name], env=environment, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_killed_runs_end_with_the_same_result(whole, environment, kind):
    name, moment, within, deadline = f"killed{kind}", random.Random(int(kind)), 0, time.monotonic() + 240
    seconds = json.loads((whole / "duration.json").read_text())
    for kills in range(20):
        process = start(whole, name, environment)
        try: process.wait(moment.uniform(0, seconds) if kills < 4 or not within else 240)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            process.wait(60)
            within += any((whole / name).rglob("*.pt"))  # killed while it trained, not while it started
        else:
            assert process.returncode == 0
            if within: break
            shutil.rmtree(whole / name)  # it ended before it could be killed: once more
        assert time.monotonic() < deadline
    assert within, "no kill hit the training"
    same(whole / "whole", whole / name)


def test_a_damaged_checkpoint_falls_back(whole, environment, tmp_path):
    def stop_late(said):
        if "epoch 3/" in said: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped): fit(toy_run(), whole / "toy.h5", tmp_path, tmp_path, device="cpu", progress=False, say=stop_late)
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    said = []
    fit(toy_run(), whole / "toy.h5", tmp_path, tmp_path, device="cpu", progress=False, say=said.append)
    assert any("damaged" in line for line in said) and any("going on from epoch 4" in line for line in said)
    epochs = pd.read_csv(tmp_path / "epochs.csv")
    assert list(epochs.epoch) == [1, 2, 3, 4]


def test_a_first_training_goes_on_where_dvc_took_its_best_weights_away(whole, tmp_path):
    "`dvc exp run` begins with taking away the outputs that no run has recorded yet"
    def stop_late(said):
        if "epoch 3/" in said: os.kill(os.getpid(), signal.SIGTERM)
    train = lambda name, say: fit(toy_run(), whole / "toy.h5", tmp_path / name, tmp_path / name, device="cpu", progress=False, say=say)
    with pytest.raises(Stopped): train("untouched", stop_late)
    shutil.copytree(tmp_path / "untouched", tmp_path / "taken")
    (tmp_path / "taken" / "best.safetensors").unlink()
    for name in ("untouched", "taken"):
        train(name, (said := []).append)
        assert any("going on from epoch 4" in line for line in said), said
    same(tmp_path / "untouched", tmp_path / "taken")


def test_validation_is_the_same_with_two_processes(whole, environment):
    for world in (1, 2):
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", "29411", TOY, "validate",
                        whole / "toy.h5", whole],
                       env=environment, check=True, capture_output=True, timeout=300)
    one, two = (json.loads((whole / f"scores{world}.json").read_text()) for world in (1, 2))
    assert one["counts"] == two["counts"] and abs(one["loss"] - two["loss"]) < 1e-6 and one["valid_dice"] == two["valid_dice"]


def test_two_processes_train(whole, environment):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29412", TOY, "fit", whole / "toy.h5",
                           whole / "two"],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((whole / "two" / "run.json").read_text())["processes"] == 2 and len(pd.read_csv(whole / "two" / "epochs.csv")) == 4


@pytest.fixture
def several(whole, tmp_path):
    "A folder like the project's, whose params.yaml asks for two processes"
    training = {"epochs": 2, "batch_size": 2, "precision": "fp32", "valid_batch_size": 3, "processes": 2}
    params = {"study": {"datasets": ["toy"], "losses": ["baseline"], "seeds": [0]}, "losses": {"baseline": {"kind": "baseline"}},
              "datasets": {"toy": {"title": "Toys", "data": {"folder": "raw", "structures": {"disc": 1, "square": 2}, "size": 32},
                                   "model": {"variant": "128s"}, "training": training}}, "compute": {"device": "cpu"}}
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    (tmp_path / "data" / "prepared").mkdir(parents=True)
    shutil.copy(whole / "toy.h5", tmp_path / "data" / "prepared" / "toy.h5")
    return tmp_path


def notebook_training(root, folder, environment):
    command = ["levit-study", "notebook", root / "nbs/study/train.ipynb", folder / "done.ipynb", "-p", "dataset", "toy", "-p", "loss", "baseline"]
    return subprocess.Popen([*command, "-p", "seed", "0"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_notebook_trains_in_several_processes_and_shows_what_they_say(root, several, environment):
    process = notebook_training(root, several, environment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    run = several / "reports/runs/toy/baseline/seed0"
    assert json.loads((run / "run.json").read_text())["processes"] == 2 and len(pd.read_csv(run / "epochs.csv")) == 2
    shown = (several / "done.ipynb").read_text()
    assert "epoch 2/2, train loss" in shown and "error" not in shown.lower()


def is_kernel(process):
    "Of a notebook; asked of a process that has ended meanwhile, such as a shell's short-lived child, it is none"
    try: return "ipykernel_launcher" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess): return False


def test_processes_end_with_what_started_them(root, several, environment):
    mine = lambda: [p for p in psutil.process_iter(["cmdline", "cwd"]) if p.info["cwd"] == str(several) and "train" in (p.info["cmdline"] or [])]
    endless = json.loads((several / "params.yaml").read_text())
    endless["datasets"]["toy"]["training"]["epochs"] = 100_000
    (several / "params.yaml").write_text(json.dumps(endless))
    process = notebook_training(root, several, environment)
    kernels = []
    for _ in range(1200):
        if len(mine()) >= 3: kernels = [p for p in psutil.Process(process.pid).children(recursive=True) if is_kernel(p)]; break   # torchrun and its two
        if process.poll() is not None: break
        time.sleep(0.1)
    assert kernels, "the processes never came up"
    process.kill()
    for kernel in kernels: kernel.kill()
    gone = time.monotonic() + 60
    while mine() and time.monotonic() < gone: time.sleep(0.2)
    assert not mine()


def test_a_wrong_number_of_processes_is_one_line(several, environment):
    done = subprocess.run(["levit-study", "train", "toy", "baseline"], cwd=several, env={**environment, "WORLD_SIZE": "3"}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 1 and done.stderr.strip().endswith("processes = 2, but 3 processes were started; make them equal")



STATEFUL = [{"kind": "tvmf_dice"}, {"kind": "dice_weighted", "of": {"kind": "cross_entropy"}},
            {"kind": "uncertainty_weighted", "terms": [{"kind": "cross_entropy"}, {"kind": "dice"}]}]


@pytest.mark.parametrize("settings", STATEFUL, ids=lambda s: s["kind"])
def test_a_loss_with_state_resumes(whole, tmp_path, settings):
    def stop(said):
        if "epoch 2/" in said: os.kill(os.getpid(), signal.SIGTERM)
    run = toy_run(epochs=3).model_copy(update={"loss": settings["kind"], "loss_settings": settings})
    train = lambda name, say=lambda s: None: fit(run, whole / "toy.h5", tmp_path / name, tmp_path / name, device="cpu", progress=False, say=say)
    train("whole")
    with pytest.raises(Stopped): train("stopped", stop)
    train("stopped")
    same(tmp_path / "whole", tmp_path / "stopped")
