"""A step that a GPU repeats from a record must learn what the step itself would. No GPU is needed to see that: here the record holds the operations of a step
with the tensors they read and write, as a CUDA graph does, and repeats those alone; no line of Python runs again."""
import copy
from types import SimpleNamespace

import pytest
import torch
from toy import toy_run, toy_store
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from levit_study.data.dataset import PreparedStore
from levit_study.losses.comparison import LabelCheck
from levit_study.params import load_params
from levit_study.training import fit as loop
from levit_study.training import step
from levit_study.training.scores import _counts_class_by_class, dice_from_counts
from levit_study.training.state import make_trainer, unwrapped
from levit_study.training.device import make_fabric
from levit_study.training.step import GraphedSteps

PARAMS = load_params(__file__.replace("test_graphs.py", "params.yaml"))


class Record(TorchDispatchMode):
    "Records operations; repeats them on the same tensors"
    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        assert function._schema.name != "aten::_local_scalar_dense", "a recorded step reads no number"
        self.done.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def repeat(self):
        for function, args, kwargs, results in self.done:
            for before, now in zip(*map(tree_leaves, (results, function(*args, **kwargs))), strict=True):
                if torch.is_tensor(before) and before.untyped_storage()._cdata != now.untyped_storage()._cdata: before.copy_(now)


def recorder(t):
    "As `_record`: a record of a step, which leaves everything as it was"
    def record(work):
        state = t.sums, t.counts, *unwrapped(t.model).state_dict().values(), *t.plain_criterion.state_dict().values()
        moments = [value for of_one in t.optimiser.state.values() for value in of_one.values()]
        kept = [(tensor, tensor.clone()) for tensor in [*state, *moments]]
        with torch.random.fork_rng([]), Record() as record: work()
        with torch.no_grad():
            for tensor, value in kept: tensor.copy_(value)
        t.records += 1
        return record.repeat
    t.records = 0
    return record


def learnt(run, store, graphed):
    "A trainer after two epochs"
    t = make_trainer(run, make_fabric(run.training, "cpu"), store.num_classes, store.voxel_shares("train"))
    for group in t.optimiser.param_groups: group["capturable"] = True  # the learning rate is a tensor
    if graphed: t.graphed = GraphedSteps(recorder(t), aside=lambda work: work(), first=1)
    slices, watch = store.load("train"), SimpleNamespace(step_done=lambda count: False)
    for _ in range(2):
        t.step = 0
        assert loop.train_epoch(t, slices, watch, None)
        t.plain_criterion.update_from_training(torch.as_tensor(dice_from_counts(*t.counts.double())))
        t.epoch += 1
    return t


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.h5"
    toy_store(path)
    return PreparedStore(path)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    "Labels are checked and counted as on a GPU"
    def counts(*maps_and_classes):
        *maps, num_classes = maps_and_classes
        return tuple(each[0] for each in _counts_class_by_class(*(each.reshape(1, -1) for each in maps), num_classes))
    monkeypatch.setattr(step, "overlap_counts", counts)
    monkeypatch.setattr(LabelCheck, "on_gpu", staticmethod(lambda labels: True))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(_get_current_dispatch_mode()))


@pytest.mark.parametrize("name, frozen", [("focal_tversky", 1), ("tvmf_dice", 0), ("uncertainty_weighted", 0)])
def test_a_repeated_step_learns_the_same(store, name, frozen):
    settings = {key: value for key, value in PARAMS.losses[name].items() if key != "training"}
    run = toy_run(batch_size=3, accumulate=1, clip_norm=1.0, ema=0.9, schedule="cosine", precision="fp32", freeze_encoder_epochs=frozen).model_copy(update={"loss_settings": copy.deepcopy(settings)})
    plain, graphed = (learnt(run, store, graphs) for graphs in (False, True))
    for a, b in ((plain.model, graphed.model), (plain.average, graphed.average), (plain.plain_criterion, graphed.plain_criterion)):
        for key, value in a.state_dict().items(): assert torch.equal(value, b.state_dict()[key]), key
    assert torch.equal(plain.sums, graphed.sums) and torch.equal(plain.counts, graphed.counts)
    assert graphed.records == 2
