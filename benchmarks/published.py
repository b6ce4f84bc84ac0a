"""The published way of computing, as a yardstick for speed: a network, its loss, its training step and its loader.

It does what OpenAI's improved-diffusion did, in our own words and with nothing of the package, so that it stays as it
is while the package becomes faster. What costs time there, and is kept here:

- attention in separate steps, its softmax in float32; group norms in float32 with a cast before and after; SiLU as a
  product of two tensors;
- the optimizer and the moving averages go over the parameters one by one; in float16 all parameters and gradients are
  copied into one flat float32 tensor and back in every step;
- the host waits for the device in every step: to look for gradients that are not finite, for the gradient's norm, and
  for every term of the loss, by quarter of the timesteps;
- coefficients are copied to the device each time that they are used;
- one worker process reads the images.

The state dict's names are the package's, so that both networks take the same weights.
"""

import math
from pathlib import Path

import numpy as np
import torch as th
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class SiLU(nn.Module):
    def forward(self, x):
        return x * th.sigmoid(x)


class Norm(nn.GroupNorm):
    def __init__(self, channels):
        super().__init__(32, channels)

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class Blocks(nn.Sequential):
    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class ResBlock(nn.Module):
    """A residual block with scale-shift norm."""

    def __init__(self, channels, out, emb, dropout):
        super().__init__()
        self.in_layers = nn.Sequential(Norm(channels), SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(emb, 2 * out))
        self.out_layers = nn.Sequential(Norm(out), SiLU(), nn.Dropout(dropout), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb).type(h.dtype)[..., None, None].chunk(2, dim=1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        flat = x.flatten(2)
        q, k, v = self.qkv(self.norm(flat)).view(len(x) * self.heads, -1, flat.shape[2]).chunk(3, dim=1)
        scale = q.shape[1] ** -0.25
        weights = th.einsum("nct,ncs->nts", q * scale, k * scale)
        weights = weights.float().softmax(dim=-1).type(weights.dtype)
        h = th.einsum("nts,ncs->nct", weights, v)
        return (flat + self.proj_out(h.reshape(flat.shape))).view(x.shape)


class UNet(nn.Module):
    """The network of an image model with scale-shift norms and resampling by convolutions.

    :param widths: of the levels.
    :param attention: whether each level has attention.
    """

    def __init__(self, channels, out_channels, widths, blocks, attention, heads, dropout=0.0, classes=0):
        super().__init__()
        self.width = widths[0]
        emb = 4 * self.width
        self.time_embed = nn.Sequential(nn.Linear(self.width, emb), SiLU(), nn.Linear(emb, emb))
        if classes:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList([Blocks(nn.Conv2d(channels, widths[0], 3, padding=1))])
        skips, ch = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                layers = [ResBlock(ch, width, emb, dropout), *([Attention(width, heads)] if attention[level] else [])]
                self.input_blocks.append(Blocks(*layers))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                self.input_blocks.append(Blocks(Downsample(ch)))
                skips.append(ch)
        self.middle_block = Blocks(ResBlock(ch, ch, emb, dropout), Attention(ch, heads), ResBlock(ch, ch, emb, dropout))
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(blocks + 1):
                layers = [ResBlock(ch + skips.pop(), width, emb, dropout)]
                ch = width
                if attention[level]:
                    layers.append(Attention(ch, heads))
                if level and i == blocks:
                    layers.append(Upsample(ch))
                self.output_blocks.append(Blocks(*layers))
        self.out = nn.Sequential(Norm(ch), SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1))

    def convert_to_fp16(self):
        """The convolutions of the blocks in float16."""
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in part.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d)):
                    module.half()

    def forward(self, x, timesteps, y=None):
        half = self.width // 2
        frequencies = th.exp(-math.log(10000) * th.arange(half, dtype=th.float32) / half).to(x.device)
        angles = timesteps[:, None].float() * frequencies
        emb = self.time_embed(th.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x.type(next(self.input_blocks.parameters()).dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(th.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.type(x.dtype))


class HybridLoss:
    """L_simple, and the bound's term that trains the learned variance (IDDPM eq. 15, 16), on the cosine schedule."""

    def __init__(self, steps):
        def alpha_bar(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        self.steps = steps
        betas = np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])
        kept = np.cumprod(1 - betas)
        before = np.append(1.0, kept[:-1])
        variance = betas * (1 - before) / (1 - kept)
        self.log_betas = np.log(betas)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.signal, self.noise = np.sqrt(kept), np.sqrt(1 - kept)
        self.to_x0, self.to_x0_noise = np.sqrt(1 / kept), np.sqrt(1 / kept - 1)
        self.mean_x0 = betas * np.sqrt(before) / (1 - kept)
        self.mean_xt = (1 - before) * np.sqrt(1 - betas) / (1 - kept)

    def __call__(self, model, x_0, t, noise, **kwargs):
        """The terms of each image: dict of [N] `mse`, `vb` and `loss`."""

        def at(table):
            return th.from_numpy(table).to(t.device)[t].float()[:, None, None, None].expand(x_0.shape)

        x_t = at(self.signal) * x_0 + at(self.noise) * noise
        eps, v = model(x_t, t.float() * (1000.0 / self.steps), **kwargs).chunk(2, dim=1)
        fixed = eps.detach()
        share = (v + 1) / 2
        log_variance = share * at(self.log_betas) + (1 - share) * at(self.log_variance)
        mean = at(self.mean_x0) * (at(self.to_x0) * x_t - at(self.to_x0_noise) * fixed) + at(self.mean_xt) * x_t
        true_mean, true_log_variance = at(self.mean_x0) * x_0 + at(self.mean_xt) * x_t, at(self.log_variance)
        kl = 0.5 * (
            -1.0 + log_variance - true_log_variance + th.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * th.exp(-log_variance)
        )  # fmt: skip
        vb = th.where(t == 0, _mean(-_log_likelihood(x_0, mean, 0.5 * log_variance)), _mean(kl)) / math.log(2.0)
        terms = {"mse": _mean((noise - eps) ** 2), "vb": vb * (self.steps / 1000.0)}
        terms["loss"] = terms["mse"] + terms["vb"]
        return terms


def _mean(x):
    return x.flatten(1).mean(dim=1)


def _log_likelihood(x, mean, log_scale):
    """log P(x) in nats under a Gaussian discretized to 256 levels (DDPM eq. 13)."""

    def cdf(z):
        return 0.5 * (1.0 + th.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * th.pow(z, 3))))

    def log(p):
        return th.log(p.clamp(min=1e-12))

    inverse = th.exp(-log_scale)
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    return th.where(x < -0.999, log(above), th.where(x > 0.999, log(1 - below), log(above - below)))


class Training:
    """The published training step, in float32, or with float16 blocks and a flat float32 master copy."""

    def __init__(self, model, loss, lr=1e-4, rate=0.9999, fp16=False):
        self.model, self.loss, self.rate, self.fp16 = model, loss, rate, fp16
        self.params = list(model.parameters())
        self.device = self.params[0].device
        self.masters, self.lg_scale = self.params, 20.0
        if fp16:
            self.masters = [nn.Parameter(th.cat([p.detach().float().view(-1) for p in self.params]))]
            model.convert_to_fp16()
            self.params = list(model.parameters())
        self.opt = th.optim.AdamW(self.masters, lr=lr)
        self.averages = [p.detach().clone() for p in self.masters]
        self.means = {}

    def step(self, batch, kwargs):
        """One step on a batch [N, C, H, W] in [-1, 1]."""
        for p in self.params:
            if p.grad is not None:
                p.grad.detach_()
                p.grad.zero_()
        batch = batch.to(self.device)
        kwargs = {name: value.to(self.device) for name, value in kwargs.items()}
        chosen = np.random.choice(self.loss.steps, size=(len(batch),), p=np.full(self.loss.steps, 1 / self.loss.steps))
        t = th.from_numpy(chosen).long().to(self.device)
        weights = th.ones(len(batch)).to(self.device)
        losses = self.loss(self.model, batch, t, th.randn_like(batch), **kwargs)
        loss = (losses["loss"] * weights).mean()
        self._note_losses(t, {name: value * weights for name, value in losses.items()})
        (loss * 2**self.lg_scale if self.fp16 else loss).backward()
        if self.fp16 and not self._collect_gradients():
            return
        self.means["grad_norm"] = math.sqrt(sum((p.grad**2).sum().item() for p in self.masters))
        self.opt.step()
        for average, p in zip(self.averages, self.masters):
            average.mul_(self.rate).add_(p.detach(), alpha=1 - self.rate)
        if self.fp16:
            self._copy_to_model()

    def _note_losses(self, t, losses):
        for name, values in losses.items():
            self.means[name] = values.mean().item()
            for one, value in zip(t.cpu().numpy(), values.detach().cpu().numpy()):
                self.means[f"{name}_q{int(4 * one / self.loss.steps)}"] = float(value)

    def _collect_gradients(self):
        """Move the gradient into the master copy; False where it is not finite, and the step is skipped."""
        if any(not th.isfinite(p.grad).all() for p in self.params):
            self.lg_scale -= 1
            return False
        self.masters[0].grad = th.cat([p.grad.detach().float().view(-1) for p in self.params])
        self.masters[0].grad.mul_(1.0 / 2**self.lg_scale)
        self.lg_scale += 1e-3
        return True

    def _copy_to_model(self):
        parts = self.masters[0].detach().split([p.numel() for p in self.params])
        for p, part in zip(self.params, parts):
            p.detach().copy_(part.view(p.shape))


def sample(model, loss, shape, steps, device, **kwargs):
    """Images [N, C, H, W] by ancestral sampling on so many evenly spaced steps of the process."""
    chosen = np.round(np.linspace(0, loss.steps - 1, steps)).astype(int)
    kept = loss.signal[chosen] ** 2
    before = np.append(1.0, kept[:-1])
    betas = 1 - kept / before
    variance = betas * (1 - before) / (1 - kept)
    tables = {
        "to_x0": np.sqrt(1 / kept), "to_x0_noise": np.sqrt(1 / kept - 1),
        "low": np.log(np.append(variance[1], variance[1:])), "high": np.log(betas),
        "mean_x0": betas * np.sqrt(before) / (1 - kept), "mean_xt": (1 - before) * np.sqrt(1 - betas) / (1 - kept),
    }  # fmt: skip
    x = th.randn(*shape, device=device)
    for i in reversed(range(steps)):
        t = th.tensor([i] * shape[0], device=device)

        def at(name, t=t):
            return th.from_numpy(tables[name]).to(device)[t].float()[:, None, None, None].expand(shape)

        with th.no_grad():
            seen = th.tensor(chosen, device=device)[t].float() * (1000.0 / loss.steps)
            eps, v = model(x, seen, **kwargs).chunk(2, dim=1)
            x_0 = (at("to_x0") * x - at("to_x0_noise") * eps).clamp(-1, 1)
            log_variance = (v + 1) / 2 * at("high") + (1 - (v + 1) / 2) * at("low")
            mean = at("mean_x0") * x_0 + at("mean_xt") * x
            x = mean + (t != 0).float()[:, None, None, None] * th.exp(0.5 * log_variance) * th.randn_like(x)
    return x


class Images(Dataset):
    """Image files as float32 [C, size, size] in [-1, 1]: halved by a box filter, resized, cropped in the centre."""

    def __init__(self, folder, size):
        self.paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".png"))
        self.size = size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with open(self.paths[index], "rb") as file:
            image = Image.open(file)
            image.load()
        while min(image.size) >= 2 * self.size:
            image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
        scale = self.size / min(image.size)
        image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
        array = np.array(image.convert("RGB"))
        top, left = ((side - self.size) // 2 for side in array.shape[:2])
        array = array[top : top + self.size, left : left + self.size].astype(np.float32) / 127.5 - 1
        return np.transpose(array, [2, 0, 1]), {}


def batches(folder, size, batch_size):
    """An endless iterator of (float32 [N, C, size, size], {})."""
    loader = DataLoader(Images(folder, size), batch_size=batch_size, shuffle=True, num_workers=1, drop_last=True)
    while True:
        yield from loader
