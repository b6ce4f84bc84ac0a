"""Whether the scores order what they should: CIFAR-10's test images, and the same damaged, against its training images.

    python benchmarks/evaluation_order.py --train train.zip --test test.zip --features features.pt --logits logits.pt

Each is a zip, a folder or an npz of 32x32 images; the features are any program for scripts/evaluate.py, whose commands
this runs. The test images are damaged by JPEG compression of quality 50, by a Gaussian blur with a standard deviation
of one pixel, and by reducing each channel to 4 levels. The undamaged ones are evaluated twice, and on two ranks: all
digits must agree. Writes benchmarks/results/evaluation_<name>.json and prints the table.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from improved_diffusion.evaluation.feature_sets import ImageSet
from improved_diffusion.evaluation.report import Report, number, title
from improved_diffusion.utils.images import save_npz

ROOT = Path(__file__).resolve().parents[1]
EVALUATE = [sys.executable, str(ROOT / "scripts" / "evaluate.py")]


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=50)
    return np.asarray(Image.open(buffer))


def blur(image):
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))


def four_levels(image):
    return (np.rint(image / 85) * 85).astype(np.uint8)


DAMAGES = {"JPEG, quality 50": jpeg, "blur, 1 pixel": blur, "4 levels": four_levels}


def evaluate(args, samples, reference, out_dir, launcher=()):
    """(the report of evaluate.py, the seconds that it took)."""
    start = time.time()
    command = [
        *launcher,
        *EVALUATE,
        "--samples",
        samples,
        "--reference",
        reference,
        *args.network,
        "--out_dir",
        out_dir,
    ]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return Report.read(str(out_dir)), time.time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "features"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--logits", default="")
    parser.add_argument("--trust_features", action="store_true", help="allow these programs to run")
    parser.add_argument("--name", default="cifar10", help="of the result file")
    args = parser.parse_args()
    args.network = ["--features", args.features, *(["--logits", args.logits] if args.logits else [])]
    args.network += ["--trust_features"] if args.trust_features else []
    rows, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        reference = folder / "train.npz"
        start = time.time()
        command = [*EVALUATE, "reference", "--images", args.train, "--out", reference, *args.network]
        subprocess.run(list(map(str, command)), check=True)
        seconds["reference"] = time.time() - start
        found, seconds["test"] = evaluate(args, args.test, reference, folder / "test")
        rows["test images"] = found.metrics
        again, _ = evaluate(args, args.test, reference, folder / "again")
        ranks, seconds["test, two ranks"] = evaluate(
            args, args.test, reference, folder / "ranks", ["mpiexec", "-n", "2"]
        )
        same = {"twice": again == found, "two ranks": ranks == found}
        test = ImageSet(args.test, "--test")
        images = test.take(range(len(test)))
        for name, damage in DAMAGES.items():
            path = folder / f"{damage.__name__}.npz"
            save_npz(str(path), np.stack([damage(image) for image in images]))
            found, _ = evaluate(args, path, reference, folder / damage.__name__)
            rows[name] = found.metrics

    result = {
        "train": {key: found.reference[key] for key in ("name", "count", "pixels_sha256")},
        "features": found.samples["features_sha256"],
        "rows": {row: {name: metric.to_dict() for name, metric in metrics.items()} for row, metrics in rows.items()},
        "same_digits": same,
        "seconds": seconds,
    }
    path = ROOT / "benchmarks" / "results" / f"evaluation_{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    names = list(rows["test images"])
    print(f"| | {' | '.join(map(title, names))} |\n|---" + "|---" * len(names) + "|")
    for row, metrics in rows.items():
        print(f"| {row} | {' | '.join(number(name, metrics[name]) for name in names)} |")
    print(f"the same digits: {same}; seconds: { {name: round(value) for name, value in seconds.items()} }")
    for name in ("fid", "kid"):
        assert all(rows[damage][name].value > rows["test images"][name].value for damage in DAMAGES), name
    assert all(same.values()), same


if __name__ == "__main__":
    main()
