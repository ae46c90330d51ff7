#!/usr/bin/env python
"""Fit the toy autoencoders that the quickstart ships: FLUX's kind (16 latent channels) and SDXL's (4), both 8x smaller.

    OMP_NUM_THREADS=1 python tools/fit_toy_vae.py --minutes 30 --output configs/quickstart/toy/ae.safetensors
    OMP_NUM_THREADS=1 python tools/fit_toy_vae.py --kind sdxl --minutes 16 --output configs/quickstart/toy/sdxl_vae.safetensors

That made the shipped files: 42.6 dB on average over the twelve photographs and 37.9 dB on the worst with 16 channels,
35.2 dB and 32.0 dB with 4.

They are fitted to the quickstart's own photographs, so they reconstruct those sharply and anything else only roughly: a
part for demonstrations, never for real work. First random 64 px crops at several scales teach it to draw edges and
textures, then whole pictures at the training sizes make it exact. The latents are pulled to zero mean and unit deviation
after the model's normalisation, and slightly disturbed before decoding, so that a denoiser's small mistakes stay small.

GroupNorm's 32 groups are a constant that the files do not carry. With 32 channels each group would hold one
channel and the norm would erase every channel's mean; hence 64 channels everywhere, two per group.
"""

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CHANNELS, GROUPS = 64, 32
TRAIN_SIZES = {(256, 256): (128, 128), (192, 320): (96, 160), (320, 192): (160, 96)}  # file -> training (width, height)
CROP = 64
POSTERIOR_STD = 0.02  # of the normalised latents: small, so that sampling the posterior changes nothing visible


@dataclass(frozen=True)
class Kind:
    """What differs between the models. Latents are (z - shift) * scale; ``quant``: a 1x1 convolution on either side of them."""

    latent_channels: int
    shift: float
    scale: float
    quant: bool


KINDS = {"flux": Kind(16, 0.1159, 0.3611, False), "sdxl": Kind(4, 0.0, 0.13025, True)}


def build(kind: Kind):
    """An untrained AutoencoderKL, residual branches closed."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(CHANNELS,) * 4, layers_per_block=1, norm_num_groups=GROUPS,
        latent_channels=kind.latent_channels, use_quant_conv=kind.quant, use_post_quant_conv=kind.quant,
    )
    for name, parameter in vae.named_parameters():
        if ".conv2." in name or "to_out" in name:
            torch.nn.init.zeros_(parameter)
    return vae


def load_photos(folder: Path) -> list[Image.Image]:
    pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))]
    if not pictures:
        raise SystemExit(f"no .jpg in {folder}")
    return pictures


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return data.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def jitter(picture: Tensor, draw: random.Random) -> Tensor:
    """Another light: overall gain, a gain per colour, an offset."""
    gain = torch.tensor([draw.uniform(0.9, 1.1) for _ in range(3)]).view(3, 1, 1) * draw.uniform(0.7, 1.2)
    return (picture * gain + draw.uniform(-0.2, 0.2)).clamp(-1, 1)


def random_crops(pictures: list[Image.Image], count: int, draw: random.Random) -> Tensor:
    """(count, 3, CROP, CROP): half at the training scale as they are, half scaled, mirrored and relit."""
    crops = []
    for index in range(count):
        picture = draw.choice(pictures)
        plain = index % 2 == 0
        side = CROP * 2 if plain else round(CROP * draw.uniform(1.0, 2.9))  # in pixels of the file
        left, top = draw.randint(0, picture.width - side), draw.randint(0, picture.height - side)
        crop = picture.resize((CROP, CROP), Image.Resampling.BOX, box=(left, top, left + side, top + side))
        if draw.random() < 0.5 and not plain:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = to_tensor(crop)
        crops.append(tensor if plain or draw.random() < 0.5 else jitter(tensor, draw))
    return torch.stack(crops)


def whole_pictures(pictures: list[Image.Image]) -> list[Tensor]:
    """The photographs at the training sizes, one batch (B, 3, H, W) per shape."""
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for picture in pictures:
        size = TRAIN_SIZES[picture.size]
        shapes.setdefault(size, []).append(to_tensor(picture.resize(size, Image.Resampling.BOX)))
    return [torch.stack(batch) for batch in shapes.values()]


def vary(batch: Tensor, draw: random.Random) -> Tensor:
    """Mirror or relight a quarter of the pictures each."""
    out = [picture.flip(-1) if draw.random() < 0.25 else picture for picture in batch]
    return torch.stack([jitter(picture, draw) if draw.random() < 0.25 else picture for picture in out])


def edges(pictures: Tensor) -> tuple[Tensor, Tensor]:
    return pictures[..., 1:, :] - pictures[..., :-1, :], pictures[..., :, 1:] - pictures[..., :, :-1]


def loss_of(vae, kind: Kind, pictures: Tensor, noise: torch.Generator, disturbance: float) -> Tensor:
    """Reconstruction (L1, squares, edges) plus the pull of the latents towards what the normalisation expects."""
    posterior = vae.encode(pictures).latent_dist  # mean and logvar: (B, C, h, w)
    normal = (posterior.mean - kind.shift) * kind.scale
    amount = disturbance * torch.rand(len(pictures), 1, 1, 1, generator=noise)
    disturbed = normal + amount * torch.randn(normal.shape, generator=noise)
    result = vae.decode(disturbed / kind.scale + kind.shift).sample
    error = result - pictures
    reconstruction = error.abs().mean() + 2 * error.square().mean()
    reconstruction = reconstruction + 0.5 * sum((a - b).abs().mean() for a, b in zip(edges(result), edges(pictures)))
    centre = normal.mean((0, 2, 3)).square().mean()
    spread = (normal.std((0, 2, 3)) - 1).square().mean()
    target_logvar = 2 * math.log(POSTERIOR_STD / kind.scale)
    return reconstruction + 0.05 * (centre + spread) + 1e-3 * (posterior.logvar - target_logvar).square().mean()


@torch.no_grad()
def psnr(vae, batches: list[Tensor]) -> list[float]:
    """Peak signal to noise ratio in dB of every photograph, through the mean of the posterior."""
    values = []
    for batch in batches:
        result = vae.decode(vae.encode(batch).latent_dist.mean).sample.clamp(-1, 1)
        error = (result - batch).div(2).square().mean((1, 2, 3))
        values += (-10 * error.log10()).tolist()
    return values


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for convolutions seen as matrices (Jordan et al. 2024, "Muon").

    Here it fits several dB further than Adam in the same time. Newton-Schulz iteration and its coefficients as published.
    """

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 0.05)
                matrix = parameter.grad.lerp(momentum, 0.95).flatten(1)  # (out, in * kernel)
                rows, columns = matrix.shape
                step = matrix if rows <= columns else matrix.T
                step = step / (step.norm() + 1e-7)
                for _ in range(5):
                    square = step @ step.T
                    step = 3.4445 * step + (-4.7750 * square + 2.0315 * square @ square) @ step
                step = step if rows <= columns else step.T
                parameter.add_(step.reshape_as(parameter), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def make_optimizers(vae) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices; AdamW for what meets pixels, for norms and biases."""
    ends = ("encoder.conv_in.", "decoder.conv_in.", "decoder.conv_out.")
    inner = [p for name, p in vae.named_parameters() if p.dim() > 1 and not name.startswith(ends)]
    known = {id(p) for p in inner}
    rest = [p for p in vae.parameters() if id(p) not in known]
    return [Muon(inner, lr=1e-2), torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def fit(vae, kind: Kind, pictures: list[Image.Image], *, minutes: float, seed: int, crops_share: float,
        disturbance: float) -> None:
    """Train in place for so many minutes of this process's CPU time."""
    draw, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    batches = whole_pictures(pictures)
    optimizers = make_optimizers(vae)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    start, reported, step = time.process_time(), 0.0, 0
    while (progress := (time.process_time() - start) / (60 * minutes)) < 1:
        course = min(1.0, (step + 1) / 50) * max(0.01, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group, learning_rate in groups:
            group["lr"] = learning_rate * course
        if progress < crops_share:
            shown = random_crops(pictures, 12, draw)
        else:
            shown = batches[step % len(batches)]
            shown = vary(shown, draw) if progress < (1 + crops_share) / 2 else shown
        loss = loss_of(vae, kind, shown, noise, disturbance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if progress - reported > 1 / 25:
            reported = progress
            values = psnr(vae, batches)
            print(f"{progress:4.0%} step {step} loss {loss.item():.4f} dB mean {sum(values) / len(values):.2f} "
                  f"worst {min(values):.2f}", flush=True)


@torch.no_grad()
def standardise(vae, kind: Kind, batches: list[Tensor]) -> None:
    """Fold what is left of scale, channel by channel, into the convolutions on both sides of the latent: an exact change.

    Deviations become 1 after normalisation. Means are left as they are (the decoder's convolution pads with zeros, so they
    cannot be moved exactly), but the fit has pulled them to within a few hundredths.
    """
    latents = torch.cat([vae.encode(batch).latent_dist.mean.transpose(0, 1).flatten(1) for batch in batches], dim=1)
    factor = 1 / (latents.std(1) * kind.scale)  # (C,)
    into, out_of = (vae.quant_conv, vae.post_quant_conv) if kind.quant else (vae.encoder.conv_out, vae.decoder.conv_in)
    for parameter in (into.weight, into.bias):
        parameter[:kind.latent_channels] *= factor.view(-1, *[1] * (parameter.dim() - 1))
    into.bias[kind.latent_channels:] += 2 * factor.log()  # the posterior's log variance
    out_of.weight /= factor.view(1, -1, 1, 1)


def save(vae, kind: Kind, path: Path) -> None:
    """As `ae.safetensors` of FLUX.1 or `sdxl_vae.safetensors`: the original names, here in half precision."""
    from library.checkpoint.autoencoder_keys import AUTOENCODER, AUTOENCODER_QUANT
    from library.checkpoint.export import export_module
    from library.checkpoint.keymap import module_shapes
    from library.checkpoint.writer import write_safetensors

    table = AUTOENCODER_QUANT if kind.quant else AUTOENCODER
    tensors = export_module(vae, table.bind(module_shapes(vae)), dtype=torch.float16)
    metadata = {"modelspec.license": "Apache-2.0", "modelspec.title": "Kiln toy autoencoder"}
    write_safetensors(path, tensors.entries, tensors.get, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the quickstart's autoencoders to its photographs.")
    parser.add_argument("--kind", choices=sorted(KINDS), default="flux")
    parser.add_argument("--photos", type=Path, default=Path("configs/quickstart/photos"), metavar="DIR")
    parser.add_argument("--output", type=Path, default=Path("configs/quickstart/toy/ae.safetensors"), metavar="FILE")
    parser.add_argument("--minutes", type=float, default=30, help="CPU time of this process, not of the clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disturbance", type=float, default=0.1, help="of the latents while fitting, in their deviations")
    parser.add_argument("--crops_share", type=float, default=0.2, help="part of the time spent on crops, not on whole pictures")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    kind = KINDS[arguments.kind]
    vae, pictures = build(kind), load_photos(arguments.photos)
    fit(vae, kind, pictures, minutes=arguments.minutes, seed=arguments.seed, crops_share=arguments.crops_share,
        disturbance=arguments.disturbance)
    batches = whole_pictures(pictures)
    standardise(vae, kind, batches)
    save(vae, kind, arguments.output)
    values = psnr(vae, batches)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.2f} MB, {sum(values) / len(values):.1f} dB, by picture "
          + " ".join(f"{value:.1f}" for value in values))


if __name__ == "__main__":
    main()
