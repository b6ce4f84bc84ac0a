"""Tiny feature networks, fixed random linear maps of the pixels, as TorchScript and as exported programs. They are
trusted, as after --trust_features."""

import warnings

import numpy as np
import torch as th
import torch.nn.functional as F

from improved_diffusion.evaluation.trust import trust
from improved_diffusion.utils import files

GRID = 4  # images are averaged to as many squares a side, so that programs take any size
CLASSES = 5


class Linear(th.nn.Module):
    """uint8 [N, 3, H, W] -> features [N, width], or a dict of them with spatial [N, 16] and logits [N, 5]."""

    def __init__(self, width=6, spatial=False, logits=False, seed=0):
        super().__init__()
        weights = np.random.default_rng(seed).normal(size=(3 * GRID * GRID, width + CLASSES)) / 50
        self.register_buffer("weights", th.from_numpy(weights.astype(np.float32)))
        self.width, self.spatial, self.logits = width, spatial, logits

    def forward(self, x):
        squares = F.adaptive_avg_pool2d(x.float(), (4, 4))
        found = squares.flatten(1) @ self.weights
        out = {"features": found[:, : self.width]}
        if self.spatial:
            out["spatial"] = squares[:, 0].flatten(1)
        if self.logits:
            out["logits"] = found[:, self.width :] / 10
        return out


class Features(Linear):
    """Like Linear, but a tensor alone: the features, or the logits."""

    def __init__(self, width=6, spatial=False, logits=False, seed=0):
        super().__init__(width, spatial, logits, seed)
        self.start, self.stop = (width, width + CLASSES) if logits else (0, width)

    def forward(self, x):
        found = F.adaptive_avg_pool2d(x.float(), (4, 4)).flatten(1) @ self.weights
        return found[:, self.start : self.stop]


class Detector(Linear):
    """Called as the public Inception file is: class probabilities, or features where told."""

    def forward(self, img, return_features: bool = False, no_output_bias: bool = False):
        found = F.adaptive_avg_pool2d(img.float(), (4, 4)).flatten(1) @ self.weights
        if return_features:
            return found[:, : self.width]
        bias = 0.0 if no_output_bias else 1.0
        logits = found[:, self.width :] / 10
        return th.softmax(logits + bias * th.arange(5, device=logits.device), dim=1)


def _module(width, spatial, logits, seed, detector=False, only_logits=False):
    if detector:
        return Detector(width, seed=seed).eval()
    if spatial or (logits and not only_logits):
        return Linear(width, spatial, logits, seed).eval()
    return Features(width, logits=only_logits, seed=seed).eval()


def write_script(path, width=6, spatial=False, logits=False, seed=0, detector=False, only_logits=False):
    """Write TorchScript that takes images of any size, and return its path.

    :param detector: of the form of the public Inception file. :param only_logits: a program for --logits.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is on its way out
        module = _module(width, spatial, logits, seed, detector, only_logits)
        if detector:
            th.jit.script(module).save(str(path))
        else:
            th.jit.trace(module, th.zeros(2, 3, 8, 8, dtype=th.uint8), strict=False).save(str(path))
    return trusted(path)


def write_program(path, side, width=6, spatial=False, logits=False, seed=0, only_logits=False):
    """Write an exported program that takes any number of images of side x side, and return its path."""
    export_module(path, _module(width, spatial, logits, seed, only_logits=only_logits), side)
    return str(path)


def export_module(path, module, side, batch=None, channels=3, dtype=th.uint8):
    """Write any module as an exported program. :param batch: the only number of images that it takes, None: any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        shapes = ({0: th.export.Dim("batch", min=1, max=1024)} if batch is None else None,)
        example = (th.zeros(batch or 2, channels, side, side, dtype=dtype),)
        th.export.save(th.export.export(module, example, dynamic_shapes=shapes), str(path))
    return trusted(path)


def trusted(path):
    """The path of a program, whose content may run from now on."""
    trust(files.sha256(path), path)
    return str(path)
