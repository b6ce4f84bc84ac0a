"""Peak memory of a training step, by preset and activation checkpointing, without a GPU.

    python -m benchmarks.memory --out benchmarks/results/memory.json    the table, as on a GPU
    python -m benchmarks.memory --check                                 the same count against real steps on the CPU

The tensors of the table have shapes and no content (torch's device `meta`): the network takes its paths for GPUs, and
attention and dropout are the kernels that GPUs take. What is counted are the bytes of the tensors that operations
return, for as long as one of them lives: in forward and backward pass, gradients, AdamW, one moving average. Not
counted: what CUDA takes for itself, what cuDNN and kernels take while they run, and what torch keeps free in between.

A step of 2 images and one of 3 have the same operations, and their bytes are linear in the number of images, operation
by operation. So the two give the peak of any number. --check runs small networks on the CPU, with content under torch's
profiler and without (FakeTensorMode); the CPU's attention, norms and dropout keep other tensors than a GPU's.
"""

import argparse
import contextlib
import json
import sys
import weakref
from pathlib import Path
from unittest import mock

import torch as th
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.machine import PeakMemory
from improved_diffusion.config.presets import preset_options
from improved_diffusion.config.settings import ImageModel
from improved_diffusion.fp16_util import make_master_params, unflatten_master_params
from improved_diffusion.models.acceleration import checkpoint_levels
from improved_diffusion.models.build import build_model, with_levels
from improved_diffusion.utils.outline import outline

PRESETS = ("cifar10-hybrid", "imagenet64-hybrid", "lsun-bedroom", "adm-imagenet256")
LEVELS = ("", "0", "0,1", "0,1,2", "all")
CARD = 24e9  # bytes
SHARE = 0.9  # of the card for tensors
BATCH = 8  # of the table's second column
# Networks of the check, beside 32 channels and 16x16 images.
SMALL = (
    dict(num_res_blocks=1, channel_mult="1,2", attention_resolutions="8", num_heads=2, dropout=0.1),
    dict(num_res_blocks=2, channel_mult="1,2,2", attention_resolutions="8,4", num_head_channels=32, learn_sigma=True),
)
TOLERANCE = 0.05


class LiveMemory(TorchDispatchMode):
    """The bytes of all storages that operations have returned and that are still there, after each operation.

    Storages, not tensors: what autograd saves is another tensor on the same storage.
    """

    def __init__(self):
        super().__init__()
        self.now, self.timeline, self.known = 0, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, th.Tensor):
                self._note(tensor.untyped_storage())
        self.timeline.append(self.now)
        return out

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self.known.remove(key)
        self.now -= size


@contextlib.contextmanager
def gpu_kernels():
    """Attention and dropout by the kernels of NVIDIA GPUs, which torch does not choose for tensors without content."""

    def attention(q, k, v):
        if q.dtype == th.float32:
            return th.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
        return th.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    def dropout(x, p, training, inplace):
        return th.ops.aten.native_dropout(x, p, True)[0] if p else x

    with (
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        mock.patch.object(F, "dropout", dropout),
    ):
        yield


class Training:
    """A network, and what training keeps of it between two steps."""

    def __init__(self, settings, precision, levels, device):
        with outline() if device == "meta" else th.device(device):
            self.model = build_model(with_levels(settings.model), settings.diffusion.learn_sigma)
        checkpoint_levels(self.model, [int(level) for level in levels.split(",") if level and level != "all"])
        self.params = self.master = list(self.model.parameters())
        self.side = settings.model.image_size
        if precision != "fp32":
            self.master = make_master_params(self.params)
            getattr(self.model, f"convert_to_{precision}")()
        count = sum(p.numel() for p in self.master)
        self.kept = [th.zeros(count, device=device) for _ in range(3)]  # Adam's moments and the average
        if precision != "fp32":  # and the gradient of the master copy
            self.kept.append(th.zeros(count, device=device))

    def step(self, batch):
        """Forward and backward pass on images without meaning, and the update of the average.

        AdamW's one kernel for all parameters needs no memory beside the moments.
        """
        device = self.master[0].device
        x = th.zeros(batch, self.model.in_channels, self.side, self.side, device=device)
        y = {} if self.model.num_classes is None else {"y": th.zeros(batch, dtype=th.long, device=device)}
        self.model(x, th.zeros(batch, device=device), **y).square().mean().backward()
        if self.master is not self.params:  # as MasterCopy does
            grads = unflatten_master_params(self.params, self.kept[3:])
            th._foreach_copy_(grads, [p.grad for p in self.params])
            for p in self.params:
                p.grad = None
            with th.no_grad():
                th._foreach_copy_(self.params, unflatten_master_params(self.params, self.master))
        flat = self.master[0] if len(self.master) == 1 else th.cat([p.detach().view(-1) for p in self.master])
        self.kept[0].lerp_(flat.detach(), 1e-4)
        for p in self.master:
            p.grad = None


def network(preset, levels):
    """The settings of a preset, with checkpointing of all levels or as they are."""
    options = {name: value for name, value in preset_options(preset).items() if name in ImageModel.options()}
    settings = ImageModel.of({**options, "use_checkpoint": levels == "all"})
    return settings.replace(num_classes=1000) if settings.model.class_cond else settings


def timeline(settings, precision, levels, batch, device):
    """Bytes after each operation of the first step of a training."""
    with gpu_kernels() if device == "meta" else FakeTensorMode(), LiveMemory() as memory:
        training = Training(settings, precision, levels, device)
        memory.timeline = []
        training.step(batch)
        return memory.timeline


def peaks(settings, precision, levels):
    """A function from the number of images to the peak in bytes, as on a GPU."""
    two, three = (timeline(settings, precision, levels, batch, "meta") for batch in (2, 3))
    return lambda batch: max(few + (batch - 2) * (more - few) for few, more in zip(two, three, strict=True))


def most_images(peak, memory):
    """How many images fit."""
    most = 0
    for power in reversed(range(16)):
        if peak(most + 2**power) <= memory:
            most += 2**power
    return most


def table(presets, precision):
    """Print a row for each preset and choice of levels; returns them."""
    rows = []
    print(f"| preset | checkpointing of levels | 1 image, GB | {BATCH} images, GB | images on a card of 24 GB |")
    print("|---|---|---|---|---|")
    for preset in presets:
        for levels in LEVELS:
            peak = peaks(network(preset, levels), precision, levels)
            row = {"preset": preset, "levels": levels, "one": peak(1), f"of_{BATCH}": peak(BATCH),
                   "fits": most_images(peak, SHARE * CARD)}  # fmt: skip
            rows.append(row)
            sizes = f"{row['one'] / 1e9:.2f} | {row[f'of_{BATCH}'] / 1e9:.2f}"
            print(f"| `{preset}` | {levels or 'none'} | {sizes} | {row['fits']} |", flush=True)
    return rows


def measured(settings, precision, levels, batch):
    """The peak of a real step on the CPU, in bytes, by torch's profiler."""
    memory = PeakMemory()
    memory(lambda: Training(settings, precision, levels, "cpu").step(batch))
    return memory.most


def check():
    """(network, precision, levels, images, share of the real peak that the count is of) for small networks."""
    for options in SMALL:
        for levels in ("", "0", "all"):
            settings = ImageModel.of(
                {"image_size": 16, "num_channels": 32, **options, "use_checkpoint": levels == "all"}
            )
            for precision, batch in (("fp32", 2), ("bf16", 8)):
                counted = max(timeline(settings, precision, levels, batch, "cpu"))
                real = measured(settings, precision, levels, batch)
                yield options["channel_mult"], precision, levels, batch, counted / real


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--check", action="store_true", help="count and measure small networks on the CPU instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.check:
        shares = []
        for mult, precision, levels, batch, share in check():
            print(f"levels {mult}, {precision}, checkpointing {levels or 'none'}, {batch} images: {share:.3f}")
            shares.append(share)
        sys.exit(any(abs(share - 1) > TOLERANCE for share in shares))
    rows = table(args.presets.split(","), args.precision)
    if args.out:
        result = {"machine": "tensors without content", "torch": th.__version__, "precision": args.precision}
        args.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
