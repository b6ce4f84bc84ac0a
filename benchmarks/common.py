"""What several benchmarks share: a classifier of real images, whose features compare samples with
them, and samples of a checkpoint."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as th
from torch import nn

from improved_diffusion.checkpoints.loading import load_model
from improved_diffusion.cli.parsing import parse
from improved_diffusion.config.settings import ImageSampling
from improved_diffusion.data.classes import read_classes
from improved_diffusion.data.dataset import ImageDataset
from improved_diffusion.data.sources import open_images
from improved_diffusion.logs.progress import Progress
from improved_diffusion.sampling.pipeline import SamplingPipeline
from improved_diffusion.sampling.sampler import GRIDS, OTHER_GRID
from improved_diffusion.sampling.solvers import RULES
from improved_diffusion.utils.images import from_uint8, to_uint8

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
    def evaluate(self, images):
        """(features float32 [N, D], probabilities float32 [N, classes])."""
        features = th.cat([self.torso(from_uint8(part)) for part in np.array_split(images, len(images) // 500 + 1)])
        return features.numpy(), self.head(features).softmax(dim=1).numpy()


@dataclass(frozen=True)
class Samples:
    """Samples of a model."""

    images: np.ndarray  # uint8 [N, H, W, C]
    labels: np.ndarray  # [N], their classes; 0 without classes
    evaluations: int  # of the network, for each


class Checkpoint:
    """A model to sample from with the flags of image_sample.py; sample i has class i mod the number of classes."""

    def __init__(self, model_path, batch_size):
        self.model_path, self.batch_size = str(model_path), batch_size
        loaded = self.pipeline([]).loaded
        self.channels, self.image_size = loaded.settings.model.channels, loaded.settings.model.size
        self.classes = len(loaded.metadata["class_names"]) if loaded.settings.model.class_cond else 0

    def pipeline(self, flags):
        """The model with the sampler and guidance of the flags."""
        parsed = parse(ImageSampling, ["--model_path", self.model_path, *flags])
        return SamplingPipeline(load_model(parsed.settings, parsed.given, self.model_path))

    def draw(self, flags, count):
        """`count` samples."""
        if self.classes:
            flags = [*flags, "--classes", ",".join(map(str, range(self.classes)))]
        pipeline, parts = self.pipeline(flags), []
        bar = Progress(" ".join(flags), count, "image")
        for start in range(0, count, self.batch_size):
            numbers = range(start, min(start + self.batch_size, count))
            parts.append(pipeline.draw(numbers))
            bar.update(len(numbers))
        bar.close()
        labels = np.arange(count) % self.classes if self.classes else np.zeros(count, int)
        return Samples(np.concatenate(parts), labels, pipeline.sampler.evaluations)


def steps_for(rule, evaluations):
    """The most steps that cost no more evaluations."""
    return max(n for n in range(1, evaluations + 1) if RULES[rule]().evaluations(n) <= evaluations)


def grid_of(rule):
    """The grid that a rule takes by default in more than a few steps."""
    return GRIDS.get(rule, OTHER_GRID)


def flags_for(rule, asked, grid):
    return ["--sampler", rule, "--steps", str(steps_for(rule, asked)), "--timestep_grid", grid]


class Results:
    """The json, kept from run to run as long as what it depends on is the same."""

    def __init__(self, path, settings, kinds):
        self.path, self.content = path, {"settings": settings, **{kind: [] for kind in kinds}}
        if path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise SystemExit(
                    f"{path} was made with {self.content['settings']}, not {settings}: give another --name"
                )

    def find(self, kind, **wanted):
        return any(all(row[key] == value for key, value in wanted.items()) for row in self.content[kind])

    def add(self, kind, row):
        self.content[kind].append(row)
        print(row, flush=True)
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def parser(description):
    """The arguments that the benchmarks of samples share."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model_path", required=True, help="checkpoint of a model with classes")
    result.add_argument("--data_dir", required=True, help="folder with train and test images named class_index.png")
    result.add_argument("--num_samples", type=int, default=2000)
    result.add_argument("--batch_size", type=int, default=250)
    result.add_argument("--name", default="digits", help="of the result files")
    return result
