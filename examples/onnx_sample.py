"""Draw images from an exported network, with onnxruntime, numpy and pillow alone.

improved-diffusion export --model_path runs/photos --to onnx --out unet.onnx
python examples/onnx_sample.py unet.onnx grid.png --steps 50
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def load(path):
    """(the network: a function of x, timesteps and y, what the file says of it)."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["improved_diffusion"])
    names = [each.name for each in session.get_inputs()]
    count = session.get_inputs()[0].shape[0]
    about["batch"] = count if isinstance(count, int) else None  # None: any number of images

    def network(**inputs):
        return session.run(None, {name: inputs[name] for name in names})[0]

    return network, about


def guided(network, about, x, timesteps, labels, scale):
    """The network's output, with classifier-free guidance (Ho & Salimans 2022) where the scale is not 1."""
    output = network(x=x, timesteps=timesteps, y=labels)
    if scale != 1:
        hidden = network(x=x, timesteps=timesteps, y=np.full_like(labels, about["hidden_class"]))
        C = x.shape[1]
        output[:, :C] = hidden[:, :C] + scale * (output[:, :C] - hidden[:, :C])
    return output


def sample(network, about, draw, labels, *, steps=50, ancestral=False, scale=1.0):
    """Images [N, C, H, W] in [-1, 1], by DDIM or by ancestral sampling.

    :param draw: gives standard normal noise of a shape.
    :param labels: int64 [N]; a network without classes ignores them.
    """
    C, T = about["shape"][0], len(about["betas"])
    all_alpha_bar = np.cumprod(1 - np.array(about["betas"]))
    t = np.arange(steps) * T // steps
    if all_alpha_bar[-1] == 0:  # trained on pure noise: start there
        t = T - 1 - t[::-1]
    alpha_bar = all_alpha_bar[t]
    previous = np.append(1.0, alpha_bar[:-1])
    x = draw((len(labels), *about["shape"]))
    for i in reversed(range(steps)):
        timesteps = np.full(len(x), t[i] * about["timestep_scale"], np.float32)
        output = guided(network, about, x.astype(np.float32), timesteps, labels, scale)
        x0 = np.clip(predict_x0(about["prediction"], output[:, :C], x, alpha_bar[i]), -1, 1)
        if ancestral:  # DDPM alg. 2
            beta = 1 - alpha_bar[i] / previous[i]
            x = np.sqrt(previous[i]) * beta * x0 + np.sqrt(1 - beta) * (1 - previous[i]) * x
            x /= 1 - alpha_bar[i]  # DDPM eq. 7
            if i:
                small = beta * (1 - previous[i]) / (1 - alpha_bar[i])
                x += np.sqrt(variance(about["variance"], output[:, C:], small, beta)) * draw(x.shape)
        else:  # DDIM eq. 12
            eps = (x - np.sqrt(alpha_bar[i]) * x0) / np.sqrt(1 - alpha_bar[i])
            x = np.sqrt(previous[i]) * x0 + np.sqrt(1 - previous[i]) * eps
    return x


def predict_x0(prediction, output, x, alpha_bar):
    """x_0 from what the network predicts at x."""
    if prediction == "x0":
        return output
    if prediction == "v":
        return np.sqrt(alpha_bar) * x - np.sqrt(1 - alpha_bar) * output
    return (x - np.sqrt(1 - alpha_bar) * output) / np.sqrt(alpha_bar)


def variance(kind, values, small, large):
    """The variance of an ancestral step, between the posterior's and beta where it is learned (IDDPM eq. 15)."""
    if kind == "learned_range":
        fraction = (values + 1) / 2
        return np.exp(fraction * np.log(large) + (1 - fraction) * np.log(small))
    return {"fixed_small": small, "fixed_large": large}[kind]


def grid(images):
    """One picture of images [N, C, H, W] in [-1, 1]."""
    pixels = np.clip((images + 1) * 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    columns = int(np.ceil(np.sqrt(len(pixels))))
    empty = np.zeros((-len(pixels) % columns, *pixels.shape[1:]), np.uint8)
    rows = np.concatenate([pixels, empty]).reshape(-1, columns, *pixels.shape[1:])
    return Image.fromarray(np.concatenate(np.concatenate(rows, axis=1), axis=1).squeeze())


def main():
    parser = argparse.ArgumentParser(description="Draw images from an exported network.")
    parser.add_argument("network", help="the .onnx file")
    parser.add_argument("out", help="the image file to write")
    parser.add_argument("--num", type=int, default=16, help="images, where the network takes any number")
    parser.add_argument("--label", help="a class, by name or number; all of them in turn unless given")
    parser.add_argument("--guidance", type=float, default=1.0, help="scale of classifier-free guidance")
    parser.add_argument("--sampler", choices=("ddim", "ancestral"), default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network, about = load(args.network)
    if about["low_res_shape"]:
        parser.error("this network enlarges images: it also takes low_res, which this example does not give")
    count, classes = about["batch"] or args.num, about["num_classes"]
    labels = np.arange(count) % max(classes, 1)
    if args.label is not None:
        names = about["class_names"] or []
        labels[:] = names.index(args.label) if args.label in names else int(args.label)
    if (args.guidance != 1 or args.label) and not classes:
        parser.error("this network has no classes")
    draw = np.random.default_rng(args.seed).standard_normal
    images = sample(
        network, about, draw, labels, steps=min(args.steps, len(about["betas"])), ancestral=args.sampler == "ancestral",
        scale=args.guidance,
    )  # fmt: skip
    grid(images).save(args.out)
    print(f"wrote {args.out}: {count} images")


if __name__ == "__main__":
    main()
