"""Small things to train, and what the tests of training share."""

import csv
import os

import numpy as np
import torch as th
from helpers import make_diffusion, set_golden_weights

from improved_diffusion.fp16_util import convert_module_to_bf16, convert_module_to_f16
from improved_diffusion.gaussian_diffusion import LossType, ModelVarType
from improved_diffusion.logs import logger
from improved_diffusion.nn import timestep_embedding
from improved_diffusion.training import checkpointer
from improved_diffusion.training.loop import TrainLoop
from improved_diffusion.unet import UNetModel

PRECISIONS = ("fp32", "bf16", "fp16")
# Of a parameter that the loss does not depend on, Adam divides rounding noise by its own size. A larger epsilon keeps
# that still, so that two ways of computing the same can be compared.
STEADY = dict(adam_eps=1e-4)


def into(folder):
    logger.configure(dir=str(folder), format_strs=["csv", "log"])


class Data:
    """Batch k is a function of k."""

    def __init__(self, batch_size=4, classes=None, side=8):
        self.batch_size, self.classes, self.side, self.step = batch_size, classes, side, 0

    def seek(self, step):
        self.step = step

    def __next__(self):
        rng = np.random.RandomState(self.step)
        self.step += 1
        batch = th.from_numpy(rng.uniform(-1, 1, (self.batch_size, 3, self.side, self.side)).astype(np.float32))
        kwargs = {"y": th.from_numpy(rng.randint(0, self.classes, self.batch_size))} if self.classes else {}
        return batch, kwargs


class SmallModel(th.nn.Module):
    """As little of a network as has a torso in 16 bits, dropout, timesteps and classes."""

    def __init__(self, width=16, dropout=0.0, num_classes=None):
        super().__init__()
        self.width = width
        self.time_embed = th.nn.Linear(width, width)
        self.label_emb = th.nn.Embedding(num_classes, width) if num_classes else None
        self.torso = th.nn.ModuleList([th.nn.Conv2d(3, width, 3, padding=1), th.nn.Conv2d(width, width, 3, padding=1)])
        self.dropout = th.nn.Dropout(dropout)
        self.out = th.nn.Conv2d(width, 6, 1)

    def forward(self, x, timesteps, y=None):
        emb = self.time_embed(timestep_embedding(timesteps, self.width))
        if y is not None:
            emb = emb + self.label_emb(y)
        h = self.torso[0](x.type(self.torso[0].weight.dtype))
        h = th.nn.functional.silu(h + emb.type(h.dtype)[:, :, None, None])
        return self.out(th.nn.functional.silu(self.torso[1](self.dropout(h))).float())

    def convert_to_fp16(self):
        self.torso.apply(convert_module_to_f16)

    def convert_to_bf16(self):
        self.torso.apply(convert_module_to_bf16)


def small_model(**kwargs):
    return set_golden_weights(SmallModel(**kwargs))


def small_unet(**kwargs):
    return set_golden_weights(UNetModel(3, 32, 6, 1, (1,), channel_mult=(1,), **kwargs))


def small_diffusion(T=20):
    return make_diffusion(T, var=ModelVarType.LEARNED_RANGE, loss=LossType.RESCALED_MSE)


def make_loop(model=None, **kwargs):
    """As in a process of its own, which may write over what another has saved."""
    checkpointer._owners.clear()
    arguments = dict(
        model=model or small_model(), diffusion=small_diffusion(), data=Data(), batch_size=4, microbatch=-1, lr=1e-3,
        ema_rate="0.9", log_interval=1, save_interval=1000, resume_checkpoint="", max_steps=4, seed=0,
    )  # fmt: skip
    return TrainLoop(**{**arguments, **kwargs})


def finished(**kwargs):
    loop = make_loop(**kwargs)
    loop.run_loop()
    return loop


def log_rows(folder):
    with open(folder / "progress.csv", newline="") as f:
        return list(csv.DictReader(f))


def load(path):
    return th.load(path, weights_only=True)


def assert_same(one, other, path=""):
    """Bit for bit, through dicts and lists."""
    assert type(one) is type(other), path
    if isinstance(one, th.Tensor):
        assert one.dtype == other.dtype and th.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other)):
            assert_same(a, b, f"{path}/{i}")
    else:
        assert one == other, path


def assert_sets_equal(folder, other, step):
    """All files of a step are the same in two folders."""
    names = [f"model{step:06d}.pt", f"opt{step:06d}.pt"]
    names += [name for name in os.listdir(folder) if name.startswith("ema_") and name.endswith(f"{step:06d}.pt")]
    assert len(names) > 2
    for name in names:
        assert_same(load(folder / name), load(other / name), name)


def parameters(model):
    return th.cat([p.detach().float().flatten() for p in model.parameters()])


def parameters_of(loop):
    """The master parameters of a run, flat."""
    return th.cat([p.detach().flatten() for p in loop.master_params])
