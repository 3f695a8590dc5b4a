"""Time and memory of the losses against MONAI's.

    python benchmarks/losses.py [--device cuda] [--repeats 11] [--shapes 8x9x224x224 2x14x512x512]
"""
import argparse

from levit_study.bench import bench_losses


def shape(text):
    return tuple(int(side) for side in text.split("x"))


parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--repeats", type=int, default=11, help="turns, of which the median counts")
parser.add_argument("--shapes", nargs="+", type=shape, help="batch x classes x height x width",
                    default=[(8, 9, 224, 224), (2, 14, 512, 512)])
arguments = parser.parse_args()
table = bench_losses(arguments.shapes, repeats=arguments.repeats, device=arguments.device)
print(table.round(2).to_string(index=False))
