"""Time and memory of the losses against MONAI's: python benchmarks/losses.py [--device cuda] [--repeats 11]"""
import argparse

from levit_study.bench import bench_losses

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
parser.add_argument("--repeats", type=int, default=11, help="alternating runs, of which the median counts")
arguments = parser.parse_args()
print(bench_losses(repeats=arguments.repeats, device=arguments.device).round(2).to_string(index=False))
