"""Makes the pictures of docs/ with the demo's model, after `make demo`.

    python docs/pictures.py                        (all of them)
    python docs/pictures.py samplers editing       (some)

Pictures below benchmarks/results come from the benchmark of their name; nll_terms_digits.png is nll_terms.png of the
command in docs/likelihood.md, loss_floor_digits.png is loss_floor.png of the one in docs/loss-floor.md. Screenshots of
the web page come from docs/screenshots.py.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import improved_diffusion as idf

DOCS = Path(__file__).resolve().parent
SCALE = 3  # digits are small
EVALUATIONS = (2, 4, 8, 15, 50)
SAMPLERS = ("ancestral", "ddim", "plms", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler", "heun")
DIGITS = list("0123456789")


def enlarge(array):
    """uint8 [H, W] as a larger picture."""
    return np.kron(array, np.ones((SCALE, SCALE), np.uint8))


def row(images, gap=4):
    """Grey images [N, H, W, 1] side by side."""
    cells = [np.pad(enlarge(image[..., 0]), gap // 2, constant_values=255) for image in images]
    return np.concatenate(cells, axis=1)


def labelled(rows, labels, columns=(), width=110, height=26):
    """Rows of pictures with a label before each, and a title above each column of equal width."""
    picture = np.concatenate(rows)
    top = height if columns else 0
    canvas = Image.new("L", (picture.shape[1] + width, picture.shape[0] + top), 255)
    canvas.paste(Image.fromarray(picture), (width, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for i, label in enumerate(labels):
        draw.text((4, top + (i + 0.5) * picture.shape[0] / len(rows)), label, fill=0, font=font, anchor="lm")
    for i, title in enumerate(columns):
        draw.text((width + (i + 0.5) * picture.shape[1] / len(columns), 6), title, fill=0, font=font, anchor="mt")
    return canvas


def digits(args, model):
    """digits.png: the demo's samples."""
    shutil.copy(Path(args.run) / "samples.png", DOCS / "digits.png")


def digits_neighbours(args, model):
    """digits_neighbours.png: from the demo's report."""
    shutil.copy(Path(args.run) / "report" / "report_neighbours.png", DOCS / "digits_neighbours.png")


def steps(args, model):
    """steps.png: predictions on the way from noise."""
    chosen = (0, 4, 7, 10, 13, 15, 17, 19)
    found = list(model.sample_steps(8, classes=list("01234567"), sampler="dpmpp_2m_sde", steps=20, seed=2))
    rows = [row([found[index].images.array[image] for index in chosen]) for image in range(8)]
    labelled(rows, [], [f"step {index + 1}" for index in chosen], width=0).save(DOCS / "steps.png")


def samplers(args, model):
    """samplers.png: the same two digits, by sampler and number of evaluations."""
    rows = []
    for name in SAMPLERS:
        cells = []
        for evaluations in EVALUATIONS:
            # PLMS evaluates once more than it has steps, Heun twice for each but the last.
            count = {"plms": evaluations - 1, "heun": (evaluations + 1) // 2}.get(name, evaluations)
            cells += list(model.sample(2, classes=["3", "8"], sampler=name, steps=count, seed=2, progress=False).array)
        rows.append(row(cells))
    labelled(rows, SAMPLERS, list(map(str, EVALUATIONS))).save(DOCS / "samplers.png")


def editing(args, model):
    """editing.png: variations, inpainting, interpolation and other classes of held-out digits."""
    first, last = (sorted(Path(args.digits, "test").glob(f"{digit}_*.png"))[0] for digit in (4, 9))
    size = model.settings.model.image_size
    mask = np.zeros((size, size), bool)
    mask[:, size // 2 :] = True
    common = dict(seed=0, progress=False)
    varied = [model.variations(first, strength=s, **common).array[0] for s in np.linspace(0.1, 1, 10)]
    painted = model.inpaint(first, mask, n=10, **common).array
    between = model.interpolate(first, last, frames=10, **common).array
    others = model.decode(model.encode(first), n=10, classes=DIGITS, progress=False).array
    rows = [row(images) for images in (varied, painted, between, others)]
    labelled(rows, ["variations", "inpaint", "interpolate", "decode"], width=90).save(DOCS / "editing.png")


PICTURES = {made.__name__: made for made in (digits, digits_neighbours, steps, samplers, editing)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--run", default="runs/digits", help="the demo's run, or another model of digits")
    parser.add_argument("--digits", default="data/digits", help="the demo's images")
    args = parser.parse_args()
    model = idf.load(args.run)
    for name in args.pictures or PICTURES:
        PICTURES[name](args, model)
        print(f"wrote {DOCS / name}.png")


if __name__ == "__main__":
    main()
