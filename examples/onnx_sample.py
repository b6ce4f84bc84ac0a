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
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        about = json.loads(session.get_modelmeta().custom_metadata_map["improved_diffusion"])
    except Exception as error:  # onnxruntime raises many kinds
        reason = " ".join(str(error).split())
        raise SystemExit(f"{path} is no network of `improved-diffusion export --to onnx`: {reason}") from None
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
    parser.add_argument("--num", type=int, default=16, help="images to draw")
    parser.add_argument("--label", help="a class, by name or number; all of them in turn unless given")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="scale of classifier-free guidance")
    parser.add_argument("--sampler", choices=("ddim", "ancestral"), default="ddim")
    parser.add_argument("--steps", type=int, default=50, help="at most as many as the network was trained with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    network, about = load(args.network)
    check(args, about)
    batch = about["batch"] or args.num
    labels = np.arange(-(-args.num // batch) * batch) % max(about["num_classes"], 1)
    if args.label is not None:
        labels[:] = find_class(args.label, about)
    draw = np.random.default_rng(args.seed).standard_normal
    options = dict(steps=args.steps, ancestral=args.sampler == "ancestral", scale=args.guidance_scale)
    batches = [sample(network, about, draw, each, **options) for each in np.split(labels, len(labels) // batch)]
    images = np.concatenate(batches)[: args.num]
    grid(images).save(args.out)
    print(f"wrote {args.out}: {len(images)} images")


def check(args, about):
    """Refuse what the network cannot do."""
    T = len(about["betas"])
    if about["low_res_shape"]:
        raise SystemExit("this network enlarges images: it also takes low_res, which this example does not give")
    if args.num < 1:
        raise SystemExit(f"--num {args.num}: must be at least 1")
    if not 1 <= args.steps <= T:
        raise SystemExit(f"--steps {args.steps}: must be from 1 to {T}, the steps that the network was trained with")
    if (args.guidance_scale != 1 or args.label is not None) and not about["num_classes"]:
        raise SystemExit("this network has no classes: leave out --label and --guidance_scale")
    if args.guidance_scale != 1 and about["hidden_class"] is None:
        raise SystemExit("--guidance_scale: this network was never trained with its class hidden (--label_drop 0.1)")


def find_class(label, about):
    """The number of a class, given by name or number."""
    names = about["class_names"] or []
    if label in names:
        return names.index(label)
    if not (label.isdecimal() and int(label) < about["num_classes"]):
        known = f"{', '.join(names[:10])} or " if names else ""
        raise SystemExit(f"--label {label}: expected {known}a number from 0 to {about['num_classes'] - 1}")
    return int(label)


if __name__ == "__main__":
    main()
