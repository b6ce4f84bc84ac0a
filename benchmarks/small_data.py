"""What a model learns from few images: how near its samples come to images that it has not seen, and whether they
are copies of those that it has.

    python datasets/cifar10.py
    python benchmarks/small_data.py --data_dir data/cifar10/cifar_train --features features.pt2 --name cifar10

    python datasets/digits.py
    python datasets/digits_features.py --digits data/digits --out data/digits/features.pt2
    python benchmarks/small_data.py --data_dir data/digits/train --features data/digits/features.pt2 \\
        --name digits --count 500 --held_out 400 --config datasets/digits.json \\
        --settings plain,dropout --max_steps 3000 --interval 500

Of the images, --count are trained on; --held_out others are what the copy score compares with; the rest, at most
10,000, are the reference of KID. Each setting is a run of its own, below --out_dir, of the recipe small-32 or of the
options in --config. At every interval its average draws as many samples as there are held-out images, in 20 steps of
dpmpp_2m_sde, kept in the run's folder. The features are those of a program for `improved-diffusion evaluate`. Writes
benchmarks/results/small_data_<name>.json and .png, and prints the table of docs/small-data.md. An interrupted command
goes on where it stopped; with --draw_only the samples are not evaluated yet, by another machine perhaps.
"""

import argparse
import json
import platform
from pathlib import Path

import numpy as np
from common import RESULTS, real_images

import improved_diffusion as idf
from improved_diffusion.config.presets import preset_options
from improved_diffusion.logs import logger

# What a run sets beyond the recipe.
SETTINGS = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "flip": {"random_flip": True},
    "flip_dropout": {"random_flip": True, "dropout": 0.1},
    "flip_more_dropout": {"random_flip": True, "dropout": 0.3},
    "random_crop": {"random_flip": True, "dropout": 0.1, "resize_mode": "random_crop"},
}
NOT_KEPT = ("out_dir", "settings", "features", "draw_only")
REFERENCE = 10_000  # images, at most
SAMPLER = {"sampler": "dpmpp_2m_sde", "steps": 20}


def split(args, options, folder):
    """Write train.npz, held_out.npz and reference.npz, where they are not there yet."""
    if (folder / "reference.npz").exists():
        return
    images, classes = real_images(args.data_dir, options["image_size"], options.get("channels", 3))
    order = np.random.default_rng(0).permutation(len(images))
    ends = np.cumsum([args.count, args.held_out, REFERENCE])
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in zip(("train", "held_out", "reference"), np.split(order, ends)):
        if len(chosen) < 100:
            raise SystemExit(
                f"{args.data_dir}: {len(chosen)} images are left for {name}.npz: lower --count, --held_out"
            )
        np.savez(folder / f"{name}.npz", arr_0=images[chosen], arr_1=classes[chosen])


def train(args, options, folder, name):
    """A run with a checkpoint at every interval."""
    intervals = {"save_interval": args.interval, "sample_interval": args.interval, "val_interval": args.interval}
    idf.train(
        folder / "train.npz", **{**options, **SETTINGS[name], **intervals, "max_steps": args.max_steps, "keep_last": 0},
        val_dir=folder / "held_out.npz", out_dir=folder / name, resume="auto",
    )  # fmt: skip
    logger.reset()


def draw(args, run):
    """Write samples_STEP.npz of the average of every interval."""
    for step in steps(args):
        if not samples_file(run, step).exists():
            average = next(run.glob(f"ema_*_{step:06d}.pt"), None)
            if average is None:
                raise SystemExit(f"{run} has no checkpoint of step {step} yet: run the same command again")
            images = idf.load(average).sample(args.held_out, batch_size=100, progress=False, **SAMPLER)
            np.savez(samples_file(run, step), arr_0=images.array)


def samples_file(run, step):
    return run / f"samples_{step:06d}.npz"


def steps(args):
    return range(args.interval, args.max_steps + 1, args.interval)


def losses(run):
    """The loss of the average on the held-out images, by step."""
    rows = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    found = {}
    for row in rows:
        for key in (key for key in row if key.startswith("val_loss_ema")):
            found[row["step"]] = row[key]
    return found


def measure(args, folder, samples):
    """(the scores of samples of one checkpoint, those of real images)."""
    report = idf.evaluate(
        samples, folder / "reference.npz", features=args.features, trust_features=True,
        train_dir=folder / "train.npz", held_out=folder / "held_out.npz",
    )  # fmt: skip
    scores = {name: getattr(report, name).to_dict() for name in ("fid", "kid", "precision", "recall", "copies")}
    real = {name: metric.to_dict() for name, metric in report.real.metrics.items()}
    return scores, real


def plot(path, rows, real):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, metric, factor, label in zip(
        axes, ("kid", "copies"), (1000, 1), ("KID x 1000 to images not trained on", "copy score (0.5: no copies)")
    ):
        for name in dict.fromkeys(row["setting"] for row in rows):
            line = sorted((row["step"], row[metric]) for row in rows if row["setting"] == name)
            x, y = [step for step, _ in line], [factor * score["value"] for _, score in line]
            axis.errorbar(x, y, [factor * score["error"] for _, score in line], marker="o", capsize=2, label=name)
        axis.set_xlabel("steps")
        axis.set_ylabel(label)
    axes[0].axhline(1000 * real["kid"]["value"], color="0.6", linestyle=":", label="real images")
    axes[0].set_yscale("symlog", linthresh=1)
    axes[1].axhline(0.5, color="0.6", linestyle=":")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def table(rows):
    """Markdown."""
    print("| setting | steps | loss on unseen images | KID x 1000 | precision | recall | copy score |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        kid, copies = row["kid"], row["copies"]
        print(
            f"| {row['setting']} | {row['step']:,} | {row['val_loss']:.4f} | {1e3 * kid['value']:.1f} ± "
            f"{1e3 * kid['error']:.1f} | {row['precision']['value']:.2f} | {row['recall']['value']:.2f} | "
            f"{copies['value']:.2f} ± {copies['error']:.2f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="folder or zip of images named class_index")
    parser.add_argument("--features", required=True, help="program for improved-diffusion evaluate, which is trusted")
    parser.add_argument("--config", default="", help="JSON file of a run's options (default: the recipe small-32)")
    parser.add_argument("--batch_size", type=int, default=0, help="default: that of the options")
    parser.add_argument("--count", type=int, default=1000, help="images to train on")
    parser.add_argument("--held_out", type=int, default=1000, help="images for the copy score")
    parser.add_argument("--settings", default="plain,flip_dropout", help=f"comma-separated, of {', '.join(SETTINGS)}")
    parser.add_argument("--max_steps", type=int, default=6000)
    parser.add_argument("--interval", type=int, default=1000, help="steps from one measurement to the next")
    parser.add_argument("--out_dir", default="runs/small_data", help="for the runs")
    parser.add_argument("--draw_only", action="store_true", help="train and draw, evaluate later")
    parser.add_argument("--name", required=True, help="of the result files")
    args = parser.parse_args()

    options = json.loads(Path(args.config).read_text()) if args.config else preset_options("small-32")
    options["precision"] = "fp32"  # `auto` is another one on other processors
    if args.batch_size:
        options = {**options, "total_batch_size": args.batch_size}
    folder = Path(args.out_dir) / f"{args.name}_{args.count}"
    split(args, options, folder)
    path = RESULTS / f"small_data_{args.name}.json"
    about = {name: value for name, value in vars(args).items() if name not in NOT_KEPT}
    content = {"options": about, "device": platform.machine(), "real": {}, "rows": []}
    if path.exists():
        content = json.loads(path.read_text())
        if content["options"] != about:
            raise SystemExit(f"{path} was made with {content['options']}, not {about}: give another --name")
    for name in args.settings.split(","):
        run = folder / name
        if not all(samples_file(run, step).exists() for step in steps(args)):
            train(args, options, folder, name)
            draw(args, run)
        if args.draw_only:
            continue
        held_out = losses(run)
        for step in steps(args):
            if any((row["setting"], row["step"]) == (name, step) for row in content["rows"]):
                continue
            scores, content["real"] = measure(args, folder, samples_file(run, step))
            nearest = min(held_out, key=lambda logged: abs(logged - step))
            content["rows"].append({"setting": name, "step": step, "val_loss": held_out[nearest], **scores})
            path.write_text(json.dumps(content, indent=1) + "\n")
    if args.draw_only:
        return
    table(content["rows"])
    plot(path.with_suffix(".png"), content["rows"], content["real"])


if __name__ == "__main__":
    main()
