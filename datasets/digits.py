"""Write scikit-learn's 1,797 handwritten digits (no download) as grey PNGs of 8x8 pixels, named digit_index.png: the
first 1,500 in OUT_DIR/train, the other 297 in OUT_DIR/test.

    python datasets/digits.py --out_dir data/digits

They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI repository, 1998).
"""

import argparse

import numpy as np
from new_folder import NewFolder, check_out_dir

from improved_diffusion.config import UserError
from improved_diffusion.distributed import run_script

NUM_TRAIN = 1500  # the first ones; the data set's own order mixes the classes evenly


def load_digits():
    """(float [1797, 8, 8] of 0..16, the digits [1797])"""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits are part of the package scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    return data.images, data.target


def to_array(image: np.ndarray) -> np.ndarray:
    """[8, 8] of 0..16 -> uint8 [8, 8, 1] of 0..255"""
    return np.rint(image * (255 / 16)).astype(np.uint8)[..., None]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="data/digits", help="folder to write (default: data/digits)")
    args = parser.parse_args()

    out_dir = check_out_dir(args.out_dir, ("train", "test", "features.pt2"))  # digits_features.py writes the last one
    train, test = (NewFolder(out_dir / split, dataset="digits", split=split) for split in ("train", "test"))
    images, digits = load_digits()
    items = [(f"{digit}_{i:05d}.png", image) for i, (image, digit) in enumerate(zip(images, digits))]
    train.write(items[:NUM_TRAIN], NUM_TRAIN, to_array)
    test.write(items[NUM_TRAIN:], len(items) - NUM_TRAIN, to_array)


if __name__ == "__main__":
    run_script(main)
