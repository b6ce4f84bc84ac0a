"""How good the samples of models are in very few steps: students of `improved-diffusion distill`, and their teacher.

    python datasets/digits.py --out_dir data/digits
    improved-diffusion distill --teacher runs/digits --data_dir data/digits/train --max_steps 800 --lr 1e-3 \\
        --out_dir runs/digits_fast
    python benchmarks/few_steps.py --model_path runs/digits --students runs/digits_fast --data_dir data/digits

runs/digits is the demo's (make demo); sampler_quality.py says how runs/digits_long is trained. The measures are those
of sampler_quality.py: the kernel distance to all real images in the features of a classifier that is trained here on
the real training images, and how often that classifier sees the class that was asked for. The teacher draws by each
rule on its timestep grid for many steps and on `coarse`, a student by the rule and the grid that its file names. A
student of progressive distillation draws in the steps of its file only: give the file of each stage.

Writes benchmarks/results/few_steps_<name>.json, with the options of each distillation and the seconds of its training,
a plot <name>.png and samples <name>_samples.png, and prints the table. What is in the json already is kept, so that an
interrupted run goes on.
"""

import json
from pathlib import Path

import numpy as np
from common import RESULTS, Checkpoint, Classifier, Results, flags_for, grid_of, parser, real_images

from improved_diffusion.checkpoints.loading import read
from improved_diffusion.evaluation.metrics.kid import kernel_distance
from improved_diffusion.sampling.solvers import RULES

EVALUATIONS = (1, 2, 4, 8)
# Lines of the teacher (rule, grid) in the plot, and in the picture of so many samples.
PLOTTED = [("ddim", "ddim"), ("dpmpp_2m", "logsnr"), ("dpmpp_2m_sde", "coarse"), ("renoise", "coarse")]
PICTURED, PICTURED_LINES = 20, [("dpmpp_2m", "logsnr"), ("dpmpp_2m_sde", "coarse")]
BASELINE = ("ancestral", "uniform", 250)
ON_COARSE = [rule for rule in RULES if rule not in ("ancestral", "renoise")]  # renoise's own grid is coarse
# The options of a distillation that tell one from another.
OPTIONS = ("method", "student_prediction", "max_steps", "batch_size", "lr", "max_q", "p_mean", "p_std", "steps", "to")


def describe(path):
    """A row: how a student was made, and the seconds that its training took until then."""
    file, _, metadata = read(path, "--students")
    step = metadata["step"]
    log = [json.loads(line) for line in (Path(file).parent / "progress.jsonl").read_text().splitlines()]
    rows = [row for row in log if "images_per_second" in row and row["step"] < step]
    images = np.diff([0, *(row["samples"] for row in rows)])
    seconds = sum(images / np.array([row["images_per_second"] for row in rows]))
    options = {name: metadata["config"][name] for name in OPTIONS}
    return dict(path=path, model=name_of(path), distilled=metadata["distilled"], options=options,
                seconds=round(float(seconds), 1))  # fmt: skip


def name_of(path):
    """The run of a student."""
    return path if Path(path).is_dir() else str(Path(path).parent)


class Student:
    """A student, and what it draws by.

    :param facts: what `describe` found.
    """

    def __init__(self, facts, batch_size):
        self.checkpoint = Checkpoint(facts["path"], batch_size)
        self.name, own = facts["model"], facts["distilled"]
        self.line = own["sampler"], own["timestep_grid"]
        self.evaluations = EVALUATIONS if own["method"] == "consistency" else (own["steps"],)


def measure(results, name, checkpoint, line, evaluations, extractor, reference, count):
    """Add the row of a model drawn by a rule on a grid in so many evaluations, unless it is there."""
    rule, grid = line
    wanted = dict(model=name, rule=rule, grid=grid, asked=evaluations)
    if results.find("rows", **wanted):
        return
    samples = checkpoint.draw(flags_for(rule, evaluations, grid), count)
    features, probabilities = extractor.evaluate(samples.images)
    kid = kernel_distance(features, reference)
    agreement = float((probabilities.argmax(axis=1) == samples.labels).mean())
    results.add("rows", dict(**wanted, kid=kid.value, standard_error=kid.standard_error, agreement=agreement))


def lines_of(rows):
    """{(model, rule, grid): {evaluations: row}} in their order."""
    found = {}
    for row in rows:
        found.setdefault((row["model"], row["rule"], row["grid"]), {})[row["asked"]] = row
    return found


def table(rows):
    """Markdown: a row for each model, rule and grid, a column for each number of evaluations."""
    columns = [*EVALUATIONS, BASELINE[-1]]
    lines = [f"| model | sampler (grid) | {' | '.join(map(str, columns))} |", "|---" * (2 + len(columns)) + "|"]
    for (model, rule, grid), cells in lines_of(rows).items():
        texts = [cell(cells[n]) if n in cells else "" for n in columns]
        lines.append(f"| `{model}` | {rule} ({grid}) | {' | '.join(texts)} |")
    return "\n".join(lines)


def cell(row):
    return f"{1e3 * row['kid']:.1f} ± {1e3 * row['standard_error']:.1f}, {row['agreement']:.1%}"


def plot(path, rows, students):
    """KID and agreement against evaluations, with the band of the baseline; a few lines of the teacher."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
    base = next(row for row in rows if (row["rule"], row["grid"], row["asked"]) == BASELINE)
    low, high = (base["kid"] + sign * 2 * base["standard_error"] for sign in (-1, 1))
    left.axhspan(
        low, high, color="0.88", label=f"teacher, {BASELINE[0]}, {BASELINE[-1]} evaluations ± 2 standard errors"
    )
    right.axhline(base["agreement"], color="0.7", linewidth=4)
    for (model, rule, grid), cells in lines_of(rows).items():
        taught = model in students
        if not taught and (rule, grid) not in PLOTTED:
            continue
        row_of = {n: cells[n] for n in EVALUATIONS if n in cells}
        name = f"student {model}" if taught else f"teacher, {rule} on {grid}"
        style = dict(linewidth=2.5, marker="o") if taught else dict(linewidth=1.2, marker=".", linestyle="--")
        kids, errors = ([row[key] for row in row_of.values()] for key in ("kid", "standard_error"))
        left.errorbar(list(row_of), kids, errors, capsize=2, label=name, **style)
        right.plot(list(row_of), [row["agreement"] for row in row_of.values()], **style)
    # Near 0 an unbiased estimate may be negative.
    left.set_yscale("symlog", linthresh=2e-3)
    left.set_ylabel("kernel distance to real images")
    right.set_ylabel("samples seen as the class that was asked for")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(EVALUATIONS, map(str, EVALUATIONS))
        axes.set_xlabel("evaluations of the network for each image")
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def picture(path, lines):
    """The same seeds by each of some lines, (title, checkpoint, (rule, grid, evaluations))."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(lines), 1, figsize=(8.4, 0.36 * len(lines)), layout="constrained")
    for line, (title, checkpoint, (rule, grid, n)) in zip(np.atleast_1d(axes), lines):
        images = checkpoint.draw(flags_for(rule, n, grid), PICTURED).images
        line.imshow(np.concatenate(list(images), axis=1).squeeze(), cmap="gray", vmin=0, vmax=255)
        line.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        line.set_xticks([])
        line.set_yticks([])
    figure.savefig(path, dpi=110)


def main():
    args = parser(__doc__)
    args.add_argument("--students", default="", help="comma-separated checkpoints or runs")
    args.add_argument(
        "--rules", default=",".join(RULES), help="of the teacher, comma-separated (default: all); empty: students only"
    )
    args = args.parse_args()
    rules = [rule for rule in args.rules.split(",") if rule]
    teacher = Checkpoint(args.model_path, args.batch_size)
    students = [path for path in args.students.split(",") if path]
    results = Results(
        RESULTS / f"few_steps_{args.name}.json",
        dict(model=args.model_path, num_samples=args.num_samples),
        ("students", "rows"),
    )
    for path in students:
        if not results.find("students", path=path):
            results.add("students", describe(path))
    sets = [real_images(f"{args.data_dir}/{part}", teacher.image_size, teacher.channels) for part in ("train", "test")]
    extractor = Classifier(teacher.channels, teacher.classes).fit(*sets[0])
    accuracy = (extractor.evaluate(sets[1][0])[1].argmax(axis=1) == sets[1][1]).mean()
    print(f"the classifier's accuracy on the real test images: {accuracy:.1%}")
    reference, _ = extractor.evaluate(np.concatenate([images for images, _ in sets]))
    lines = [(rule, grid_of(rule)) for rule in rules] + [(rule, "coarse") for rule in rules if rule in ON_COARSE]
    taught = [Student(facts, args.batch_size) for facts in results.content["students"]]
    wanted = [(each.name, each.checkpoint, each.line, n) for each in taught for n in each.evaluations]
    wanted += [(args.model_path, teacher, line, n) for line in lines for n in EVALUATIONS]
    wanted += [(args.model_path, teacher, BASELINE[:2], BASELINE[-1])] if rules else []
    for name, checkpoint, line, n in wanted:
        measure(results, name, checkpoint, line, n, extractor, reference, args.num_samples)
    rows = results.content["rows"]
    print(f"kernel distance x 1000 and agreement, {args.num_samples} samples, by evaluations of the network:")
    print(table(rows))
    if not rules:
        return
    plot(results.path.with_suffix(".png"), rows, {each.name for each in taught})
    shown = [(f"teacher, {BASELINE[-1]}", teacher, BASELINE)]
    shown += [(f"teacher, {line[0]} on {line[1]}, {n}", teacher, (*line, n)) for line in PICTURED_LINES for n in (4, 2)]
    shown += [
        (f"{each.name}, {n}", each.checkpoint, (*each.line, n))
        for each in taught
        for n in sorted(each.evaluations, reverse=True)
        if n <= 4
    ]
    picture(results.path.with_name(f"{results.path.stem}_samples.png"), shown)


if __name__ == "__main__":
    main()
