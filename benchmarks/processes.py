"""Training in several processes against one: images per second at the same slices per step.

    python benchmarks/processes.py [--processes 2] [--variant 128s] [--size 160] [--batch 8]
                                   [--turns 2] [--output bench_processes.csv]

A synthetic cardiac MRI is made and prepared in a temporary folder. Each turn is `levit-study train`
as a user starts it, two epochs, of which the second counts; one process and several alternate.
`efficiency` is the ratio of the rates: 1 where the processes share one machine's cores without
loss, `--processes` at best where each has a device of its own.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from levit_study.bench import machine
from levit_study.data.phantom import make_phantom
from levit_study.data.prepare import prepare
from levit_study.files import run_folders, written_whole
from levit_study.params import load_params

PARAMS = Path(__file__).parents[1] / "params.yaml"
TRAIN = [str(Path(sys.executable).with_name("levit-study")), "train", "phantom_mr", "baseline"]


def write_params(folder, args, processes):
    "Write the params.yaml of a project with one run"
    settings = load_params(PARAMS).datasets["phantom_mr"].model_dump(mode="json")
    settings["data"] |= {"folder": str(folder / "raw"), "size": args.size}
    settings["model"]["variant"] = args.variant
    batch_size = args.batch // processes
    settings["training"] |= {"epochs": 2, "batch_size": batch_size, "processes": processes}
    study = {"datasets": ["phantom_mr"], "losses": ["baseline"], "seeds": [0]}
    losses = {"baseline": {"kind": "baseline"}}
    content = {"study": study, "losses": losses, "datasets": {"phantom_mr": settings}}
    (folder / "params.yaml").write_text(json.dumps(content))


def make_project(folder, args):
    "Make a project with prepared scans"
    make_phantom(folder / "raw", "mr", cases=args.cases, shape=(10, 128, 128))
    write_params(folder, args, 1)
    (folder / "dvc.yaml").touch()
    data = load_params(folder / "params.yaml").datasets["phantom_mr"].data
    store = folder / "data" / "prepared" / "phantom_mr.h5"
    prepare(data, store, folder / "manifest.json", progress=False)


def rate(folder, args, processes):
    "Train once; return images per second of the second epoch"
    write_params(folder, args, processes)
    reports, models = run_folders("phantom_mr", "baseline", 0, folder)
    for path in (reports, models): shutil.rmtree(path, ignore_errors=True)
    silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    subprocess.run(TRAIN, cwd=folder, check=True, env=os.environ, **silent)
    return pd.read_csv(reports / "epochs.csv").images_per_second.iloc[-1]


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--variant", default="128s")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8, help="slices per step, all processes")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", default="bench_processes.csv")
    args = parser.parse_args()
    if args.batch % args.processes:
        parser.error(f"--batch {args.batch} is not a multiple of --processes {args.processes}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_project(folder, args)
        for turn in range(args.turns):
            one, several = rate(folder, args, 1), rate(folder, args, args.processes)
            rows.append({"one": one, "several": several})
            rates = f"{one:.1f} images/s in one process, {several:.1f} in {args.processes}"
            print(f"turn {turn + 1} of {args.turns}: {rates}", file=sys.stderr, flush=True)
    table = pd.DataFrame(rows).assign(processes=args.processes, variant=args.variant)
    table = table.assign(size=args.size, batch=args.batch, **machine())
    table.insert(2, "efficiency", table.several / table.one)
    with written_whole(args.output) as partial:
        table.to_csv(partial, index=False, float_format="%.4g")
    ratio = table.efficiency
    print(f"efficiency {ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})")


if __name__ == "__main__": main()
