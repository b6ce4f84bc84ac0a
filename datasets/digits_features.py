"""Train a small classifier on the real digits that digits.py wrote, and export it as the feature network for FID, KID
and the inception score of digits.

    python datasets/digits_features.py --digits data/digits --out data/digits/features.pt2

The exported program maps uint8 [N, 3, 16, 16], grey repeated in the three channels, to {"features": float32 [N, 128],
"logits": float32 [N, 10]}. `torch.export.load("features.pt2").module()` reads it. Since it was made on this machine,
it is noted as trusted: evaluate.py loads it without --trust_features.
"""

import argparse
import io
import os
import warnings

import numpy as np
import torch as th
from torch import nn

from improved_diffusion.config import UserError
from improved_diffusion.data.sources import open_images
from improved_diffusion.distributed import run_script
from improved_diffusion.evaluation.trust import trust
from improved_diffusion.logs.progress import Progress
from improved_diffusion.utils import files
from improved_diffusion.utils.resizing import resize_crop

SIDE = 16  # the size that `make demo` samples
CLASSES = 10
STEPS = 400
BATCH = 128
MOVED = 2  # maximum shift of training images, in pixels


class Classifier(nn.Module):
    """uint8 [N, 3, H, W] -> {"features": [N, 128], "logits": [N, 10]}; the logits are computed from the features."""

    def __init__(self, width=32):
        super().__init__()

        def block(before, after):
            return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

        self.torso = nn.Sequential(
            *block(1, width), nn.MaxPool2d(2), *block(width, 2 * width), nn.MaxPool2d(2), *block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x):
        grey = x.float().mean(dim=1, keepdim=True)
        features = self.torso(grey / 127.5 - 1)
        return {"features": features, "logits": self.head(self.dropout(features))}


def read(folder: str) -> tuple[th.Tensor, th.Tensor]:
    """(uint8 [N, 3, 16, 16], digits [N]) of the PNGs digit_index.png in a folder, resized as training does."""
    source = open_images(folder, "--digits")
    names = [source.name(i).split("/")[-1].split("_")[0] for i in range(len(source))]
    if not all(name in map(str, range(CLASSES)) for name in names):
        raise UserError(f"--digits {folder}: every image must be named digit_index.png, as digits.py names them")
    rows = [np.asarray(resize_crop(source.read(i).convert("RGB"), (SIDE, SIDE))) for i in range(len(source))]
    return th.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous(), th.tensor([int(name) for name in names])


def fit(images: th.Tensor, digits: th.Tensor, steps: int) -> Classifier:
    """A classifier trained on randomly shifted images. The same images give the same classifier."""
    th.manual_seed(0)
    model = Classifier()
    optimizer = th.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=max(2, steps))
    bar = Progress("training the classifier", steps, "step")
    for _ in range(steps):
        chosen = th.randint(len(images), (BATCH,))
        moved = th.roll(images[chosen], th.randint(-MOVED, MOVED + 1, (2,)).tolist(), (2, 3))
        loss = nn.functional.cross_entropy(model(moved)["logits"], digits[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.update(1)
    bar.close()
    return model.eval().requires_grad_(False)


def export(model: nn.Module, images: th.Tensor) -> bytes:
    """The classifier as an exported program for any number of images."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own internals
        # Two examples, because one would fix the batch size to 1; cloned, because a view would save its whole base.
        program = th.export.export(model, (images[:2].clone(),), dynamic_shapes=({0: th.export.Dim("batch", min=1)},))
        th.export.save(program, buffer)
    return buffer.getvalue()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default="data/digits", help="folder that digits.py wrote (default: data/digits)")
    out = "data/digits/features.pt2"
    parser.add_argument("--out", default=out, help=f"file to write (default: {out})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default: {STEPS})")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    files.make_dirs(os.path.dirname(args.out) or ".")

    train, test = (read(files.join(args.digits, split)) for split in ("train", "test"))
    model = fit(*train, args.steps)
    with th.no_grad():
        right = int((model(test[0])["logits"].argmax(dim=1) == test[1]).sum())
    print(f"accuracy on {len(test[1])} real held-out digits: {right / len(test[1]):.1%}")
    files.write_bytes(args.out, export(model, train[0]))
    trust(files.sha256(args.out), args.out)
    print(f"wrote {args.out}: uint8 [N, 3, {SIDE}, {SIDE}] -> features [N, 128], logits [N, {CLASSES}]")


if __name__ == "__main__":
    run_script(main)
