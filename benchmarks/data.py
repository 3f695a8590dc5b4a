"""How fast data are prepared, read and augmented.

    python benchmarks/data.py prepare --cases 10 20 40     CT volumes of 512 x 512 x 128, two
                                                           processes: time, memory, growth
    python benchmarks/data.py read                         random slices from a warm store
    python benchmarks/data.py augment                      batched augmentation beside the widely
                                                           copied SciPy way, alternating

Processor time is what other work on the machine disturbs least: all three report it.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from levit_study.data.augment import augment
from levit_study.data.dataset import PreparedStore, SliceSet
from levit_study.data.labels import synapse_structures
from levit_study.data.phantom import make_phantom
from levit_study.data.prepare import prepare
from levit_study.params import Data
from scipy import ndimage


def settings(folder):
    return Data(
        folder=str(folder), structures=synapse_structures, label_map="btcv13",
        intensity="window", window=[-125.0, 275.0],
        split={"kind": "fraction", "valid": 0.2, "test": 0.2},
    )


def copies(source, folder, count):
    """`count` cases that are links to the few in `source`: each is read like any other.

    The preparation sees that they are copies, and keeps those of one scan in one split."""
    made = sorted((source / "RawData/Training/img").iterdir())
    for number in range(count):
        image = made[number % len(made)]
        label = image.parents[1] / "label" / image.name.replace("img", "label")
        for kind, original in (("img", image), ("label", label)):
            target = folder / f"RawData/Training/{kind}/{kind}{number + 1:04d}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(original, target)


class PeakMemory:
    """Largest resident memory of this process's children together, sampled in the block."""
    def __enter__(self):
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.1):
            total = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak = max(self.peak, total)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def processor_seconds():
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bench_prepare(arguments, folder):
    shape = tuple(arguments.shape)
    make_phantom(folder / "made", "ct", cases=arguments.distinct, shape=shape)
    rows, outputs = [], (folder / "out/a.h5", folder / "out/a.json")
    for count in arguments.cases:
        copies(folder / "made", folder / "raw", count)
        started, used = time.perf_counter(), processor_seconds()
        with PeakMemory() as memory:
            record = prepare(settings(folder / "raw"), *outputs, workers=arguments.workers)
        wall, used = time.perf_counter() - started, processor_seconds() - used
        rows.append({
            "cases": count,
            "slices": record["slices"]["all"],
            "wall_s": round(wall, 1),
            "processor_s": round(used, 1),
            "processor_s_per_case": round(used / count, 2),
            "peak_mib_of_processes": round(memory.peak / 2**20),
            "store_mib": round(outputs[0].stat().st_size / 2**20),
        })
        print(rows[-1], flush=True)
        for name in ("raw", "out"):
            shutil.rmtree(folder / name)
    return rows


def bench_read(arguments, folder):
    make_phantom(folder / "raw", "ct", cases=8, shape=(64, 224, 224))
    prepare(settings(folder / "raw"), folder / "a.h5", folder / "a.json", workers=1)
    store, random = PreparedStore(folder / "a.h5"), np.random.default_rng(0)
    rates = []
    for _ in range(arguments.rounds + 1):
        indices = random.integers(0, len(store), 1000)
        rates.append(rate(1000, lambda indices=indices: store.slices(indices)))
    form = "image and label, 224 x 224, random order, one core"
    return {"slices_per_s": round(statistics.median(rates[1:])), "slowest": round(min(rates[1:])),
            "form": form}


def copied(image, label, random, size):
    """A training sample as public code makes it: turned and mirrored or rotated by SciPy,
    then zoomed (image cubic, label nearest)."""
    if random.random() > 0.5:
        turns, axis = random.integers(0, 4), random.integers(0, 2)
        image, label = (np.flip(np.rot90(array, turns), axis).copy() for array in (image, label))
    elif random.random() > 0.5:
        angle = random.integers(-20, 20)
        nearest = {"order": 0, "reshape": False}
        image, label = (ndimage.rotate(array, angle, **nearest) for array in (image, label))
    if image.shape != (size, size):
        factors = [size / length for length in image.shape]
        image, label = ndimage.zoom(image, factors, order=3), ndimage.zoom(label, factors, order=0)
    image, label = image.astype(np.float32), label.astype(np.int64)
    return torch.from_numpy(image)[None], torch.from_numpy(label)


def rate(count, call):
    used = time.process_time()
    call()
    return count / (time.process_time() - used)


def scipy_rate(sources, random, size, count=32):
    """Samples per second of the copied way."""
    images, labels = sources
    def call():
        for number in range(count):
            copied(images[number % 4], labels[number % 4], random, size)
    return rate(count, call)


def batched_rate(recipe, slices, random, batch=8, rounds=20):
    """Samples per second of `augment`."""
    def call():
        for epoch in range(rounds):
            indices = random.integers(0, len(slices), batch)
            augment(*slices.batch(indices), recipe, 0, epoch, indices)
    return rate(batch * rounds, call)


def bench_augment(arguments, folder):
    torch.set_num_threads(1)
    random, size = np.random.default_rng(0), 224
    sources = {}
    for side in (224, 512):
        images = random.random((4, side, side), dtype=np.float32)
        sources[side] = images, random.integers(0, 9, (4, side, side)).astype(np.float32)
    drawn = (torch.randint(0, high, (200, size, size), dtype=torch.uint8) for high in (256, 9))
    slices = SliceSet(None, np.arange(200), *drawn)
    ways = {f"copied_from_{side}": lambda side=side: scipy_rate(sources[side], random, size)
            for side in (512, 224)}
    ways |= {recipe: lambda recipe=recipe: batched_rate(recipe, slices, random)
             for recipe in ("transunet", "strong", "none")}
    rounds = [{name: way() for name, way in ways.items()} for _ in range(arguments.rounds + 1)][1:]
    rates = {name: round(statistics.median(one[name] for one in rounds)) for name in ways}
    times = {}
    for name in ("transunet", "strong"):
        for base in ("copied_from_512", "copied_from_224"):
            ratio = statistics.median(one[name] / one[base] for one in rounds)
            times[f"{name}_vs_{base}"] = round(ratio, 1)
    return {"images_per_s": rates, "times": times, "batch": 8}


def main():
    benches = {"prepare": bench_prepare, "read": bench_read, "augment": bench_augment}
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=list(benches))
    parser.add_argument("--cases", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 512, 512])
    parser.add_argument("--distinct", type=int, default=3,
                        help="synthetic scans that are really made; the cases are links to them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", help="JSON file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = benches[arguments.what](arguments, Path(folder))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output: Path(arguments.output).write_text(text + "\n")


if __name__ == "__main__": main()
