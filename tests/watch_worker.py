"""A loop to hang the hooks of test_validation.py and test_preview.py on, and what each rank does with them:
`watch_worker.py FOLDER`, started under a launcher, writes what this rank got to FOLDER/rankN.pt."""

import contextlib
import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch as th
from dist_worker import make_model

from improved_diffusion import distributed
from improved_diffusion.logs import logger
from improved_diffusion.models.factories import create_gaussian_diffusion
from improved_diffusion.training.preview import PreviewGrid
from improved_diffusion.training.validation import Validation

IMAGES = 7  # no multiple of the ranks


class Loop:
    """What a hook sees of a TrainLoop, around a small class-conditional model with two averages beside it."""

    def __init__(self, microbatch=4, labels=("0.9", "0.99"), model=None, shares=(0.0, 0.0)):
        th.manual_seed(0)
        self.model = model or make_model()
        self.device, self.microbatch = th.device("cpu"), microbatch
        self.absolute_step = 4
        own = list(self.model.parameters())
        self.parameter_sets = {"": own}
        for i, label in enumerate(labels):
            self.parameter_sets[label] = [p.detach() * (1 + 0.2 * (i + 1)) for p in own]
        self.initial_shares = dict(zip(labels, shares))
        self.written = []

    @contextlib.contextmanager
    def using(self, params):
        own = copy.deepcopy(self.model.state_dict())
        for p, value in zip(self.model.parameters(), params):
            p.data.copy_(value)
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(own)
            self.model.train()

    def write_model(self, name, params, metadata):
        self.written.append((name, params, metadata))


class Images(list):
    """Random 8x8 images of three classes, as ImageDataset gives them."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        pixels = rng.integers(0, 256, (count, 3, 8, 8)).astype(np.float32) / 127.5 - 1
        super().__init__((image, {"y": np.array(i % 3, dtype=np.int64)}) for i, image in enumerate(pixels))


def make_diffusion(steps=20):
    return create_gaussian_diffusion(steps=steps, learn_sigma=True, noise_schedule="cosine")


def validated(loop, count=IMAGES, batch_size=2, images=None, **options):
    """What a validation logs."""
    images = Images(IMAGES) if images is None else images
    hook = Validation(make_diffusion(), images, num_images=count, batch_size=batch_size, **options)
    hook(loop)
    return {key: value for key, value in logger.getkvs().items() if key.startswith("val_")}


def previewed(loop, folder, count=IMAGES):
    """The uint8 grids that a preview hands to the trackers; {} but on rank 0."""
    shown = {}
    logger.get_current().output_formats.append(
        SimpleNamespace(writeimage=lambda name, image, step: shown.update({name: image}), close=lambda: None)
    )
    PreviewGrid(make_diffusion(4), (3, 8, 8), count, {"y": th.arange(count) % 3}, str(folder), seed=3)(loop)
    return shown


def main():
    folder = Path(sys.argv[1])
    distributed.setup_dist()
    logger.configure(str(folder), format_strs=[])
    loop = Loop()
    # Of a single image, rank 1 has none.
    result = dict(
        all=validated(loop), one=validated(loop, count=1), best=loop.written[0][2], grids=previewed(loop, folder)
    )
    th.save(result, folder / f"rank{distributed.get_rank()}.pt")


if __name__ == "__main__":
    distributed.run_script(main)
