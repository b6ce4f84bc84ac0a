"""Write the downsampled ImageNet as PNGs of 64x64 pixels, named LLLL_IIIIIII.png for class (0000 to 0999) and index:
1,281,167 in OUT_DIR/train, 50,000 in OUT_DIR/val.

    python datasets/imagenet64.py NPZ_DIR --out_dir data/imagenet64

NPZ_DIR contains train_data_batch_1.npz to train_data_batch_10.npz and val_data.npz from the archives "Downsampled image
data, 64x64, npz format" at https://image-net.org/download-images (an account is needed). The other format there, files
without a suffix, is Python pickles, which could run code, and is not read. An interrupted run is continued when run
again.
"""

import argparse
import itertools
import os
import zipfile
import zlib

import numpy as np
from new_folder import NewFolder, check_out_dir

from improved_diffusion.config import UserError
from improved_diffusion.distributed import run_script

BATCHES = {"train": [f"train_data_batch_{i}.npz" for i in range(1, 11)], "val": ["val_data.npz"]}
UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


def load_array(path: str, key: str) -> np.ndarray:
    """One array of an npz file, read without unpickling anything."""
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as arrays:
            return arrays[key]
    except UNREADABLE as error:
        if "pickle" in str(error):
            error = "it contains Python objects, which could run code; they were not loaded"
        raise UserError(f"cannot read {key!r} of {path}: {error}: download the npz format again") from None


def load_labels(path: str) -> np.ndarray:
    """The classes [N] of a batch, from 1 to 1000."""
    labels = load_array(path, "labels")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 1 or labels.max() > 1000:
        raise UserError(f"{path} has labels of {labels.dtype} {labels.shape}: expected integers [N] from 1 to 1000")
    return labels


def read_batch(path: str, labels: np.ndarray, first_index: int):
    """(file name, uint8 [12288], channel by channel) of each image, numbered from `first_index`."""
    data = load_array(path, "data")
    if data.dtype != np.uint8 or data.shape != (len(labels), 3 * 64 * 64):
        raise UserError(f"{path} has data of {data.dtype} {data.shape}: expected uint8 ({len(labels)}, {3 * 64 * 64})")
    for i, (row, label) in enumerate(zip(data, labels), first_index):
        yield f"{label - 1:04d}_{i:07d}.png", row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("npz_dir", help="folder of the official npz files")
    parser.add_argument("--out_dir", default="data/imagenet64", help="folder to write (default: data/imagenet64)")
    parser.add_argument("--splits", nargs="+", choices=list(BATCHES), default=list(BATCHES), help="default: train val")
    args = parser.parse_args()

    paths = {split: [os.path.join(args.npz_dir, name) for name in BATCHES[split]] for split in args.splits}
    missing = [path for split in paths.values() for path in split if not os.path.exists(path)]
    if missing:
        raise UserError(
            f"{missing[0]} and {len(missing) - 1} more files are missing: download the 64x64 images in npz format "
            "(files without a suffix are pickles, which are not read), or choose --splits train or --splits val"
        )
    out_dir = check_out_dir(args.out_dir, BATCHES)
    folders = {split: NewFolder(out_dir / split, dataset="ImageNet 64x64", split=split) for split in args.splits}
    for split, folder in folders.items():
        labels = [load_labels(path) for path in paths[split]]
        starts = np.cumsum([0, *map(len, labels)]).tolist()
        # Batches are read one at a time, when needed: each is 1.6 GB.
        items = itertools.chain.from_iterable(map(read_batch, paths[split], labels, starts))
        folder.write(items, starts[-1], lambda row: row.reshape(3, 64, 64).transpose(1, 2, 0))


if __name__ == "__main__":
    run_script(main)
