"""Training in several processes against one: images per second at the same slices per step, in alternating turns.

    python benchmarks/processes.py [--processes 2] [--variant 128s] [--size 160] [--batch 8] [--turns 2] [--output bench_processes.csv]

A synthetic cardiac MRI is made and prepared in a temporary folder; each turn is `levit-study train` as a user starts it, two epochs, of which the second
counts. `efficiency` is the ratio of the rates: 1 where the processes share one machine's cores without loss, `--processes` at best where each has a device
of its own.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from levit_study.data.prepare import prepare
from levit_study.bench import machine
from levit_study.files import written_whole
from levit_study.params import load_params
from levit_study.data.phantom import make_phantom


def project(folder, args):
    "Prepare the scans; return a function that trains once and gives images per second"
    settings = load_params(Path(__file__).parents[1] / "params.yaml").datasets["phantom_mr"].model_dump(mode="json")
    settings["data"] |= {"folder": str(folder / "raw"), "size": args.size}
    settings["model"]["variant"] = args.variant
    make_phantom(folder / "raw", "mr", cases=args.cases, shape=(10, 128, 128))

    def train(processes):
        settings["training"] |= {"epochs": 2, "batch_size": args.batch // processes, "processes": processes}
        content = {"study": {"datasets": ["phantom_mr"], "losses": ["baseline"], "seeds": [0]}, "losses": {"baseline": {"kind": "baseline"}},
                   "datasets": {"phantom_mr": settings}}
        (folder / "params.yaml").write_text(json.dumps(content))
        store = folder / "data" / "prepared" / "phantom_mr.h5"
        if not store.exists(): prepare(load_params(folder / "params.yaml").datasets["phantom_mr"].data, store, folder / "manifest.json", progress=False)
        subprocess.run(["rm", "-rf", "models", "reports"], cwd=folder, check=True)
        subprocess.run([str(Path(sys.executable).with_name("levit-study")), "train", "phantom_mr", "baseline"], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
        return pd.read_csv(folder / "reports/runs/phantom_mr/baseline/seed0/epochs.csv").images_per_second.iloc[-1]

    return train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--variant", default="128s")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8, help="slices per step, all processes together")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--output", default="bench_processes.csv")
    args = parser.parse_args()
    if args.batch % args.processes: parser.error(f"--batch {args.batch} cannot be shared evenly by {args.processes} processes")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        train = project(Path(folder), args)
        for turn in range(args.turns):
            rows.append({"one": train(1), "several": train(args.processes)})
            print(f"turn {turn + 1} of {args.turns}: {rows[-1]['one']:.1f} images/s in one process, {rows[-1]['several']:.1f} in {args.processes}",
                  file=sys.stderr, flush=True)
    table = pd.DataFrame(rows)
    table = table.assign(efficiency=table.several / table.one, processes=args.processes, variant=args.variant, size=args.size, batch=args.batch, **machine())
    with written_whole(args.output) as partial: table.to_csv(partial, index=False, float_format="%.4g")
    print(f"efficiency {table.efficiency.median():.2f} ({table.efficiency.min():.2f} to {table.efficiency.max():.2f})")


if __name__ == "__main__": main()
