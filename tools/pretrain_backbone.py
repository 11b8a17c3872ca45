"""Pretrain the shipped backbone `wara_nano` on formula-made images, on a CPU.

    python tools/pretrain_backbone.py --out wara/weights

No photograph and no medical phantom is involved. The network learns three things at once, from
images drawn by `formula_images`:

* the category of the image (contours, fractals, textures, trees, webs, …), from the class token;
* per token, local statistics of the picture under it and around it: oriented energies and bright
  and dark blobs at several scales. One image gives as many lessons as it has tokens, which is what
  makes a run of this size worth something;
* the same statistics over the whole picture, and the drawn scale, count and stroke width, from
  the class token.

Most steps see 56 px images (49 tokens); the last ones 112 px, with resampled position embeddings.
The run is seeded; a rerun with the same options, threads and versions makes the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formula_images import FAMILIES, draw_pool
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = {"img_size": 112, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
SMALL, FULL = 56, 112
PER_FAMILY = 16
FILE = "wara_nano.safetensors"


def views(pool: Tensor, chosen: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return augmented colour images `[b, 3, size, size]` of uint8 grey ones, normalised.

    Crop, turn by quarters, mirror; then grey runs between two random colours, with uneven light and
    a little noise, so that colour and exposure tell nothing.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    grey = pool[chosen].float().div(255)[:, None]
    b = len(grey)
    scale = uniform(0.6, 1.0, b)
    turn = torch.randint(0, 4, (b,), generator=generator) * (math.pi / 2)
    mirror = torch.where(uniform(0, 1, b) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(turn) * scale, torch.sin(turn) * scale
    affine = torch.stack([cos * mirror, -sin, sin * mirror, cos], 1).reshape(b, 2, 2)
    shift = uniform(-1, 1, b, 2) * (1 - scale)[:, None]
    where = F.affine_grid(torch.cat([affine, shift[..., None]], 2), [b, 1, size, size], False)
    grey = F.grid_sample(grey, where, align_corners=False, padding_mode="reflection").clamp(0, 1)
    # Two colours a fair way apart in brightness, as in most pictures; sometimes dark on light.
    low = uniform(0, 0.4, b, 1, 1, 1)
    high = low + uniform(0.35, 0.6, b, 1, 1, 1)
    swap = uniform(0, 1, b, 1, 1, 1) < 0.4
    low, high = torch.where(swap, high, low), torch.where(swap, low, high)
    tinted = uniform(0, 1, b, 1, 1, 1) < 0.7
    spread = tinted * 0.18
    low = low + spread * torch.randn(b, 3, 1, 1, generator=generator)
    high = high + spread * torch.randn(b, 3, 1, 1, generator=generator)
    colour = low + (high - low) * grey ** torch.exp(uniform(-0.4, 0.4, b, 1, 1, 1))
    haze = F.interpolate(uniform(-0.5, 0.5, b, 3, 3, 3), size=(size, size), mode="bilinear")
    colour = colour + haze * uniform(0, 0.2, b, 1, 1, 1)
    noise = torch.randn(colour.shape, generator=generator)
    colour = colour + noise * uniform(0, 0.03, b, 1, 1, 1)
    return (colour.clamp(0, 1) - 0.5) / 0.5


def filter_bank() -> Tensor:
    """Return zero-mean filters `[19, 1, 15, 15]`.

    Gabor pairs of 4 orientations and 2 scales, which make 8 energies, and 3 Laplacians of
    Gaussians, which answer to bright and to dark blobs.
    """
    axis = torch.arange(15.0) - 7
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    filters = []
    for sigma, wavelength in ((1.2, 3.5), (2.4, 7.0)):
        for k in range(4):
            angle = k * math.pi / 4
            along = x * math.cos(angle) + y * math.sin(angle)
            envelope = torch.exp(-(x**2 + y**2) / (2 * sigma**2))
            for phase in (0.0, math.pi / 2):
                filters.append(envelope * torch.cos(2 * math.pi * along / wavelength + phase))
    for sigma in (0.9, 1.6, 2.8):
        r = (x**2 + y**2) / (2 * sigma**2)
        filters.append((1 - r) * torch.exp(-r))
    bank = torch.stack(filters)
    bank = bank - bank.mean((1, 2), keepdim=True)
    return (bank / bank.abs().sum((1, 2), keepdim=True))[:, None]


def statistics(images: Tensor, bank: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return local statistics per token and over the image.

    Args:
        images: `[b, 3, S, S]`.
        bank: of `filter_bank`.
        patch: side of a patch.

    Returns:
        `[b, n, 30]`: 14 responses and the spread of grey in each patch, and both over the 3 × 3
        patches around it, on a log scale; and `[b, 30]`, mean and maximum over the image.
    """
    grey = images.mean(1, keepdim=True)
    grey = grey / grey.std((2, 3), keepdim=True).clamp(min=0.05)
    found = F.conv2d(F.pad(grey, (7, 7, 7, 7), mode="reflect"), bank)
    energy = found[:, 0:16:2].square() + found[:, 1:16:2].square()
    blobs = found[:, 16:]
    maps = torch.cat([energy, F.relu(blobs).square(), F.relu(-blobs).square()], 1)
    inside = F.avg_pool2d(maps, patch)
    spread = F.avg_pool2d(grey**2, patch) - F.avg_pool2d(grey, patch) ** 2
    inside = torch.cat([inside, spread.clamp(min=0) * 0.05], 1)
    around = F.avg_pool2d(inside, 3, 1, 1, count_include_pad=False)
    local = torch.log(torch.cat([inside, around], 1) + 1e-4)
    whole = torch.cat([inside.mean((2, 3)), inside.amax((2, 3))], 1)
    return local.flatten(2).transpose(1, 2), torch.log(whole + 1e-4)


class Pretraining(nn.Module):
    """The backbone with its three heads."""

    def __init__(self, categories: int) -> None:
        super().__init__()
        self.vit = VisionTransformer(**ARCHITECTURE, num_classes=0, drop_path_rate=0.05)
        width = ARCHITECTURE["embed_dim"]
        self.category = nn.Linear(width, categories)
        self.drawn = nn.Linear(width, 3)
        self.whole = nn.Linear(width, 30)
        self.local = nn.Linear(width, 30)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return category logits, drawn quantities, global and local statistics."""
        tokens = self.vit.forward_features(images)
        first, patches = tokens[:, 0], tokens[:, 1:]
        return self.category(first), self.drawn(first), self.whole(first), self.local(patches)

    def resize(self, size: int) -> None:
        """Make the backbone take images of another size."""
        vit: Any = self.vit
        side = size // ARCHITECTURE["patch_size"]
        position = resample_abs_pos_embed(vit.pos_embed.data, [side, side], num_prefix_tokens=1)
        vit.pos_embed = nn.Parameter(position)
        vit.patch_embed.img_size = (size, size)
        vit.patch_embed.grid_size = (side, side)
        vit.patch_embed.num_patches = side * side


@torch.no_grad()
def head_start(vit: Any, images: Tensor) -> None:
    """Start where a short run would take long to get to, in place.

    The patch embedding becomes the whitened principal components of image patches, so that every
    token carries what is in its patch, fine detail included; positions become sines and cosines,
    and keys start equal to queries, so that tokens look at their like and near first.
    """
    patch, width = ARCHITECTURE["patch_size"], ARCHITECTURE["embed_dim"]
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).reshape(-1, 3 * patch**2)
    values, vectors = torch.linalg.eigh(torch.cov((patches - patches.mean(0)).T).double())
    top, axes = values[-width:].clamp(min=0), vectors[:, -width:]
    whitened = (axes / (top + 0.02 * top.max() ** 0.5 * top.min().clamp(min=1e-4) ** 0.5).sqrt()).T
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    vit.patch_embed.proj.weight.copy_((turn @ whitened).reshape(width, 3, patch, patch))
    vit.patch_embed.proj.bias.zero_()
    side = vit.patch_embed.grid_size[0]
    steps = torch.arange(side) / side * (2 * math.pi)
    waves = [f(k * steps) for k in (0.5, 1, 2, 3, 4, 6) for f in (torch.sin, torch.cos)]
    waves = torch.stack(waves, 1)
    along = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    place = torch.cat(along, 2).reshape(side * side, -1)
    vit.pos_embed.zero_()
    vit.pos_embed[0, 1:, : place.shape[1]] = place
    mix = torch.linalg.qr(torch.randn(width, width))[0]
    vit.pos_embed.copy_(vit.pos_embed @ mix)
    for block in vit.blocks:
        query, key, _ = block.attn.qkv.weight.chunk(3)
        nn.init.normal_(query, std=width**-0.5)
        key.copy_(query)


def quantities(targets: np.ndarray) -> Tensor:
    """Return log2 scale, count and width `[m, 3]`, standardised, NaN where there is none."""
    values = torch.from_numpy(targets[:, :3])
    return (values - torch.tensor([4.0, 4.0, 1.0])) / torch.tensor([1.5, 2.0, 1.0])


def train(args: argparse.Namespace) -> Pretraining:
    """Run the pretraining and return the network at 112 px."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, targets, labels = draw_pool(args.seed, 0, args.instances, PER_FAMILY)
    pool, drawn, labels = torch.from_numpy(images), quantities(targets), torch.from_numpy(labels)
    print(f"{len(pool)} images drawn", flush=True)
    network, bank = Pretraining(PER_FAMILY * len(FAMILIES)), filter_bank()
    network.resize(SMALL)
    first = torch.randint(0, len(pool), (512,), generator=generator)
    head_start(network.vit, views(pool, first, SMALL, generator))
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=args.lr, weight_decay=0.05, betas=(0.9, 0.95)
    )
    switch = round(args.steps * (1 - args.full))
    scales: list[tuple[Tensor, Tensor]] = []
    size, start = SMALL, time.time()
    for step in range(args.steps):
        if step == switch:
            before, size = network.vit.pos_embed, FULL
            network.resize(FULL)
            scales = []
            group = optimiser.param_groups[0]
            group["params"] = [network.vit.pos_embed if p is before else p for p in group["params"]]
        rate = min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimiser.param_groups:
            group["lr"] = args.lr * rate
        chosen = torch.randint(0, len(pool), (args.batch,), generator=generator)
        x = views(pool, chosen, size, generator)
        local, whole = statistics(x, bank, ARCHITECTURE["patch_size"])
        if not scales:
            scales = [(t.mean((0, 1)), t.std((0, 1)) + 1e-3) for t in (local, whole[:, None])]
        local, whole = ((t - m) / s for t, (m, s) in zip((local, whole), scales, strict=True))
        logits, guess, whole_guess, local_guess = network(x)
        known = torch.isfinite(drawn[chosen])
        losses = torch.stack(
            [
                F.cross_entropy(logits, labels[chosen], label_smoothing=0.05),
                F.mse_loss(guess[known], drawn[chosen][known]),
                F.mse_loss(whole_guess, whole),
                F.mse_loss(local_guess, local),
            ]
        )
        loss = (losses * torch.tensor([1.0, 0.5, 0.5, 1.0])).sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        if step % 50 == 0:
            right = (logits.argmax(1) == labels[chosen]).float().mean().item()
            parts = " ".join(f"{v:.3f}" for v in losses.tolist())
            print(f"step {step} px {size} losses {parts} top1 {right:.2f} "
                  f"{time.time() - start:.0f}s", flush=True)  # fmt: skip
        if step % 250 == 249:
            export(network, args)  # an interrupted run leaves something to look at
    return network


def export(network: Pretraining, args: argparse.Namespace) -> Path:
    """Write the backbone in float16, at 112 px."""
    state = {k: v.detach().clone() for k, v in network.vit.state_dict().items()}
    side = FULL // ARCHITECTURE["patch_size"]
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], [side, side], num_prefix_tokens=1
    )
    half = {key: value.half().contiguous() for key, value in state.items()}
    path = args.out / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path, metadata={"architecture": json.dumps(ARCHITECTURE)})
    return path


@torch.no_grad()
def held_out_accuracy(network: Pretraining, args: argparse.Namespace) -> float:
    """Return top-1 accuracy over categories on instances never trained on, 112 px."""
    images, _, labels = draw_pool(args.seed, args.instances, 4, PER_FAMILY)
    generator = torch.Generator().manual_seed(args.seed + 1)
    network.eval()
    right = 0
    for chosen in torch.arange(len(images)).split(64):
        logits = network(views(torch.from_numpy(images), chosen, FULL, generator))[0]
        right += int((logits.argmax(1).numpy() == labels[chosen.numpy()]).sum())
    return right / len(images)


@torch.no_grad()
def digits_accuracy(vit: nn.Module) -> float:
    """Return test accuracy of a linear probe on scikit-learn's digits, enlarged to 112 px."""
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None].div(8) - 1
    x = F.interpolate(x, size=(FULL, FULL), mode="bicubic").clamp(-1, 1).expand(-1, 3, -1, -1)
    vit.eval()
    features = torch.cat([vit.forward_features(part)[:, 0] for part in x.split(128)]).numpy()
    split = train_test_split(features, data.target, test_size=0.5, random_state=0)
    mean, spread = split[0].mean(0), split[0].std(0) + 1e-6
    probe = LogisticRegression(max_iter=2000).fit((split[0] - mean) / spread, split[2])
    return float(probe.score((split[1] - mean) / spread, split[3]))


def load(path: Path) -> VisionTransformer:
    """Return the exported backbone."""
    vit = VisionTransformer(**ARCHITECTURE, num_classes=0)
    vit.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return vit


def main() -> None:
    """Pretrain, export, evaluate, and write the scores beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--full", type=float, default=0.04, help="share of the steps at 112 px")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--instances", type=int, default=60, help="images per category")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="1 gives the same file anywhere")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.time()
    network = train(args)
    minutes = (time.time() - start) / 60
    path = export(network, args)
    torch.manual_seed(args.seed)
    scores = {
        "command": f"python tools/pretrain_backbone.py --steps {args.steps} --full {args.full} "
        f"--batch {args.batch} --instances {args.instances} --lr {args.lr} --seed {args.seed}",
        "categories": PER_FAMILY * len(FAMILIES),
        "held_out_top1": round(held_out_accuracy(network, args), 4),
        "digits_probe": round(digits_accuracy(load(path)), 4),
        "digits_probe_random_init": round(
            digits_accuracy(VisionTransformer(**ARCHITECTURE, num_classes=0)), 4
        ),
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (args.out / "wara_nano.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
