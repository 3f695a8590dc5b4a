"""Compare this study's LeViT-UNet with the public code: images per second in alternating turns, and how far each is from what the machine can do.

    python benchmarks/model.py FOLDER [--variants 128s 384] [--tasks train infer] [--batch 8] [--turns 3] [--threads 2] [--output bench_public.csv]

FOLDER is a copy of the public code, https://github.com/apple1986/LeViT-UNet. A ratio is the median over the turns of the public code's time to the
mode's time in the same turn, in wall-clock and in processor time (which a busy machine distorts less). The ceiling is the rate at which the machine
does the decoder's own convolutions, in the mode's precision; `share` is what the mode reaches of it, `work` its multiply-adds per image in 10^9.
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

from levit_study.machine import timed
from levit_study.model.weights import public_state
from levit_study.model.build import keep_memory
from levit_study.model.drawing import outline
from levit_study.bench import bench_network, bench_step, machine
from levit_study.files import written_whole


def ceiling(dtype, channels=256, side=56, batch=4, repeats=5):
    "Multiply-adds per second, in 10^9, of a 3x3 convolution of the decoder, channels last"
    images, weight = torch.randn(batch, channels, side, side), torch.randn(channels, channels, 3, 3)
    images, weight = (x.to(dtype).to(memory_format=torch.channels_last) for x in (images, weight))
    with torch.inference_mode(): seconds = min(timed(lambda: F.conv2d(images, weight, padding=1)) for _ in range(repeats))
    return 9 * channels**2 * side**2 * batch / seconds / 1e9


def compare(folder, variant, task, modes, batch, turns):
    "Yield one row per mode"
    training = task == "train"
    model = seeded_model(variant, 224).eval()
    public = public_model(folder, variant, 224)
    public.load_state_dict(public_state(model))
    networks = {"public code": (public.train(training), "fp32")} | {mode: bench_network(model, mode, training) for mode in modes}
    images = torch.randn(batch, 1, 224, 224)
    steps = {mode: bench_step(network, precision, training, images) for mode, (network, precision) in networks.items()}
    for step in steps.values(): step()
    wall, processor = [], []
    for _ in range(turns):
        wall.append({}), processor.append({})
        for mode, step in steps.items():
            keep_memory(mode not in ("public code", "fp32 eager"))  # those two as they run by themselves
            start = time.process_time()
            wall[-1][mode] = timed(step)
            processor[-1][mode] = time.process_time() - start
    wall, processor, work = pd.DataFrame(wall), pd.DataFrame(processor), {}
    for exact in (True, False):
        model.exact = exact
        work[exact] = outline(model).multiply_adds.iloc[-1] / 1e9 * (3 if training else 1)
    for mode, (_, precision) in networks.items():
        giga = work[mode in ("public code", "fp32 eager")]
        rate, most = batch / wall[mode].median(), ceiling(torch.bfloat16 if precision == "bf16" else torch.float32)
        yield dict(variant=variant, task=task, mode=mode, images_per_second=rate, ratio=(wall["public code"] / wall[mode]).median(),
                   processor_ratio=(processor["public code"] / processor[mode]).median(), work=giga, ceiling=most, share=rate * giga / most)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--variants", nargs="+", default=["128s", "384"])
    parser.add_argument("--tasks", nargs="+", default=["train", "infer"])
    parser.add_argument("--modes", nargs="+", default=["fp32 eager", "fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default="bench_public.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for variant in args.variants:
        for task in args.tasks:
            rows += compare(args.folder, variant, task, args.modes, args.batch, args.turns)
            table = pd.DataFrame(rows).assign(batch=args.batch, **machine())
            with written_whole(args.output) as partial: table.to_csv(partial, index=False, float_format="%.4g")
            print(table.iloc[-len(args.modes) - 1:, :9].round(2).to_string(index=False, header=len(rows) <= len(args.modes) + 1), flush=True)
