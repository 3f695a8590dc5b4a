"""A step of training must not wait for a GPU. No GPU is needed to see whether it would: the step runs on torch's device without numbers, `meta`, where each
read of a number and each copy that blocks is counted, and answered so that the step goes on."""
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import toy_run, toy_store

from levit_study.data.dataset import PreparedStore
from levit_study.files import StudyError
from levit_study.losses import build_loss
from levit_study.losses.comparison import LabelCheck
from levit_study.params import load_params
from levit_study.training import fit as loop
from levit_study.training.scores import validate
from levit_study.training.state import MovingAverage, _make_optimiser, make_trainer, unwrapped
from levit_study.training.device import make_fabric

PARAMS = Path(__file__).with_name("params.yaml")   # params.yaml as it is shipped

SIZED = "nonzero", "masked_select", "bincount", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive"  # results as large as the numbers say
READS = "_local_scalar_dense", "is_nonzero", "equal"
MAKERS = torch.as_tensor, torch.tensor, torch.asarray, torch.Tensor.new_tensor  # they copy to a device out of sight of the mode below
INDEXING = torch.Tensor.__getitem__, torch.Tensor.__setitem__  # and so does this with a list


def on_device(values): return any(isinstance(each, torch.Tensor) and each.is_meta for each in values)


class Waits(TorchDispatchMode):
    "Where the code in this block would wait for its device, and how often: `module:line operation`"
    def __init__(self):
        super().__init__()
        self.places, outer = Counter(), self

        class Copies(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                before = outer.places.total()
                if function in INDEXING and on_device(args[:1]) and isinstance(args[1], list | np.ndarray): outer.count("index copied there")
                result = function(*args, **(kwargs or {}))
                if function in MAKERS and result.is_meta and not on_device(args[-1:]) and outer.places.total() == before: outer.count("copy there")
                return result
        self.copies = Copies()

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def count(self, what):
        frame = sys._getframe()
        while frame.f_back and "/levit_study/" not in frame.f_code.co_filename: frame = frame.f_back
        self.places[f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}: {what}"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.removeprefix("aten::")
        if on_device(args[:1]) and name in READS:
            self.count("read")
            return True if args[0].dtype == torch.bool else 0
        if on_device(args[:1]) and name in SIZED:
            self.count(name)
            return args[0].new_zeros((args[2:] or [kwargs.get("minlength", 0)])[0], dtype=torch.int64)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and on_device(args[:1]):
            indices = [each for each in args[1] if each is not None]
            if any(each.dtype == torch.bool for each in indices): self.count("mask")
            if any(not each.is_meta for each in indices): self.count("index copied there")
        if name == "_to_copy":
            here, target = args[0].is_meta, kwargs.get("device")
            if target is not None and here != (torch.device(target).type == "meta"):
                if not kwargs.get("non_blocking"): self.count("copy here" if here else "copy there")
                if here: return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and args[0].is_meta != args[1].is_meta and not (kwargs.get("non_blocking") or args[2:] and args[2]):
            self.count("copy")
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.h5"
    toy_store(path)
    return PreparedStore(path)


@pytest.fixture
def unread(monkeypatch):
    "Labels are checked as on a GPU, by copies that nobody waits for, and here never arrive; there is no autocast for `meta`"
    monkeypatch.setattr(LabelCheck, "on_gpu", staticmethod(lambda labels: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: False))
    monkeypatch.setattr(torch, "autocast", lambda *about, **more: nullcontext())


def away(run, store):
    "A trainer and its slices on the device without numbers"
    device = torch.device("meta")
    t = make_trainer(run, make_fabric(run.training, "cpu"), store.num_classes, store.voxel_shares("train"))
    t.model, t.criterion = unwrapped(t.model).to(device), t.criterion.to(device)
    t.optimiser = _make_optimiser([{"params": list(t.model.parameters())}], run.training, fused=False)
    t.average.module.to(device)
    def clipped(model, optimiser, max_norm, error_if_nonfinite): return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    t.fabric = SimpleNamespace(device=device, world_size=1, global_rank=0, no_backward_sync=lambda *about, **more: nullcontext(),
                               backward=lambda loss: loss.backward(), clip_gradients=clipped, all_reduce=lambda value, reduce_op: value)
    return t, store.load("train", context=run.data.context).to(device)


def epoch(t, slices):
    "Where an epoch waits"
    t.step, watch = 0, SimpleNamespace(step_done=lambda count: False)
    with Waits() as waits: assert loop.train_epoch(t, slices, watch, Path())
    t.epoch += 1
    return waits.places


@pytest.mark.parametrize("loss", ["baseline", "focal", "focal_tversky"])
@pytest.mark.parametrize("context, changes", [(0, {"augmentation": "transunet"}), (1, {"augmentation": "strong", "clip_norm": 1.0})])
def test_a_step_waits_for_nothing(store, unread, loss, context, changes):
    run = toy_run(loss, batch_size=8, **changes)  # an epoch is a step of two batches
    t, slices = away(run.model_copy(update={"data": run.data.model_copy(update={"context": context})}), store)
    epoch(t, slices)  # what is made once and kept is made now
    assert epoch(t, slices) == {"fit.look: copy here": 1}  # at the epoch's end, for all its losses


@pytest.mark.parametrize("name", load_params(PARAMS).losses)
def test_a_loss_waits_for_nothing(unread, name):
    settings = load_params(PARAMS).losses[name]
    criterion = build_loss(**{key: value for key, value in settings.items() if key != "training"})
    criterion.set_class_frequency(torch.tensor([0.8, 0.1, 0.1]))
    criterion.update_from_training(torch.tensor([0.9, 0.5, 0.2]))
    criterion.to("meta")
    logits, labels = torch.zeros(2, 3, 8, 8, device="meta", requires_grad=True), torch.zeros(2, 8, 8, dtype=torch.long, device="meta")
    with Waits(): criterion(logits, labels)  # judges the first batch's labels
    with Waits() as waits: criterion(logits, labels).backward()
    on_processor = {"boundary.distance_maps: copy here": 1, "boundary.distance_maps: copy there": 1}  # scipy's distances
    assert waits.places == (on_processor if "boundary" in name else {})


def test_validation_waits_at_its_end(store, unread):
    t, slices = away(toy_run(), store)
    about = t.fabric, t.model, t.criterion, slices, 3, 4
    with Waits(): validate(*about)
    with Waits() as waits: validate(*about)
    assert waits.places == {"scores.validate: read": 1}


@pytest.mark.parametrize("code", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x[[0, 1]], lambda x: x.cpu(), lambda x: torch.bincount(x.long()),
                                  lambda x: torch.as_tensor(3, device=x.device), lambda x: torch.as_tensor([3], device=x.device),
                                  lambda x: torch.ones(3).to(x.device), lambda x: x[torch.tensor(1, device=x.device)]])
def test_waits_are_seen(code):
    with Waits() as waits:
        try: code(torch.ones(4, device="meta"))
        except (NotImplementedError, RuntimeError): pass  # what needs its numbers to go on
    assert waits.places.total() >= 1


class Later(loop.Finite):
    "As on a GPU"
    def __init__(self, *about):
        super().__init__(*about)
        self.at_once = False


def test_a_loss_read_later_is_the_one_found_at_once(store, tmp_path, monkeypatch):
    wild, said = toy_run(learning_rate=1e18, optimiser="sgd", warmup_epochs=0), []
    for finite in (loop.Finite, Later):
        monkeypatch.setattr(loop, "Finite", finite)
        with pytest.raises(StudyError, match="the loss is .* in epoch 1, step") as caught:
            loop.fit(wild, store.path, tmp_path, tmp_path, "cpu", lambda line: None, progress=False)
        said.append(str(caught.value))
        batch, = tmp_path.glob("not_finite*.npz")
        said.append(batch.read_bytes())
        batch.unlink()
        assert not [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.safetensors")]
    assert said[:2] == said[2:]


def test_the_first_value_that_is_not_finite_counts(store, tmp_path):
    run = toy_run()
    t = make_trainer(run, make_fabric(run.training, "cpu"), 3, store.voxel_shares("train"))
    finite = Later(t, store.load("train"), torch.arange(16).split(2), tmp_path)
    finite.look()
    finite.see_loss(6, torch.tensor(torch.nan), None)
    with pytest.raises(StudyError, match="the loss is nan in epoch 1, step 3"): finite.look()
    finite.see_norm(5, torch.tensor(torch.inf))
    with pytest.raises(StudyError, match="norm is inf in epoch 1, step 2, though the loss is finite"): finite.look()


def test_weights_are_averaged_as_torch_does():
    def update(averaged, current, steps):
        get_ema_multi_avg_fn(min(0.9, (1 + float(steps)) / (10 + float(steps))))(averaged, current, steps)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    ours, torchs = MovingAverage(model, 0.9), AveragedModel(model, multi_avg_fn=update)
    for _ in range(100):
        for parameter in model.parameters(): parameter.data += torch.randn_like(parameter)
        model(torch.randn(5, 3))
        for average in (ours, torchs): average.update_parameters(model)
    for name, value in torchs.state_dict().items(): assert torch.equal(ours.state_dict()[name], value)
