"""Where a step's time goes, by kind of operation: why the model is not faster than it is.

    python benchmarks/time_by_kind.py [--variants 128s 384] [--tasks train infer] [--batch 8] [--size 224] [--output bench_kinds.csv]

The study's default path on this machine (`bf16` where it pays), measured with torch's profiler. Convolutions and products multiply; everything else moves
memory. `rate` is what the whole step multiplies and adds per second, in 10^9; `limit` what the machine's best convolution does in that precision.
"""
import argparse
from collections import Counter

import pandas as pd
import torch
from model import ceiling

from levit_study.model.build import autocast_precision, levit_unet
from levit_study.model.drawing import outline
from levit_study.bench import bench_network, bench_step, machine
from levit_study.files import written_whole

KINDS = {
    "convolutions": ("convolution", "conv2d"),
    "matrix products (resizing, attention)": ("mm", "bmm", "linear", "matmul"),
    "batch norm": ("batch_norm",),
    "upsampling": ("upsample",),
    "optimiser": ("adam",),
}


def kind_of(name):
    "The kind of an operation by its name; whatever does not multiply moves memory"
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "element-wise passes, joins and copies")


def profile(variant, task, batch, size, repeats=4):
    "Milliseconds per step by kind, and the multiply-adds of a step in 10^9"
    training, precision = task == "train", autocast_precision()
    model = levit_unet(variant, 9, image_size=size).eval()
    step = bench_step(*bench_network(model, precision, training), training, torch.randn(batch, 1, size, size))
    for _ in range(2): step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats): step()
    times = Counter()
    for event in profiler.key_averages(): times[kind_of(event.key)] += event.self_cpu_time_total / repeats / 1000
    model.exact = False
    return times, outline(model).multiply_adds.iloc[-1] / 1e9 * batch * (3 if training else 1), precision


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["128s", "384"])
    parser.add_argument("--tasks", nargs="+", default=["train", "infer"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--output", default="bench_kinds.csv")
    args = parser.parse_args()
    rows = []
    for variant in args.variants:
        for task in args.tasks:
            times, work, precision = profile(variant, task, args.batch, args.size)
            total = sum(times.values())
            most = ceiling(torch.bfloat16 if precision == "bf16" else torch.float32)
            rows += [{"variant": variant, "task": task, "precision": precision, "kind": kind, "ms": ms, "share": ms / total}
                     for kind, ms in times.most_common()]
            rows.append({"variant": variant, "task": task, "precision": precision, "kind": "whole step", "ms": total, "share": 1.0,
                         "rate": work / total * 1000, "limit": most})
    table = pd.DataFrame(rows)
    with written_whole(args.output) as partial: table.assign(batch=args.batch, size=args.size, **machine()).to_csv(partial, index=False, float_format="%.4g")
    print(table.round(2).to_string(index=False, na_rep=""))


if __name__ == "__main__": main()
