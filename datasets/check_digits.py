"""Classify sampled digits with a classifier trained on the real training digits only.

Prints its accuracy on the real held-out digits, and the share of samples that it classifies as their label.
"""

import argparse

import numpy as np
from PIL import Image

from improved_diffusion import distributed
from improved_diffusion.config import UserError
from improved_diffusion.data.sources import open_images

SIDE = 8  # of the original digits; samples are averaged down to this size


def read(folder: str, flag: str) -> tuple[np.ndarray, np.ndarray]:
    """(features [N, 64] in 0..16, labels [N]) of the PNGs in a folder, which are named label_index.png."""
    source = open_images(folder, flag)
    rows = [
        np.asarray(source.read(i).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)) for i in range(len(source))
    ]
    names = [source.name(i).split("/")[-1].split("_")[0] for i in range(len(source))]
    if not all(name.isdigit() for name in names):
        raise UserError(f"{flag} {folder}: every image must be named label_index.png")
    return np.stack(rows).reshape(len(rows), -1) / 255 * 16, np.array(names, dtype=int)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", required=True, help="folder of samples named label_index.png")
    parser.add_argument("--digits", default="data/digits", help="folder that digits.py wrote (default: data/digits)")
    args = parser.parse_args()
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("this needs scikit-learn: pip install scikit-learn") from None
    classifier = SVC(gamma=0.001, C=10).fit(*read(f"{args.digits}/train", "--digits"))
    accuracy = classifier.score(*read(f"{args.digits}/test", "--digits"))
    features, labels = read(args.samples, "--samples")
    agreement = classifier.score(features, labels)
    print(f"classifier's accuracy on real held-out digits: {accuracy:.1%}")
    print(f"samples classified as their label: {agreement:.1%} of {len(labels)}")


if __name__ == "__main__":
    distributed.run_script(main)
