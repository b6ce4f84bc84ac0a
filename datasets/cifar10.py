"""Download CIFAR-10 (170 MB) and write it as PNGs of 32x32 pixels, named class_index.png: 50,000 in
OUT_DIR/cifar_train, 10,000 in OUT_DIR/cifar_test.

    python datasets/cifar10.py --out_dir data/cifar10
    python datasets/cifar10.py --archive cifar-10-python.tar.gz      # use an existing archive instead of downloading

The archive is https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (A. Krizhevsky, 2009). It holds Python pickles:
its checksum is verified, and only numbers, strings and arrays are read from it, so no code in it can run.
"""

import argparse
import hashlib
import http.client
import tarfile
import urllib.request
from pathlib import Path

import arrays_only
import numpy as np
from new_folder import NewFolder, check_out_dir

from improved_diffusion.config import UserError
from improved_diffusion.distributed import run_script
from improved_diffusion.logs.progress import Progress
from improved_diffusion.utils import files

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE = "cifar-10-python.tar.gz"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"cifar_train": [f"data_batch_{i}" for i in range(1, 6)], "cifar_test": ["test_batch"]}


def check_md5(path: Path, remedy: str) -> None:
    """Raise UserError unless the file is the official archive."""
    md5 = hashlib.md5(usedforsecurity=False)
    with files.open_read(path) as f:
        while block := f.read(2**20):
            md5.update(block)
    if md5.hexdigest() != MD5:
        raise UserError(f"{path} has the md5 {md5.hexdigest()}, the official archive has {MD5}: {remedy}")


def download(path: Path) -> None:
    """Download the archive; it gets its final name when it is complete."""
    files.make_dirs(path.parent)
    partial = path.with_name(path.name + ".partial")
    try:
        with urllib.request.urlopen(URL, timeout=60) as response, open(partial, "wb") as f:
            progress = Progress(f"downloading {URL}", int(response.headers.get("Content-Length", 0)) or None, "byte")
            try:
                while block := response.read(2**18):
                    f.write(block)
                    progress.update(len(block))
            finally:
                progress.close()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {URL}: {error}: try again, or fetch it and give --archive FILE") from None
    check_md5(partial, "the download was cut or altered; run this again")
    partial.replace(path)


def read_split(path: Path, batches: list[str]) -> list[tuple[str, np.ndarray]]:
    """(file name, uint8 [3072], channel by channel) of each image of some batches."""
    pairs = []
    try:
        with tarfile.open(path) as archive:
            for name in batches:
                batch = arrays_only.loads(archive.extractfile(f"cifar-10-batches-py/{name}").read())
                data, labels = batch[b"data"], batch[b"labels"]
                if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not set(labels) <= set(range(10)):
                    raise UserError(f"{name} does not hold images of 32x32 pixels and 10 classes")
                pairs += zip(data, labels)
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise UserError(f"cannot read {path}: {error}") from None
    return [(f"{CLASSES[label]}_{i:05d}.png", row) for i, (row, label) in enumerate(pairs)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="data/cifar10", help="folder to write (default: data/cifar10)")
    parser.add_argument("--archive", help=f"a copy of {ARCHIVE}, instead of downloading it into OUT_DIR")
    args = parser.parse_args()

    out_dir = check_out_dir(args.out_dir, (*BATCHES, ARCHIVE))
    folders = {split: NewFolder(out_dir / split, dataset="CIFAR-10", split=split) for split in BATCHES}
    path = Path(args.archive or out_dir / ARCHIVE)
    if not all(folder.complete for folder in folders.values()):
        if not args.archive and not path.exists():
            download(path)
        check_md5(path, "delete it, and download it again")
    for split, folder in folders.items():
        items = [] if folder.complete else read_split(path, BATCHES[split])
        folder.write(items, len(items), lambda row: row.reshape(3, 32, 32).transpose(1, 2, 0))


if __name__ == "__main__":
    run_script(main)
