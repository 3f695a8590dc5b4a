"""A prepared store of bright discs and squares, and runs on it, alone or under torchrun.

    python toy.py fit|validate STORE FOLDER
"""
import json
import sys
from pathlib import Path

import h5py
import numpy as np


def toy_store(path, cases=6, slices=4, size=32):
    "Discs (1) and squares (2) on noise; the last two cases are for validation"
    rng, (row, column) = np.random.default_rng(0), np.mgrid[:size, :size]
    label = np.zeros((cases * slices, size, size), np.uint8)
    for plane in label:
        r, c = rng.integers(8, size - 8, 2)
        plane[(row - r) ** 2 + (column - c) ** 2 < 30] = 1
        r, c = rng.integers(4, size - 8, 2)
        plane[r:r + 6, c:c + 6] = 2
    noise = 0.05 * rng.standard_normal(label.shape)
    image = (np.array([0.2, 0.5, 0.8])[label] + noise).clip(0, 1)
    with h5py.File(path, "w") as f:
        f["slices/image"], f["slices/label"] = (255 * image).astype(np.uint8), label
        f["slices/case"] = np.repeat(np.arange(cases), slices)
        f["slices/slice"] = np.tile(np.arange(slices), cases)
        f["slices/voxels"] = np.stack([np.bincount(plane.ravel(), minlength=3) for plane in label])
        f["cases/name"] = [f"toy{k}".encode() for k in range(cases)]
        f["cases/split"] = [b"train"] * (cases - 2) + [b"valid"] * 2
        f["warnings/case"], f["warnings/text"] = [b""], [b""]
        structures = json.dumps({"disc": 1, "square": 2})
        f.attrs.update(format=1, size=size, structures=structures, manifest="toy")


def toy_run(loss="baseline", **training):
    "A short run with drop path, averaged weights and accumulation, so that all state counts"
    from levit_study.params import Data, Model, Run, Training
    settings = {"epochs": 4, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-3,
                "precision": "fp32", "ema": 0.9, "schedule": "cosine",
                "warmup_epochs": 1, "foreground": 0.5, **training}
    return Run(
        dataset="toy", loss=loss, seed=0,
        data=Data(folder="", structures={"disc": 1, "square": 2}, size=32),
        model=Model(variant="128s", drop_path=0.2),
        training=Training(**settings),
        loss_settings={"kind": loss},
    )


def validate_toy(store, folder):
    "Validate untrained weights in as many processes as there are"
    from levit_study.data.dataset import PreparedStore
    from levit_study.training.fit import share_buffers
    from levit_study.training.scores import mean_scores, validate
    from levit_study.training.state import make_trainer
    from levit_study.training.device import make_fabric
    run = toy_run()
    fabric, data = make_fabric(run.training, "cpu"), PreparedStore(store)
    t = make_trainer(run, fabric, data.num_classes, data.voxel_shares("train"))
    for buffer in t.weights.buffers():  # training leaves each process with statistics of its own
        if buffer.is_floating_point(): buffer += 0.5 * fabric.global_rank
    share_buffers(fabric, t.weights)
    # three batches: one of two processes has one more
    loss, counts = validate(
        fabric, t.weights, t.plain_criterion, data.load("valid"), data.num_classes, 3)
    scores = {"loss": loss, "counts": counts.tolist(), **mean_scores(counts, data.structures)}
    if fabric.world_size > 1: scores["together"] = train_together(t, Path(folder, "together"))
    if fabric.is_global_zero:
        Path(folder, f"scores{fabric.world_size}.json").write_text(json.dumps(scores))


def train_together(t, folder):
    "What each of several processes draws, finds in a checkpoint, and hands to a loss that learns weights"
    import torch
    from levit_study.training.checkpoint import _restore, load_checkpoint, save_state
    from levit_study.training.state import make_trainer
    from levit_study.training.device import make_fabric
    fabric, rank = t.fabric, t.fabric.global_rank
    t.sums = torch.tensor([1.0 + rank, 10.0], dtype=torch.float64)
    t.counts = torch.full((3, 3), 1 + rank)
    save_state(t, folder)
    drawn = torch.rand(1)
    t.sums = t.counts = None
    _restore(t, load_checkpoint(folder / "checkpoints"))
    again = torch.rand(1)
    settings = {"kind": "uncertainty_weighted", "terms": [{"kind": "cross_entropy"}, {"kind": "dice"}]}
    learning = toy_run(precision="bf16").model_copy(update={"loss_settings": settings})
    mixed = make_trainer(learning, make_fabric(learning.training, "cpu"), 3, [0.8, 0.1, 0.1])
    types = []
    mixed.plain_criterion.register_forward_pre_hook(lambda module, given: types.append(str(given[0].dtype)))
    logits = mixed.model(torch.rand(2, 1, 32, 32) + rank)
    mixed.fabric.backward(mixed.criterion(logits, torch.randint(3, (2, 32, 32))))
    gradient = mixed.plain_criterion.log_variance.grad
    each = [t.sums, t.counts[0, 0], drawn, again, gradient]
    names = "sums", "counts", "drawn", "again", "gradient"
    return {name: fabric.all_gather(value).tolist() for name, value in zip(names, each)} | {"types": types}


def main(action, store, folder):
    import torch
    from levit_study.training import checkpoint
    from levit_study.training.fit import fit
    torch.set_num_threads(1)
    checkpoint._EVERY = 0  # each epoch: else it would be over before the first one
    if action == "fit": fit(toy_run(), store, folder, folder, device="cpu", progress=False)
    else: validate_toy(store, folder)


if __name__ == "__main__": main(*sys.argv[1:])
