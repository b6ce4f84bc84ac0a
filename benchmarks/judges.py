"""What the benchmarks judge images by: features and classes of a network trained on real images, and whole sets of
samples drawn by any sampler."""

import argparse
from pathlib import Path

import numpy as np
import torch as th
from torch import nn

from improved_diffusion import distributed
from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.cli.parsing import parse_options
from improved_diffusion.config import (
    DiffusionConfig,
    GuidanceConfig,
    ModelConfig,
    RunConfig,
    SampleConfig,
    SamplerConfig,
    height_width,
)
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images, read_classes
from improved_diffusion.logs.progress import Progress
from improved_diffusion.sampling.guided import guide, prepare_model
from improved_diffusion.sampling.sampler import build_sampler
from improved_diffusion.sampling.writer import last_images
from improved_diffusion.utils.images import from_uint8, to_uint8

GROUPS = (SampleConfig, SamplerConfig, GuidanceConfig, ModelConfig, DiffusionConfig, RunConfig)
RESULTS = Path(__file__).resolve().parent / "results"


def real_images(path, image_size, channels):
    """(uint8 [N, H, W, C], classes [N]) of a folder whose files are named class_index."""
    source = open_images(path)
    classes, _ = read_classes(source, "prefix", path)
    dataset = ImageDataset(image_size, source, classes, channels=channels)
    batch = th.stack([th.from_numpy(dataset[i][0]) for i in range(len(dataset))])
    return to_uint8(batch + 0.5 / 127.5), np.array(classes)  # to_uint8 truncates


class Classifier(nn.Module):
    """A small convolutional network: uint8 [N, H, W, C] -> features [N, 128], and logits from them."""

    def __init__(self, channels, classes, width=32, seed=0):
        super().__init__()
        th.manual_seed(seed)
        self.rng = np.random.default_rng(seed)

        def block(before, after):
            return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]

        self.torso = nn.Sequential(
            *block(channels, width), *block(width, 2 * width), nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.BatchNorm2d(4 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(4 * width, classes))

    def fit(self, images, classes, steps=1500, batch_size=128):
        """Train on images moved by up to two pixels."""
        opt = th.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = th.optim.lr_scheduler.OneCycleLR(opt, 5e-3, total_steps=steps)
        x, y = from_uint8(images), th.from_numpy(classes)
        self.train()
        for _ in range(steps):
            chosen = self.rng.integers(len(x), size=batch_size)
            moved = th.roll(x[chosen], tuple(self.rng.integers(-2, 3, 2)), (2, 3))
            loss = nn.functional.cross_entropy(self.head(self.torso(moved)), y[chosen], label_smoothing=0.05)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        return self.eval()

    @th.no_grad()
    def judge(self, images):
        """(features float32 [N, D], probabilities float32 [N, classes])."""
        features = th.cat([self.torso(from_uint8(part)) for part in np.array_split(images, len(images) // 500 + 1)])
        return features.numpy(), self.head(features).softmax(dim=1).numpy()


class Drawer:
    """Draws samples from one checkpoint by the flags of image_sample.py: sample i from seed i, of class i mod n."""

    def __init__(self, model_path, batch_size):
        self.model_path, self.batch_size = str(model_path), batch_size
        options = self._options([])
        self.model, _, self.metadata = load_model(options)
        prepare_model(options, self.model)
        self.channels, self.image_size = options.channels, options.image_size
        self.classes = len(self.metadata["class_names"]) if options.class_cond else 0

    def _options(self, flags):
        return parse_options(GROUPS, __doc__, ["--model_path", self.model_path, *flags])

    def sampler(self, flags):
        """The sampler that the flags describe, and the guided model."""
        options = self._options(flags)
        _, diffusion, _ = load_model(options)
        sampler = build_sampler(options, diffusion)
        return sampler, guide(options, self.model, sampler.diffusion, self.metadata)[0]

    def draw(self, flags, count):
        """(uint8 [count, H, W, C], classes [count], evaluations for each)."""
        sampler, model = self.sampler(flags)
        shape, parts = (self.channels, *height_width(self.image_size)), []
        bar = Progress(" ".join(flags), count, "image")
        for start in range(0, count, self.batch_size):
            seeds = range(start, min(start + self.batch_size, count))
            kwargs = {}
            if self.classes:
                kwargs["y"] = th.tensor([i % self.classes for i in seeds], device=distributed.dev())
            parts.append(last_images(sampler.walk(model, shape, seeds, kwargs)))
            bar.update(len(seeds))
        bar.close()
        labels = np.arange(count) % self.classes if self.classes else np.zeros(count, int)
        return np.concatenate(parts), labels, sampler.evaluations


def parser(description):
    """The arguments that the benchmarks of samples share."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model_path", required=True, help="checkpoint of a model with classes")
    result.add_argument("--data_dir", required=True, help="folder with train and test images named class_index.png")
    result.add_argument("--num_samples", type=int, default=2000)
    result.add_argument("--batch_size", type=int, default=250)
    result.add_argument("--name", default="digits", help="of the result files")
    return result
