"""Feature networks: exported programs and TorchScript, from a file or a URL."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch as th
from PIL import Image

from .. import distributed
from ..config import FeaturesConfig, UserError
from ..utils import files
from .downloads import ZIP_MAGIC, fetch
from .trust import INCEPTION_SHA256, check_trusted

# The Inception network of the published scores (Szegedy et al. 2015) with the TensorFlow weights of 2015-12-05, as
# TorchScript. It resizes images of other sizes itself, without antialiasing.
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SIDE = 299
RESIZERS = 4  # threads
LARGEST = 1e12  # the largest feature; float32 holds its square, and the inverse of that
MAX_SPATIAL = 4096  # the time of the Frechet distance grows with the cube
OLDER_PROGRAM = "serialized_exported_program.json"  # the graph in exported programs of torch up to 2.7


class Outputs(NamedTuple):
    """A network's outputs for N images, float32."""

    features: np.ndarray  # [N, D]
    spatial: np.ndarray | None = None  # [N, S], features of positions, for the sFID
    probabilities: np.ndarray | None = None  # [N, C], of classes


class FeatureNetwork:
    """A program that maps uint8 [N, 3, H, W] to features [N, D], or to a dict of `features` [N, D] and optionally
    `spatial` [N, S] and `logits` [N, C]. Loading is collective.

    A TorchScript program whose forward takes `return_features`, such as the public Inception files, is called with True
    for its features. For class probabilities it is called without, and with `no_output_bias` where it takes that.
    :param spec: a path, a URL or "inception".
    :param feature_size: the side to resize images to; "native": no resizing; "auto": what the program needs.
    :param logits: a second program, to logits [N, C]; "": none.
    :param trust: allow these programs, which can run any code; without, only known ones are loaded (see trust.py).
    Raises UserError for files that are missing, damaged or not trusted.
    """

    def __init__(
        self, spec: str, feature_size: str = "auto", logits: str = "", device: Any = "cpu", trust: bool = False
    ):
        self.device = device
        self.program = _Program("--features", spec, device, trust)
        self.logits = _Program("--logits", logits, device, trust) if logits else None
        self.name = os.path.basename(spec)
        self.side = _side(self.program, feature_size)

    @classmethod
    def of(cls, config: FeaturesConfig) -> FeatureNetwork:
        """The network that the options name, on this rank's device. Collective."""
        if not config.features:
            raise UserError(
                "--features is missing: name an exported program (.pt2), TorchScript (.pt), a URL, or inception"
            )
        return cls(config.features, config.feature_size, config.logits, distributed.dev(), config.trust_features)

    def describe(self) -> dict[str, Any]:
        """What its outputs depend on."""
        about = {
            "features": self.name,
            "features_sha256": self.program.sha256,
            "feature_size": self.side or "native",
            "resized_by": "antialiased bicubic (Pillow)" if self.side else "not resized, or by the program",
        }
        return {**about, "logits_sha256": self.logits.sha256} if self.logits else about

    def __call__(self, images: np.ndarray, probabilities: bool = True) -> Outputs:
        """uint8 [N, H, W, C] with 1 or 3 channels -> Outputs. Raises UserError where the program cannot take them.

        :param probabilities: compute those too, which may take another pass.
        """
        return self.run(self.prepare(images), probabilities)

    def run(self, x: th.Tensor, probabilities: bool = True) -> Outputs:
        """The same for images from `prepare`."""
        x, count = x.to(self.device), len(x)
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
                    f"{self.program.name} gives no probabilities without return_features: rows must sum to 1"
                )
            return found
        return _softmax(self.program.checked(named["logits"], "logits", len(x))) if "logits" in named else None

    def check(self, size: tuple[int, int], channels: int) -> Outputs:
        """The outputs for noise images of (height, width).

        Raises UserError where the program cannot take such images, and where an image's features are random or depend
        on the other images of the batch.
        """
        noise = np.random.default_rng(0).integers(0, 256, (3, *size, channels), dtype=np.uint8)
        outputs = self(noise)
        again = np.concatenate([self(noise[:1], probabilities=False).features, self(noise[1:], False).features])
        if np.abs(again - outputs.features).max() > 1e-2 * np.abs(outputs.features).max():
            raise UserError(
                f"{self.program.name} gives different features for the same image in another call or batch: export the "
                "network in its eval() mode"
            )
        return outputs

    def prepare(self, images: np.ndarray) -> th.Tensor:
        """uint8 [N, H, W, C] -> what the program takes, [N, 3, side, side] on the CPU."""
        images = images.repeat(3, axis=3) if images.shape[3] == 1 else images
        if self.side and images.shape[1:3] != (self.side, self.side):
            with ThreadPoolExecutor(RESIZERS) as pool:
                resized = np.stack(list(pool.map(lambda image: _resize(image, self.side), images)))
            # The Inception files get real numbers, as in the published code of Parmar et al.; others get bytes.
            images = resized if self.program.is_detector else np.rint(resized).astype(np.uint8)
        return th.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


class _Program:
    """One loaded file. Collective."""

    def __init__(self, flag: str, spec: str, device: Any, trust: bool):
        path = fetch(INCEPTION_URL, flag, INCEPTION_SHA256) if spec == "inception" else fetch(spec, flag)
        is_download = path != spec
        self.name = f"{flag} {spec}" + (f" ({path})" if is_download else "")
        data = files.read_bytes(path)
        self.sha256 = hashlib.sha256(data).hexdigest()
        if not data.startswith(ZIP_MAGIC):
            remedy = f"; remove {path} and {path}.sha256 to download it again" if is_download else ""
            raise UserError(
                f"{self.name} is neither an exported program (.pt2) nor TorchScript (.pt), or cut off{remedy}"
            )
        again = f"; if it is not the right file, remove {path} to download it again" if is_download else ""
        trusted = distributed.from_rank0(_check_trusted, self.name, path, self.sha256, trust, again)
        if trusted != self.sha256:
            raise UserError(f"{self.name} is another file on rank {distributed.get_rank()} than on rank 0: copy it")
        self.input_shape: tuple[int | None, ...] = (None,) * 4
        self.is_detector = False
        self.for_features: dict[str, bool] = {}
        self.for_probabilities: dict[str, bool] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that TorchScript is deprecated
            self.module = self._load(data, device)

    def _load(self, data: bytes, device: Any) -> th.nn.Module:
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
            if OLDER_PROGRAM in names or any(re.fullmatch(r"[^/]+/models/[^/]+", name) for name in names):
                return self._load_exported(data).to(device)
            if any(name.endswith("/data.pkl") for name in names) and any("/code/" in name for name in names):
                return self._load_script(data, device)
        except UserError:
            raise
        except zipfile.BadZipFile:
            raise UserError(
                f"{self.name} is neither an exported program (.pt2) nor TorchScript (.pt), or cut off"
            ) from None
        except Exception as error:
            raise UserError(f"{self.name} cannot be loaded: {_first_line(error)}") from None
        raise UserError(
            f"{self.name} is neither an exported program (torch.export.save) nor TorchScript (torch.jit.save), or cut "
            "off: a state dict alone does not say how to compute"
        )

    def _load_exported(self, data: bytes) -> th.nn.Module:
        exported = th.export.load(io.BytesIO(data))
        inputs = [
            node.meta["val"] for node in exported.graph.nodes
            if node.op == "placeholder" and node.name in exported.graph_signature.user_inputs
        ]  # fmt: skip
        if len(inputs) != 1 or not isinstance(inputs[0], th.Tensor) or inputs[0].ndim != 4:
            raise UserError(f"{self.name} must take one tensor, uint8 [N, 3, H, W]; it takes {len(inputs)} inputs")
        self.input_shape = tuple(size if isinstance(size, int) else None for size in inputs[0].shape)
        if self.input_shape[1] not in (None, 3) or inputs[0].dtype != th.uint8:
            raise UserError(
                f"{self.name} takes {inputs[0].dtype} {tuple(inputs[0].shape)}: expected uint8 [N, 3, H, W]"
            )
        if self.input_shape[0] is not None:
            raise UserError(
                f"{self.name} takes batches of {self.input_shape[0]} images only: export it with a dynamic first "
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

    @th.inference_mode()
    def __call__(self, x: th.Tensor, **kwargs: bool) -> Any:
        # TF32 keeps ten bits, and its results differ from those of other machines.
        tf32, th.backends.cudnn.allow_tf32 = th.backends.cudnn.allow_tf32, False
        try:
            return self.module(x, **kwargs)
        except Exception as error:
            if distributed.is_out_of_memory(error):
                raise UserError(f"{self.name} needs more memory than the GPU has free: lower --feature_batch") from None
            wanted = self.input_shape[2:]
            help = f"; it takes images of {wanted[0]}x{wanted[1]}: give --feature_size" if all(wanted) else ""
            raise UserError(
                f"{self.name} cannot take {str(x.dtype).removeprefix('torch.')} images of {tuple(x.shape)} on "
                f"{x.device.type}{help} ({_first_line(error)})"
            ) from None
        finally:
            th.backends.cudnn.allow_tf32 = tf32

    def checked(self, value: Any, what: str, count: int) -> np.ndarray:
        """A result for `count` images as float32 [count, D]. Raises UserError for another shape or unusable values."""
        if not isinstance(value, th.Tensor) or value.ndim < 2 or len(value) != count or value[0].numel() < 2:
            shape = f"a tensor of {tuple(value.shape)}" if isinstance(value, th.Tensor) else type(value).__name__
            raise UserError(
                f"{self.name} gives {shape} as {what} of {count} images: expected [{count}, D], one row for each"
            )
        if what != "spatial" and value[0].numel() != value.shape[1]:
            raise UserError(
                f"{self.name} gives {what} of {tuple(value.shape)} for {count} images: expected [{count}, D]; a "
                "program for features has to average over positions"
            )
        if what == "spatial" and value[0].numel() > MAX_SPATIAL:
            raise UserError(
                f"{self.name} gives {value[0].numel():,} spatial features of each image: at most {MAX_SPATIAL:,} can "
                "be compared; give a few channels of a coarse layer, such as the published 7 of 17x17"
            )
        if value.is_complex():
            raise UserError(f"{self.name} gives complex {what}: expected real numbers")
        array = value.flatten(1).float().cpu().numpy()
        largest = np.abs(array).max()
        if not np.isfinite(largest):
            raise UserError(
                f"{self.name} gives {what} that are not finite numbers: the file is damaged, or not for such images"
            )
        if what in ("features", "spatial") and (largest > LARGEST or 0 < largest < 1 / LARGEST):
            raise UserError(
                f"{self.name} gives {what} as large as {largest:.0e}, out of float32's range: scale them to about 1"
            )
        if what == "logits" and (array >= 0).all() and (abs(array.sum(axis=1) - 1) < 1e-3).all():
            raise UserError(
                f"{self.name} gives probabilities where logits are expected: export the values before the softmax"
            )
        return array


def _softmax(logits: np.ndarray) -> np.ndarray:
    return th.from_numpy(logits).double().softmax(dim=1).numpy()


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TorchScript puts its own trace first.
    return next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else type(error).__name__)


def _check_trusted(name: str, path: str, sha256: str, allow: bool, otherwise: str) -> str:
    check_trusted(name, path, sha256, allow, otherwise)
    return sha256


def _side(program: _Program, feature_size: str) -> int:
    """The side to resize to; 0 for none."""
    if feature_size == "native":
        return 0
    height, width = program.input_shape[2:]
    fixed = height if height is not None and height == width else None
    if feature_size != "auto":
        if fixed is not None and fixed != int(feature_size):
            raise UserError(f"--feature_size {feature_size} contradicts {program.name}, which takes {fixed}x{fixed}")
        return int(feature_size)
    return INCEPTION_SIDE if program.is_detector else fixed or 0


def _resize(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, 3] -> float32 [side, side, 3] in [0, 255], antialiased (Parmar et al. 2022, arXiv 2104.11222)."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
        for c in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0, 255)
