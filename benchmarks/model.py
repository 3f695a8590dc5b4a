"""Compare this study's LeViT-UNet with the public code, and both with what the machine can do.

    python benchmarks/model.py FOLDER [--variants 128s 384] [--tasks train infer] [--batch 8]
        [--turns 3] [--threads 2] [--size 224] [--device cpu] [--output bench_public.csv]

FOLDER is a copy of the public code, https://github.com/apple1986/LeViT-UNet. Images per second are
measured in alternating turns. A ratio is the median over the turns of the public code's time to the
mode's time in the same turn, in wall-clock and in processor time (which a busy machine distorts
less). The ceiling is the rate at which the machine does the decoder's convolutions, in the mode's
precision; `share` is what the mode reaches of it, `work` its multiply-adds per image in 10^9.
"""
import argparse
import sys
import time
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from record_parity import public_model, seeded_model

from levit_study.bench import bench_network, bench_step, write_bench
from levit_study.machine import timed
from levit_study.model.build import keep_memory
from levit_study.model.drawing import outline
from levit_study.model.pretrained import public_state

PUBLISHED = ("public code", "fp32 eager")  # in the published order of operations


def ceiling(precision, channels=256, side=56, batch=4, repeats=5, device="cpu"):
    "Multiply-adds per second, in 10^9, of a 3x3 convolution of the decoder, channels last"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images, weight = torch.randn(batch, channels, side, side), torch.randn(channels, channels, 3, 3)
    form = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    images, weight = (x.to(**form) for x in (images, weight))

    def convolve():
        for _ in range(turns): F.conv2d(images, weight, padding=1)

    turns = 20 if device == "cuda" else 1  # one is over before the next is launched
    with torch.inference_mode():
        seconds = min(timed(convolve, device) for _ in range(repeats)) / turns
    return 9 * channels**2 * side**2 * batch / seconds / 1e9


def giga_work(model, exact, training):
    "Multiply-adds of an image, in 10^9, in the published order of operations or the cheaper one"
    model.exact = exact
    return outline(model).multiply_adds.iloc[-1] / 1e9 * (3 if training else 1)


def take_turns(steps, turns, device):
    "Time the steps in alternating turns: wall-clock and processor time, a row per turn"
    wall, processor = [], []
    for _ in range(turns):
        wall.append({})
        processor.append({})
        for mode, step in steps.items():
            keep_memory(mode not in PUBLISHED)  # those two as they run by themselves
            start = time.process_time()
            wall[-1][mode] = timed(step, device)
            processor[-1][mode] = time.process_time() - start
    return pd.DataFrame(wall), pd.DataFrame(processor)


def compare(args, variant, task):
    "Return one row per mode"
    training = task == "train"
    model = seeded_model(variant, args.size).eval()
    public = public_model(args.folder, variant, args.size)
    public.load_state_dict(public_state(model))
    model, public = model.to(args.device), public.to(args.device)
    networks = {mode: bench_network(model, mode, training) for mode in args.modes}
    networks = {"public code": (public.train(training), "fp32")} | networks
    images = torch.randn(args.batch, 1, args.size, args.size, device=args.device)
    steps = {mode: bench_step(*network, training, images) for mode, network in networks.items()}
    for step in steps.values():
        step()
    wall, processor = take_turns(steps, args.turns, args.device)
    most_of, rows = {}, []
    for _, precision in networks.values():
        most_of[precision] = ceiling(precision, device=args.device)
    for mode, (_, precision) in networks.items():
        work = giga_work(model, mode in PUBLISHED, training)
        rate, most = args.batch / wall[mode].median(), most_of[precision]
        rows.append({
            "variant": variant, "task": task, "mode": mode, "images_per_second": rate,
            "ratio": (wall["public code"] / wall[mode]).median(),
            "processor_ratio": (processor["public code"] / processor[mode]).median(),
            "work": work, "ceiling": most, "share": rate * work / most,
        })
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--variants", nargs="+", default=["128s", "384"])
    parser.add_argument("--tasks", nargs="+", default=["train", "infer"])
    parser.add_argument("--modes", nargs="+", default=["fp32 eager", "fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="bench_public.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for variant in args.variants:
        for task in args.tasks:
            latest = compare(args, variant, task)
            rows += latest
            about = {"device": args.device, "batch": args.batch, "image_size": args.size}
            write_bench(pd.DataFrame(rows), args.output, **about)
            print(pd.DataFrame(latest).round(2).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
