"""What a study of 750 trainings costs the pipeline: 10 losses x 5 seeds x 5 folds x 3 data sets, with made-up results in a clone that is thrown away.

    python benchmarks/scale.py [--losses 10] [--seeds 5] [--folds 5] [--datasets 3]

Processor seconds are those of the command and its children; wall seconds depend on what else runs. Nothing is trained.
"""
import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ("phantom_ct", "phantom_mr", "acdc", "synapse")


def run(folder, *command, check=True):
    "Run a command in the clone; return its processor and wall seconds and what it printed"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if check and done.returncode: raise SystemExit(f"{' '.join(command)}: {done.stdout[-800:]}{done.stderr[-2000:]}")
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return used, time.perf_counter() - started, done.stdout


def enlarge(folder, a):
    "Set params.yaml to the large study; return what it trains"
    yaml = YAML()
    content = yaml.load((folder / "params.yaml").read_text())
    study = content["study"]
    study.update(datasets=list(DATASETS[:a.datasets]), losses=list(content["losses"])[:a.losses], seeds=list(range(a.seeds)),
                 folds=[f"fold{k}" for k in range(a.folds)])
    with open(folder / "params.yaml", "w") as file: yaml.dump(content, file)
    return [(d, loss, s, f) for d in study["datasets"] for loss in study["losses"] for s in study["seeds"] for f in study["folds"]]


def invent(folder, cells, stages):
    "Write every output of every training and evaluation, each file with a content of its own"
    outputs = 0
    for dataset in {cell[0] for cell in cells}:
        for name in (f"data/prepared/{dataset}.h5", *(f"reports/data/{dataset}/{end}" for end in ("manifest.json", "splits.csv", "prepare.ipynb"))):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        (folder / "data/raw" / dataset).mkdir(parents=True, exist_ok=True)
    for dataset, loss, seed, fold in cells:
        tail = f"{dataset}/{loss}/seed{seed}/{fold}"
        for stage in stages.values():
            for out in stage:
                path = folder / out.replace("TAIL", tail)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{path}\n")
                outputs += 1
    return outputs


def outputs_of(folder):
    "The outputs of train and evaluate, with the run's place as TAIL"
    stages, place = YAML().load((folder / "dvc.yaml").read_text())["stages"], "${item.dataset}/${item.loss}/seed${item.seed}/${item.fold}"
    names = {}
    for stage in ("train", "evaluate"):
        entries = [*stages[stage]["outs"], *stages[stage].get("plots", [])]
        names[stage] = [(e if isinstance(e, str) else next(iter(e))).replace(place, "TAIL") for e in entries]
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("losses", 10), ("seeds", 5), ("folds", 5), ("datasets", 3)): parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "study")
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(folder)], check=True)
        (folder / "dvc.lock").unlink(missing_ok=True)
        shutil.copy2(ROOT / "dvc.yaml", folder / "dvc.yaml")
        cells = enlarge(folder, a)
        print(f"{len(cells)} trainings, {2 * len(cells)} stages of them", flush=True)
        measured = {"levit-study code": run(folder, "levit-study", "code", "build/code")}
        files = invent(folder, cells, outputs_of(folder))
        print(f"{files} files of results, {files / len(cells):.0f} for each training", flush=True)
        commands = {
            "dvc commit (once)": ("commit", "-f", "-q", "code", "prepare", "train", "evaluate"), "dvc status": ("status",),
            "dvc status of one training": ("status", "-".join(map(str, ("train@" + cells[0][0], *cells[0][1:])))), "dvc repro --dry": ("repro", "--dry"),
        }
        for name, command in commands.items():
            measured[name] = run(folder, sys.executable, "-m", "dvc", *command, check=False)
            used, wall, text = measured[name]
            print(f"{name}: {used:.0f} s of processor time, {wall:.0f} s; {len(text.splitlines())} lines", flush=True)
        lock = folder / "dvc.lock"
        if lock.exists(): print(f"dvc.lock: {lock.stat().st_size / 2**20:.1f} MiB, {len(lock.read_text().splitlines())} lines")


if __name__ == "__main__": main()
