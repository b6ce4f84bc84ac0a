"""How good the samples of each rule are for the number of evaluations that they cost.

    python datasets/digits.py --out_dir data/digits
    python scripts/image_train.py --config datasets/digits.json --data_dir data/digits/train --label_drop 0.1 \\
        --dropout 0.1 --max_steps 8000 --lr 0.001 --ema_rate 0.999 --precision fp32 --out_dir runs/digits_long
    python benchmarks/sampler_quality.py --model_path runs/digits_long/ema_0.999_008000.pt --data_dir data/digits

The measure is the kernel distance (improved_diffusion/evaluation/metrics/kid.py) between the features of samples and of
all real images; the features are those of a classifier trained on the real training images here, or of a program for
scripts/evaluate.py (--features) that is trusted already. The samples are of each class equally often, which moves the
estimate a little below that of independent draws, the same for all rules: what counts is how they differ.

All rules start from the same noises, so that those without randomness of their own are also compared, pixel by pixel,
with where their common equation ends, on each timestep grid. Writes benchmarks/results/sampler_quality_<name>.json and
.png, and prints the tables. What is in the json already is kept, so that an interrupted run goes on.
"""

import numpy as np
from common import RESULTS, Checkpoint, Classifier, Results, flags_for, grid_of, parser, real_images

from improved_diffusion import distributed
from improved_diffusion.evaluation.features import FeatureNetwork
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.sampling.solvers import NOISY, RULES
from improved_diffusion.sampling.timestep_grids import NAMES

# What few_steps.py measures is left out: few evaluations, `renoise` and the grid for them.
EVALUATIONS = (8, 10, 15, 20, 50)
ON_MANY = [rule for rule in RULES if rule != "renoise"]
GRIDS = [grid for grid in NAMES if grid != "coarse"]
MANY = (250, 1000)  # of the ancestral rule alone
BASELINE = ("ancestral", 250)
EXACT = ["--sampler", "dpmpp_3m", "--steps", "250", "--timestep_grid", "logsnr"]  # nearly, for the comparison
COMPARED = 200  # samples, with it
ON_GRIDS = (8, 15)  # evaluations


class Features:
    """The features of a program, as scripts/evaluate.py takes it."""

    def __init__(self, path):
        self.network = FeatureNetwork(path, device=distributed.dev())

    def evaluate(self, images):
        parts = np.array_split(images, len(images) // 500 + 1)
        return np.concatenate([self.network(part).features for part in parts]), None


def plot(path, rows):
    """KID against evaluations, a line for each rule, with the ancestral baseline's band."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    base = next(row for row in rows if (row["rule"], row["asked"]) == BASELINE)
    low, high = base["kid"] - base["standard_error"], base["kid"] + base["standard_error"]
    axes.axhspan(low, high, color="0.9", label=f"{BASELINE[0]}, {BASELINE[1]} evaluations, +- 1 standard error")
    for rule, marker in zip(RULES, "ovs^D<>PX*h"):
        line = sorted((row["evaluations"], row["kid"], row["standard_error"]) for row in rows if row["rule"] == rule)
        if not line:
            continue
        x, y, error = zip(*line)
        axes.errorbar(x, y, error, marker=marker, markersize=4, linewidth=1, capsize=2, label=rule)
    # Near 0 an unbiased estimate may be negative.
    axes.set_yscale("symlog", linthresh=max(abs(base["kid"]), base["standard_error"]))
    axes.set_xscale("log")
    axes.set_xlabel("evaluations of the network for each image")
    axes.set_ylabel("kernel distance to real images")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def table(rows, columns, text):
    """Markdown: a row for each rule, a column for each number of evaluations; text(row) in the cells."""
    lines = ["| rule (grid) | " + " | ".join(map(str, columns)) + " |", "|---|" + "---|" * len(columns)]
    for rule in RULES:
        cells = {row["asked"]: row for row in rows if row["rule"] == rule}
        if cells:
            texts = [text(cells[n]) if n in cells else "" for n in columns]
            lines.append(f"| {rule} ({next(iter(cells.values()))['grid']}) | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def table_of_grids(rows):
    """Markdown: the distance to the equation's end of each rule, on each grid, for each of ON_GRIDS."""
    lines = [f"| rule | {' | '.join(GRIDS)} |", "|---|" + "---|" * len(GRIDS)]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        cells = [[row["rmse"] for row in rows if (row["rule"], row["grid"]) == (rule, grid)] for grid in GRIDS]
        lines.append(f"| {rule} | " + " | ".join(" / ".join(f"{x:.3f}" for x in cell) for cell in cells) + " |")
    return "\n".join(lines)


def measure_kid(results, checkpoint, extractor, reference, wanted, count):
    for rule, asked in wanted:
        if results.find("rows", rule=rule, asked=asked):
            continue
        grid = grid_of(rule)
        samples = checkpoint.draw(flags_for(rule, asked, grid), count)
        features, probabilities = extractor.evaluate(samples.images)
        kid = kernel_distance(features, reference)
        row = dict(rule=rule, grid=grid, asked=asked,
                   evaluations=samples.evaluations, kid=kid.value, standard_error=kid.standard_error)  # fmt: skip
        if probabilities is not None:
            row["agreement"] = float((probabilities.argmax(axis=1) == samples.labels).mean())
        results.add("rows", row)


def measure_grids(results, checkpoint, rules):
    """The root mean square distance of the pixels, in [-1, 1], to the end of the common equation."""
    wanted = [(rule, grid, asked) for rule in rules if rule not in NOISY for grid in GRIDS for asked in ON_GRIDS]
    if all(results.find("grids", rule=rule, grid=grid, asked=asked) for rule, grid, asked in wanted):
        return
    exact = checkpoint.draw(EXACT, COMPARED).images / 127.5
    for rule, grid, asked in wanted:
        if not results.find("grids", rule=rule, grid=grid, asked=asked):
            samples = checkpoint.draw(flags_for(rule, asked, grid), COMPARED).images
            rmse = float(np.sqrt(np.mean((samples / 127.5 - exact) ** 2)))
            results.add("grids", dict(rule=rule, grid=grid, asked=asked, rmse=rmse))


def main():
    args = parser(__doc__)
    args.add_argument("--features", default="", help="program; empty: a classifier trained here")
    args.add_argument("--rules", default=",".join(ON_MANY), help="comma-separated (default: all)")
    args = args.parse_args()
    rules = args.rules.split(",")
    checkpoint = Checkpoint(args.model_path, args.batch_size)
    settings = dict(model=args.model_path, num_samples=args.num_samples, features=args.features)
    results = Results(RESULTS / f"sampler_quality_{args.name}.json", settings, ("rows", "grids"))
    sets = [
        real_images(f"{args.data_dir}/{part}", checkpoint.image_size, checkpoint.channels) for part in ("train", "test")
    ]
    if args.features:
        extractor = Features(args.features)
    else:
        extractor = Classifier(checkpoint.channels, checkpoint.classes).fit(*sets[0])
        accuracy = (extractor.evaluate(sets[1][0])[1].argmax(axis=1) == sets[1][1]).mean()
        print(f"the classifier's accuracy on the real test images: {accuracy:.1%}")
    reference, _ = extractor.evaluate(np.concatenate([images for images, _ in sets]))
    wanted = [(rule, n) for n in EVALUATIONS for rule in rules]
    wanted += [("ancestral", n) for n in MANY if "ancestral" in rules]
    measure_kid(results, checkpoint, extractor, reference, wanted, args.num_samples)
    measure_grids(results, checkpoint, rules)

    rows = results.content["rows"]
    print(f"kernel distance x 1000, {args.num_samples} samples:")
    columns = [*EVALUATIONS, *MANY]
    print(table(rows, columns, lambda row: f"{1e3 * row['kid']:.2f} ± {1e3 * row['standard_error']:.2f}"))
    print(f"distance to the end of the equation, in {' / '.join(map(str, ON_GRIDS))} evaluations:")
    print(table_of_grids(results.content["grids"]))
    if results.find("rows", rule=BASELINE[0], asked=BASELINE[1]):
        plot(results.path.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
