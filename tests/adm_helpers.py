"""The networks that the numbers in golden/adm were made with."""

import json
import math
import zlib

import numpy as np
import torch as th
from helpers import GOLDEN

from improved_diffusion.unet import EncoderUNetModel, SuperResModel, UNetModel

ADM = GOLDEN / "adm"
DESCRIBED = json.loads((ADM / "cases.json").read_text())
KINDS = {"unet": UNetModel, "superres": SuperResModel, "encoder": EncoderUNetModel}


def normal(name, shape):
    """The inputs that the vectors were made with, float32: they follow from a name and a shape."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weights(name, shape):
    """The parameter of a network that the vectors were made with."""
    values = normal(name, shape)
    if len(shape) < 2:
        values = values * np.float32(0.1) + np.float32(name.endswith(".weight"))
    else:
        values = values / np.float32(math.sqrt(math.prod(shape[1:])))
    return th.from_numpy(values)


def build(kind, arguments):
    """A network with those weights, in eval mode."""
    network = KINDS[kind](**arguments)
    network.load_state_dict({name: weights(name, tuple(t.shape)) for name, t in network.state_dict().items()})
    return network.eval()
