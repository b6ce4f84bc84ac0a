"""What classifier-free guidance buys and what it costs, on the model of sampler_quality.py.

    python benchmarks/guidance.py --model_path runs/digits_long/ema_0.999_008000.pt --data_dir data/digits

For each scale: the share of samples that a classifier, trained on real images alone, takes for their class, how sure
it is of them, their diversity (the mean distance in features between two samples of a class, relative to that of real
images), and the kernel distance to real images. Then the time of an evaluation of the doubled batch relative to that of
the single one, in turns. Writes benchmarks/results/guidance_<name>.json and .png.
"""

import json
import platform
import statistics
import time

import numpy as np
import torch as th
from common import RESULTS, Checkpoint, Classifier, parser, real_images

from improved_diffusion import distributed
from improved_diffusion.config import height_width
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.sampling.guidance import ClassifierFreeGuidance

SCALES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 8)
SAMPLER = ["--sampler", "dpmpp_2m", "--steps", "20"]


def diversity(features, labels):
    """The mean distance between two images of a class, averaged over the classes."""
    means = []
    for label in np.unique(labels):
        mine = th.from_numpy(features[labels == label])
        distances = th.cdist(mine, mine)
        means.append(distances.sum().item() / (len(mine) * (len(mine) - 1)))
    return float(np.mean(means))


def cost(checkpoint, batch_size, repeats):
    """Median over `repeats` of the time of a guided evaluation over that of a plain one just before it."""
    device = distributed.dev()
    x = th.randn(batch_size, checkpoint.channels, *height_width(checkpoint.image_size), device=device)
    t, y = th.full((batch_size,), 500.0, device=device), th.arange(batch_size, device=device) % checkpoint.classes
    model = checkpoint.pipeline([]).model
    guided = ClassifierFreeGuidance(model, 2.0)

    def seconds(model):
        if device.type == "cuda":
            th.cuda.synchronize()
        start = time.perf_counter()
        with th.no_grad():
            model(x, t, y=y)
        if device.type == "cuda":
            th.cuda.synchronize()
        return time.perf_counter() - start

    for each in (model, guided):
        seconds(each)
    ratios = []
    for _ in range(repeats):
        single = seconds(model)
        ratios.append(seconds(guided) / single)
    return statistics.median(ratios)


def plot(path, rows):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    scales = [row["scale"] for row in rows]
    left.plot(scales, [row["agreement"] for row in rows], marker="o", label="agreement with the class")
    left.plot(scales, [row["confidence"] for row in rows], marker="s", label="confidence in the class")
    left.plot(scales, [row["diversity"] for row in rows], marker="^", label="diversity within a class (real images: 1)")
    left.axvline(1, color="0.8", zorder=0)
    left.set_xlabel("guidance scale")
    left.set_ylim(0, 1.5)
    left.legend(fontsize=8)
    right.errorbar(scales, [row["kid"] for row in rows], [row["standard_error"] for row in rows], marker="o", capsize=2)
    right.axvline(1, color="0.8", zorder=0)
    right.set_xlabel("guidance scale")
    right.set_ylabel("kernel distance to real images")
    figure.savefig(path, dpi=110)


def main():
    args = parser(__doc__).parse_args()
    checkpoint = Checkpoint(args.model_path, args.batch_size)
    sets = [
        real_images(f"{args.data_dir}/{part}", checkpoint.image_size, checkpoint.channels) for part in ("train", "test")
    ]
    classifier = Classifier(checkpoint.channels, checkpoint.classes).fit(*sets[0])
    real, real_labels = (np.concatenate(parts) for parts in zip(*sets))
    reference, _ = classifier.evaluate(real)
    spread = diversity(reference, real_labels)
    rows = []
    for scale in SCALES:
        samples = checkpoint.draw([*SAMPLER, "--guidance_scale", str(scale)], args.num_samples)
        labels = samples.labels
        features, probabilities = classifier.evaluate(samples.images)
        kid = kernel_distance(features, reference)
        rows.append(dict(
            scale=scale, agreement=float((probabilities.argmax(axis=1) == labels).mean()),
            confidence=float(probabilities[np.arange(len(labels)), labels].mean()),
            diversity=diversity(features, labels) / spread, kid=kid.value, standard_error=kid.standard_error,
        ))  # fmt: skip
        print(rows[-1], flush=True)
    ratio = cost(checkpoint, args.batch_size, repeats=21)
    print(f"a guided evaluation costs {ratio:.2f} plain ones (batch {args.batch_size})")
    path = RESULTS / f"guidance_{args.name}.json"
    device = th.cuda.get_device_name() if th.cuda.is_available() else platform.processor() or platform.machine()
    content = {"model": str(args.model_path), "sampler": SAMPLER, "num_samples": args.num_samples, "device": device,
               "batch_size": args.batch_size, "cost_of_guided_evaluation": ratio, "rows": rows}  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    plot(path.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
