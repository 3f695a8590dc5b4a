"""An epoch of training and validation: this study beside the recipe that is widely copied.

    python benchmarks/training.py ACDC --public FOLDER [--variants 128s 384] [--steps 4] [--turns 3]
        [--device cpu] [--output bench_training.csv]

ACDC is a folder with SSL4MIS's HDF5 files; it is prepared once into a temporary store. FOLDER is a
copy of the public code, https://github.com/apple1986/LeViT-UNet. The copied recipe: each slice is
read, turned and zoomed with SciPy, the public model in float32, cross-entropy + Dice on one-hot
masks, validation slice by slice with MedPy's Dice and HD95 per volume. The two take turns; steps
are measured and multiplied up to the epoch. `data` is the share of this study's step that reading
and augmenting a batch takes; `bare` its whole step's images per second over those of the bare model
(forward, cross-entropy, backward, Adam).
"""
import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from record_parity import public_model

from levit_study.data.augment import augment
from levit_study.data.dataset import PreparedStore, SliceSet
from levit_study.data.prepare import prepare
from levit_study.bench import bench_network, bench_step, write_bench
from levit_study.machine import timed
from levit_study.model.build import keep_memory, levit_unet
from levit_study.model.precision import autocast_precision
from levit_study.params import Data, load_params, pick_run
from levit_study.training.fit import close_epoch, train_epoch
from levit_study.training.state import make_trainer
from levit_study.training.device import make_fabric

SIZE, BATCH = 224, 8
PARAMS = Path(__file__).parents[1] / "params.yaml"


def read_pair(path):
    "Read image and label of an HDF5 file"
    with h5py.File(path) as file:
        return file["image"][:], file["label"][:]


def copied_sample(path, random):
    "Read, turn or rotate, zoom"
    image, label = read_pair(path)
    if random.random() < 0.5:
        turns, axis = random.integers(4), random.integers(2)
        image, label = (np.flip(np.rot90(x, turns), axis).copy() for x in (image, label))
    elif random.random() < 0.5:
        angle = random.integers(-20, 20)
        image, label = (
            ndimage.rotate(x, angle, order=0, reshape=False) for x in (image, label))
    scale = SIZE / image.shape[0], SIZE / image.shape[1]
    return ndimage.zoom(image, scale, order=3), ndimage.zoom(label, scale, order=0)


def copied_loss(logits, labels, classes):
    "Half cross-entropy, half soft Dice over one-hot masks"
    probabilities, dice = logits.softmax(1), 0
    for value in range(classes):
        p, mask = probabilities[:, value], (labels == value).float()
        overlap, total = 2 * (p * mask).sum(), (p * p).sum() + (mask * mask).sum()
        dice = dice + 1 - (overlap + 1e-5) / (total + 1e-5)
    return 0.5 * F.cross_entropy(logits, labels) + 0.5 * dice / classes


class Copied:
    "The recipe that is widely copied"
    def __init__(self, args, variant, slices, volumes):
        self.device, raw = args.device, args.acdc
        self.model = with_four_classes(public_model(args.public, variant, SIZE)).to(self.device)
        self.random = np.random.default_rng(0)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.raw, self.slices, self.volumes = raw, slices, volumes

    def train(self, steps):
        self.model.train()
        for _ in range(steps):
            names = self.random.choice(self.slices, BATCH)
            pairs = [copied_sample(self.raw / f"data/{name}.h5", self.random) for name in names]
            stacks = (torch.from_numpy(np.stack(x)) for x in zip(*pairs))
            images, labels = (stack.to(self.device) for stack in stacks)
            loss = copied_loss(self.model(images[:, None].float()), labels.long(), 4)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()

    @torch.no_grad()
    def validate(self, count):
        from medpy.metric.binary import dc, hd95

        self.model.eval()
        for name in self.volumes[:count]:
            image, label = read_pair(self.raw / f"data/{name}.h5")
            prediction = np.stack([self.predict(plane) for plane in image])
            for value in range(1, 4):
                a, b = prediction == value, label == value
                if a.any() and b.any():
                    dc(a, b)
                    hd95(a, b)

    def predict(self, plane):
        "Label map of a slice"
        height, width = plane.shape
        small = ndimage.zoom(plane, (SIZE / height, SIZE / width), order=0)
        logits = self.model(torch.from_numpy(small)[None, None].float().to(self.device))
        classes = logits.softmax(1).argmax(1)[0].cpu().numpy()
        return ndimage.zoom(classes, (height / SIZE, width / SIZE), order=0)


def with_four_classes(model):
    "Replace the head, which is made for Synapse"
    head = model.segmentation_head[0]
    model.segmentation_head[0] = torch.nn.Conv2d(
        head.in_channels, 4, head.kernel_size, padding=head.padding)
    return model


class Ours:
    "This study's training"
    def __init__(self, variant, store, device):
        run = pick_run(load_params(PARAMS), "acdc", "baseline", 0)
        model = run.model.model_copy(update={"variant": variant})
        run = run.model_copy(update={"model": model})
        self.run, self.store, fabric = run, store, make_fabric(run.training, device)
        self.trainer = make_trainer(run, fabric, store.num_classes, store.voxel_shares("train"))
        self.training, self.valid = (store.load(part).to(device) for part in ("train", "valid"))
        self.watch = argparse.Namespace(step_done=lambda slices: False)

    def train(self, steps):
        self.trainer.step = 0
        part, whole = slice(0, steps * BATCH), self.training
        few = SliceSet(self.store, whole.indices[part], whole.images[part], whole.labels[part])
        train_epoch(self.trainer, few, self.watch, Path())
        self.trainer.epoch += 1

    def validate(self):
        self.trainer.spent = 1.0
        close_epoch(self.trainer, self.training, self.valid, self.store.structures)

    def data(self, steps):
        for step in range(steps):
            index = torch.randint(len(self.training), (BATCH,))
            images, labels = self.training.batch(index, self.trainer.fabric.device)
            augment(images, labels, self.run.training.augmentation, 0, step, index)


def take_turns(args, copied, ours, bare, volumes):
    "Seconds of each part, in turns of which the first is not counted: a row per turn"
    turns, clock = [], partial(timed, device=args.device)
    for turn in range(args.turns + 1):
        seconds = {}
        keep_memory(False)  # as the system does by default, for the code that does not ask for more
        seconds["copied step"] = clock(lambda: copied.train(args.steps)) / args.steps
        seconds["copied validation"] = clock(lambda: copied.validate(2)) / 2 * len(volumes)
        keep_memory()
        seconds["step"] = clock(lambda: ours.train(args.steps)) / args.steps
        seconds["validation"] = clock(ours.validate)
        seconds["data"] = clock(lambda: ours.data(args.steps)) / args.steps
        seconds["bare step"] = clock(lambda: [bare() for _ in range(args.steps)]) / args.steps
        turns.append(seconds)
        parts = ", ".join(f"{part} {value:.3f} s" for part, value in seconds.items())
        print(f"turn {turn} of {args.turns}: {parts}", file=sys.stderr, flush=True)
    return pd.DataFrame(turns[1:])


def compare(args, variant, store, slices, volumes):
    "One row per variant"
    copied, ours = Copied(args, variant, slices, volumes), Ours(variant, store, args.device)
    model = levit_unet(variant, 4).to(args.device).eval()
    network = bench_network(model, autocast_precision(args.device), True)
    bare = bench_step(*network, True, torch.randn(BATCH, 1, SIZE, SIZE, device=args.device))
    print(variant, file=sys.stderr)
    table, steps = take_turns(args, copied, ours, bare, volumes), len(slices) / BATCH
    epoch = table["step"] * steps + table["validation"]
    copied_epoch = table["copied step"] * steps + table["copied validation"]
    return {
        "variant": variant,
        "copied_epoch_s": copied_epoch.median(),
        "epoch_s": epoch.median(),
        "ratio": (copied_epoch / epoch).median(),
        "images_per_second": BATCH / table["step"].median(),
        "bare": (table["bare step"] / table["step"]).median(),
        "data": (table["data"] / table["step"]).median(),
        "validation_s": table["validation"].median(),
        "validation": (table["validation"] / epoch).median(),
        "copied_validation_s": table["copied validation"].median(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("acdc", type=Path)
    parser.add_argument("--public", required=True)
    parser.add_argument("--variants", nargs="+", default=["128s", "384"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", default="bench_training.csv")
    args = parser.parse_args()
    slices = (args.acdc / "train_slices.list").read_text().split()
    volumes = (args.acdc / "val.list").read_text().split()
    with tempfile.TemporaryDirectory() as folder:
        data = load_params(PARAMS).datasets["acdc"].data
        data = Data(**data.model_dump() | {"folder": str(args.acdc), "size": SIZE})
        prepare(data, Path(folder, "acdc.h5"), Path(folder, "manifest.json"))
        store, rows = PreparedStore(Path(folder, "acdc.h5")), []
        for variant in args.variants:
            rows.append(compare(args, variant, store, slices, volumes))
            write_bench(pd.DataFrame(rows), args.output, args.device, batch=BATCH, size=SIZE)
    print(pd.DataFrame(rows).round(3).T.to_string(header=False))


if __name__ == "__main__":
    main()
