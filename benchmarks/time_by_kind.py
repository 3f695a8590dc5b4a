"""Where a step's time goes, by kind of operation: why the model is not faster than it is.

    python benchmarks/time_by_kind.py [--variants 128s 384] [--tasks train infer] [--batch 8]
        [--size 224] [--device cpu] [--output bench_kinds.csv]

The study's default path on this machine (`bf16` where it pays), measured with torch's profiler.
Convolutions and products multiply; everything else moves memory. `rate` is what the whole step
multiplies and adds per second, in 10^9; `limit` what the machine's best convolution does in that
precision.
"""
import argparse
from collections import Counter

import pandas as pd
import torch
from model import ceiling, giga_work

from levit_study.bench import bench_network, bench_step, write_bench
from levit_study.model.build import levit_unet
from levit_study.model.precision import autocast_precision

OPERATIONS = {  # parts of the names of torch's operations; whatever does not multiply moves memory
    "convolutions": ("convolution", "conv2d"),
    "matrix products (resizing, attention)": ("mm", "bmm", "linear", "matmul"),
    "batch norm": ("batch_norm",),
    "upsampling": ("upsample",),
    "optimiser": ("adam",),
    "element-wise passes, joins and copies": ("",),
}


def operation(name):
    "Return which of `OPERATIONS` torch's operation of that name is"
    name = name.lower()
    return next(label for label, parts in OPERATIONS.items() if any(part in name for part in parts))


def profile(variant, task, batch, size, device="cpu", repeats=4):
    "Milliseconds per step by kind of operation, the step's multiply-adds in 10^9, the precision"
    training, precision = task == "train", autocast_precision(device)
    model = levit_unet(variant, 9, image_size=size).to(device).eval()
    network = bench_network(model, precision, training)
    step = bench_step(*network, training, torch.randn(batch, 1, size, size, device=device))
    for _ in range(2):
        step()
    activities = [getattr(torch.profiler.ProfilerActivity, device.upper())]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
        if device == "cuda": torch.cuda.synchronize()
    times = Counter()
    for event in profiler.key_averages():
        spent = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        times[operation(event.key)] += spent / repeats / 1000
    return times, giga_work(model, False, training) * batch, precision


def measure(variant, task, batch, size, device):
    "Return the rows of one variant and task"
    times, work, precision = profile(variant, task, batch, size, device)
    total, row = sum(times.values()), {"variant": variant, "task": task, "precision": precision}
    parts = [{"kind": label, "ms": ms, "share": ms / total} for label, ms in times.most_common()]
    rate, limit = work / total * 1000, ceiling(precision, device=device)
    whole = {"kind": "whole step", "ms": total, "share": 1.0, "rate": rate, "limit": limit}
    return [row | part for part in [*parts, whole]]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["128s", "384"])
    parser.add_argument("--tasks", nargs="+", default=["train", "infer"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="bench_kinds.csv")
    args = parser.parse_args()
    rows = []
    for variant in args.variants:
        for task in args.tasks:
            rows += measure(variant, task, args.batch, args.size, args.device)
    table = pd.DataFrame(rows)
    write_bench(table, args.output, args.device, batch=args.batch, size=args.size)
    print(table.round(2).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
