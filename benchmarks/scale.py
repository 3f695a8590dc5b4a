"""What a study of 750 trainings costs the pipeline: 10 losses x 5 seeds x 5 folds x 3 data sets.

    python benchmarks/scale.py [--losses 10] [--seeds 5] [--folds 5] [--datasets 3]

The results are made up, in a clone that is thrown away; nothing is trained. Processor seconds are
those of the command and its children; wall seconds depend on what else runs.
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
# dvc commit rewrites dvc.lock for each stage; here all are written at once, to get there in minutes
COMMIT = """
import sys
from dvc.cli import main
from dvc.dvcfile import Lockfile
write, kept = Lockfile.dump_stages, {}
def keep(lock, stages, **rest): kept.setdefault(lock.path, [lock]).extend(stages)
Lockfile.dump_stages = keep
code = main(["commit", "-f", "-q", *sys.argv[1:]])
for lock, *stages in kept.values(): write(lock, stages)
sys.exit(code)
"""
PLACE = "${item.dataset}/${item.loss}/seed${item.seed}/${item.fold}"


def run(folder, *command, check=True):
    "Run a command in the clone; return its processor and wall seconds and what it printed"
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"cwd": folder, "capture_output": True, "text": True}
    settings["env"] = {**os.environ, "PYTHONPATH": str(folder), "PATH": programs}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, **settings)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    if check and done.returncode: raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return used, wall, done.stdout + done.stderr


def enlarge(folder, a):
    "Set params.yaml to the large study; return the trainings' folders"
    yaml = YAML()
    content = yaml.load((folder / "params.yaml").read_text())
    study = content["study"]
    study["datasets"] = list(DATASETS[:a.datasets])
    study["losses"] = list(content["losses"])[:a.losses]
    study["seeds"], study["folds"] = list(range(a.seeds)), [f"fold{k}" for k in range(a.folds)]
    with open(folder / "params.yaml", "w") as file: yaml.dump(content, file)
    return [f"{d}/{loss}/seed{s}/{fold}" for d in study["datasets"] for loss in study["losses"]
            for s in study["seeds"] for fold in study["folds"]]


def outputs_of(folder):
    "Return the outputs of a training and its evaluation, with PLACE for the run's folder"
    stages = YAML().load((folder / "dvc.yaml").read_text())["stages"]
    entries = [entry for name in ("train", "evaluate") for key in ("outs", "plots")
               for entry in stages[name].get(key, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def invent(folder, cells):
    "Write every output of every training and evaluation; return how many files these are"
    outputs = outputs_of(folder)
    paths = [out.replace(PLACE, cell) for cell in cells for out in outputs]
    for dataset in sorted({cell.split("/")[0] for cell in cells}):
        (folder / "data/raw" / dataset).mkdir(parents=True, exist_ok=True)
        names = ("manifest.json", "splits.csv", "prepare.ipynb")
        paths += [f"reports/data/{dataset}/{name}" for name in names]
        paths.append(f"data/prepared/{dataset}.h5")
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)  # each with a content of its own
    return len(paths)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, number in {"losses": 10, "seeds": 5, "folds": 5, "datasets": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "study")
        clone = ["git", "clone", "-q", str(ROOT), str(folder)]
        subprocess.run(clone, check=True)
        (folder / "dvc.lock").unlink(missing_ok=True)
        shutil.copy2(ROOT / "dvc.yaml", folder / "dvc.yaml")
        cells = enlarge(folder, parser.parse_args())
        run(folder, "levit-study", "code", "build/code")
        print(f"{len(cells)} trainings, {invent(folder, cells)} files of results", flush=True)
        made = ["code", "prepare", "train", "evaluate"]
        one = "train@" + cells[0].replace("/seed", "-").replace("/", "-")
        run(folder, sys.executable, "-c", COMMIT, *made)
        commands = {
            "dvc commit of one training": ["commit", "-f", "-q", one],
            "dvc status": ["status", *made],
            "dvc repro --dry": ["repro", "--dry", *made],
            "dvc repro --dry of one training": ["repro", "--dry", "--single-item", one],
        }
        for name, command in commands.items():
            used, wall, text = run(folder, sys.executable, "-m", "dvc", *command, check=False)
            last = text.strip().splitlines()[-1][:60] if text.strip() else ""
            print(f"{name}: {used:.0f} s of processor time, {wall:.0f} s ({last})", flush=True)
        size = (folder / "dvc.lock").stat().st_size
        print(f"dvc.lock: {size / 2**20:.1f} MiB")


if __name__ == "__main__": main()
