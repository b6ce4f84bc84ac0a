"""Networks that images are judged by: exported programs and TorchScript, from a file or a URL."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch as th
from PIL import Image

from .. import distributed
from ..config import UserError
from ..utils import files
from . import untrusted
from .downloads import fetch

# The Inception network of the published scores (Szegedy et al. 2015), with the weights that TensorFlow gave out on
# 2015-12-05, in TorchScript form. It resizes images of other sizes itself, without antialiasing.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SIDE = 299
RESIZERS = 4  # threads
LARGEST = 1e12  # feature whose square, and its inverse, float32 holds
MAX_SPATIAL = 4096  # the time of the Frechet distance grows with the cube


class Outputs(NamedTuple):
    """What a network says of N images, float32."""

    features: np.ndarray  # [N, D]
    spatial: np.ndarray | None = None  # [N, S], where things are in the image, for the sFID
    probabilities: np.ndarray | None = None  # [N, C], of classes


class FeatureNetwork:
    """A program that maps uint8 [N, 3, H, W] to features [N, D], or to a dict of `features` [N, D] and, where it has
    them, `spatial` [N, S] and `logits` [N, C].

    A TorchScript program whose forward takes `return_features`, as those of the public Inception files do, is called
    with True for its features, and without it, but with `no_output_bias` where it takes that, for class probabilities.
    :param spec: a path, a URL or "inception".
    :param feature_size: the side to resize images to, "native" for none, "auto" for what the program needs.
    :param logits: a second program, to logits [N, C], or "".
    Raises UserError for files that are missing, damaged or could run code when loaded.
    """

    def __init__(self, spec: str, feature_size: str = "auto", logits: str = "", device: Any = "cpu"):
        self.device = device
        self.program = _Program(*_fetched("--features", spec), device)
        self.logits = _Program(*_fetched("--logits", logits), device) if logits else None
        self.name = os.path.basename(spec)
        self.side = _side(self.program, feature_size)

    def describe(self) -> dict[str, Any]:
        """What its numbers depend on."""
        about = {
            "features": self.name,
            "features_sha256": self.program.sha256,
            "feature_size": self.side or "native",
            "resized_by": "antialiased bicubic (Pillow)" if self.side else "nothing, or the program",
        }
        return {**about, "logits_sha256": self.logits.sha256} if self.logits else about

    def __call__(self, images: np.ndarray, probabilities: bool = True) -> Outputs:
        """uint8 [N, H, W, C] with 1 or 3 channels -> Outputs. Raises UserError where the program cannot take them.

        :param probabilities: whether those are wanted, which may cost another pass.
        """
        x, count = self._prepare(images), len(images)
        out = self.program(x, **self.program.for_features)
        named = out if isinstance(out, dict) else {"features": out}
        features = self.program.checked(named.get("features"), "features", count)
        spatial = self.program.checked(named["spatial"], "spatial", count) if "spatial" in named else None
        return Outputs(features, spatial, self._probabilities(x, named) if probabilities else None)

    def _probabilities(self, x: th.Tensor, named: dict[str, Any]) -> np.ndarray | None:
        if self.logits is not None:
            out = self.logits(x)
            return _softmax(self.logits.checked(out.get("logits") if isinstance(out, dict) else out, "logits", len(x)))
        if self.program.is_detector:
            scores = self.program(x, **self.program.for_probabilities)
            found = self.program.checked(scores, "probabilities", len(x))
            if (found < 0).any() or (abs(found.sum(axis=1) - 1) > 1e-3).any():
                raise UserError(
                    f"{self.program.flag} gives no probabilities without return_features: rows must sum to 1"
                )
            return found
        return _softmax(self.program.checked(named["logits"], "logits", len(x))) if "logits" in named else None

    def check(self, size: tuple[int, int], channels: int) -> Outputs:
        """What it says of noise (height, width). Raises UserError where it cannot take such images, and where what it
        says of an image depends on other images, or on chance."""
        noise = np.random.default_rng(0).integers(0, 256, (3, *size, channels), dtype=np.uint8)
        outputs = self(noise)
        again = np.concatenate([self(noise[:1], probabilities=False).features, self(noise[1:], False).features])
        if np.abs(again - outputs.features).max() > 1e-2 * np.abs(outputs.features).max():
            raise UserError(
                f"{self.program.flag} gives other features for the same image the next time, or among others: export "
                "the network in its eval() mode"
            )
        return outputs

    def _prepare(self, images: np.ndarray) -> th.Tensor:
        images = images.repeat(3, axis=3) if images.shape[3] == 1 else images
        if self.side and images.shape[1:3] != (self.side, self.side):
            with ThreadPoolExecutor(RESIZERS) as pool:
                resized = np.stack(list(pool.map(lambda image: _resize(image, self.side), images)))
            # The Inception files take real numbers, as the published code of Parmar et al. hands them; others bytes.
            images = resized if self.program.is_detector else np.rint(resized).astype(np.uint8)
        return th.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device)


class _Program:
    """One loaded file."""

    def __init__(self, path: str, flag: str, device: Any):
        self.flag = flag
        data = files.read_bytes(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.input_shape: tuple[int | None, ...] = (None,) * 4
        self.is_detector = False
        self.for_features: dict[str, bool] = {}
        self.for_probabilities: dict[str, bool] = {}
        try:
            members = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except zipfile.BadZipFile:
            raise UserError(f"{flag} is neither an exported program (.pt2) nor TorchScript (.pt), or cut off") from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one of the two forms is on its way out, for one
            try:
                if untrusted.is_program(members):
                    self.module = self._load_exported(untrusted.clean_program(data, flag)).to(device)
                elif untrusted.is_script(members):
                    self.module = self._load_script(untrusted.clean_script(data, flag), device)
                else:
                    raise UserError(
                        f"{flag} is neither an exported program (torch.export.save) nor TorchScript (torch.jit.save), "
                        "or cut off: a state dict alone does not say how to compute"
                    )
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"{flag} cannot be loaded: {_first_line(error)}") from None

    def _load_exported(self, data: bytes) -> th.nn.Module:
        exported = th.export.load(io.BytesIO(data))
        inputs = [
            node.meta["val"] for node in exported.graph.nodes
            if node.op == "placeholder" and node.name in exported.graph_signature.user_inputs
        ]  # fmt: skip
        if len(inputs) != 1 or not isinstance(inputs[0], th.Tensor) or inputs[0].ndim != 4:
            raise UserError(f"{self.flag} must take one tensor, uint8 [N, 3, H, W]; it takes {len(inputs)} inputs")
        self.input_shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        if self.input_shape[1] not in (None, 3) or inputs[0].dtype != th.uint8:
            raise UserError(
                f"{self.flag} takes {inputs[0].dtype} {tuple(inputs[0].shape)}: expected uint8 [N, 3, H, W]"
            )
        if self.input_shape[0] is not None:
            raise UserError(
                f"{self.flag} takes batches of {self.input_shape[0]} images only: export it with a dynamic first "
                "dimension"
            )
        return exported.module()

    def _load_script(self, data: bytes, device: Any) -> th.nn.Module:
        module = th.jit.load(io.BytesIO(data), map_location=device).eval()
        names = {argument.name for argument in module.forward.schema.arguments}
        self.is_detector = "return_features" in names
        if self.is_detector:
            self.for_features = {"return_features": True}
            self.for_probabilities = {"no_output_bias": True} if "no_output_bias" in names else {}
        return module

    @th.no_grad()
    def __call__(self, x: th.Tensor, **kwargs: bool) -> Any:
        # With tensor cores' ten bits the numbers would not be those of other machines.
        tf32, th.backends.cudnn.allow_tf32 = th.backends.cudnn.allow_tf32, False
        try:
            return self.module(x, **kwargs)
        except Exception as error:
            if distributed.is_out_of_memory(error):
                raise UserError(f"{self.flag} needs more memory than the GPU has free: lower --feature_batch") from None
            wanted = self.input_shape[2:]
            help = f"; it takes images of {wanted[0]}x{wanted[1]}: give --feature_size" if all(wanted) else ""
            raise UserError(
                f"{self.flag} cannot take {str(x.dtype).removeprefix('torch.')} images of {tuple(x.shape)} on "
                f"{x.device.type}{help} ({_first_line(error)})"
            ) from None
        finally:
            th.backends.cudnn.allow_tf32 = tf32

    def checked(self, value: Any, what: str, count: int) -> np.ndarray:
        """A result of so many images as float32 [count, D]. Raises UserError for one of another form."""
        if not isinstance(value, th.Tensor) or value.ndim < 2 or len(value) != count or value[0].numel() < 2:
            shape = f"a tensor of {tuple(value.shape)}" if isinstance(value, th.Tensor) else type(value).__name__
            raise UserError(
                f"{self.flag} gives {shape} as {what} of {count} images: expected [{count}, D], one row for each"
            )
        if what != "spatial" and value[0].numel() != value.shape[1]:
            raise UserError(
                f"{self.flag} gives {what} of {tuple(value.shape)} for {count} images: expected [{count}, D]; a "
                "program for features has to average over positions"
            )
        if what == "spatial" and value[0].numel() > MAX_SPATIAL:
            raise UserError(
                f"{self.flag} gives {value[0].numel():,} spatial features of each image: at most {MAX_SPATIAL:,} can "
                "be compared; give a few channels of a coarse layer, such as the published 7 of 17x17"
            )
        if value.is_complex():
            raise UserError(f"{self.flag} gives complex {what}: expected real numbers")
        array = value.flatten(1).float().cpu().numpy()
        largest = np.abs(array).max()
        if not np.isfinite(largest):
            raise UserError(
                f"{self.flag} gives {what} that are not finite numbers: the file is damaged, or not for such images"
            )
        if what in ("features", "spatial") and (largest > LARGEST or 0 < largest < 1 / LARGEST):
            raise UserError(
                f"{self.flag} gives {what} as large as {largest:.0e}, out of float32's reach: scale them to about 1"
            )
        if what == "logits" and (array >= 0).all() and (abs(array.sum(axis=1) - 1) < 1e-3).all():
            raise UserError(
                f"{self.flag} gives probabilities where logits are expected, which are taken before the softmax"
            )
        return array


def _softmax(logits: np.ndarray) -> np.ndarray:
    return th.from_numpy(logits).double().softmax(dim=1).numpy()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript puts its own trace first.
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error).__name__)


def _fetched(flag: str, spec: str) -> tuple[str, str]:
    """(the local path, what messages call it) of a file, a URL or "inception"."""
    path = fetch(INCEPTION_URL if spec == "inception" else spec, flag)
    return path, f"{flag} {spec}" + (f" ({path})" if path != spec else "")


def _side(program: _Program, feature_size: str) -> int:
    """The side to resize to; 0 for none."""
    if feature_size == "native":
        return 0
    height, width = program.input_shape[2:]
    fixed = height if height is not None and height == width else None
    if feature_size != "auto":
        if fixed is not None and fixed != int(feature_size):
            raise UserError(f"--feature_size {feature_size} contradicts {program.flag}, which takes {fixed}x{fixed}")
        return int(feature_size)
    return INCEPTION_SIDE if program.is_detector else fixed or 0


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [side, side, 3] in [0, 255], antialiased (Parmar et al. 2022, arXiv 2104.11222)."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0, 255)
