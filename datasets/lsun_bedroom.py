"""Write the images of an LSUN lmdb folder as square PNGs, named PREFIX_index.png, in OUT_DIR: cropped to their centre,
then resized with a box filter.

    python datasets/lsun_bedroom.py bedroom_train_lmdb data/lsun_bedroom --image_size 256 --prefix bedroom

bedroom_train_lmdb (3,033,042 images, 43 GB) is in the archive that https://github.com/fyu/lsun downloads (F. Yu et al.
2015, arXiv 1506.03365). The other categories have the same format. An interrupted run continues where it stopped.
"""

import argparse
import io
import os

import numpy as np
from new_folder import NewFolder
from PIL import Image

from improved_diffusion.config import UserError
from improved_diffusion.distributed import run_script
from improved_diffusion.utils import images


def open_lmdb(path: str):
    """The lmdb environment of the database."""
    try:
        import lmdb
    except ImportError:
        raise UserError("LSUN is an lmdb database, which needs the package lmdb: pip install lmdb") from None
    if not os.path.exists(os.path.join(path, "data.mdb")):
        raise UserError(f"{path} is not an lmdb folder: name the folder of data.mdb, such as bedroom_train_lmdb")
    try:
        # No lock file, so that the database may be on a read-only disk.
        return lmdb.open(path, readonly=True, lock=False, readahead=False, max_readers=100)
    except lmdb.Error as error:
        raise UserError(f"cannot open {path}: {error}: unpack the archive again") from None


def to_square(source: tuple, image_size: int) -> np.ndarray:
    """(key, encoded image) -> uint8 [image_size, image_size, 3]"""
    key, encoded = source
    try:
        image = images.load(io.BytesIO(encoded)).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"the image {bytes(key)!r} is not readable ({error}): unpack the archive again") from None
    side = min(image.size)
    left, top = (image.size[0] - side) // 2, (image.size[1] - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((image_size, image_size), resample=Image.Resampling.BOX, box=box))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lmdb_path", help="folder that contains data.mdb")
    parser.add_argument("out_dir", help="folder to write")
    parser.add_argument("--image_size", "--image-size", type=int, default=256, help="side in pixels (default: 256)")
    parser.add_argument("--prefix", default="bedroom", help="class, the beginning of each file name (default: bedroom)")
    args = parser.parse_args()
    if args.image_size < 1:
        raise UserError(f"--image_size {args.image_size} must be positive")
    if "/" in args.prefix or not args.prefix:
        raise UserError(f"--prefix {args.prefix!r} must be the beginning of a file name")

    env = open_lmdb(args.lmdb_path)
    folder = NewFolder(
        args.out_dir, lmdb=os.path.realpath(args.lmdb_path), image_size=args.image_size, prefix=args.prefix
    )
    with env.begin(buffers=True) as transaction:  # buffers: skipped images are not read from disk
        items = ((f"{args.prefix}_{i:07d}.png", pair) for i, pair in enumerate(transaction.cursor()))
        folder.write(items, env.stat()["entries"], lambda source: to_square(source, args.image_size))


if __name__ == "__main__":
    run_script(main)
