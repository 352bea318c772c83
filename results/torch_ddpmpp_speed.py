"""Training speed of DDPM++ of CIFAR-10 in PyTorch: what --mode=benchmark of configs/edm.py is to be compared with.

    python results/torch_ddpmpp_speed.py --out=results.jsonl

The layers of models/song_unet.py in channels-last bfloat16 autocast (or --dtype=float32, with TF32), EDM's
preconditioning, noise and weight, Adam and the average of the parameters; first as it is, then through torch.compile.
Not part of the package, which does not need PyTorch. Augmentation is left out: its label is there, all zeros.
"""

import argparse
import contextlib
import json
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, LABELS, SIGMA_DATA, SCALE = 10, 9, 0.5, math.sqrt(0.5)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class Residual(nn.Module):
    """models.blocks.ResidualBlock in the style of DDPM++: the embedding is added in front of the second norm."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float, how: str = "none"):
        super().__init__()
        self.how, self.dropout = how, dropout
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.project = nn.Linear(embedding, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or how != "none" else nn.Identity()

    def resample(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.how == "up" else x

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        h = F.silu(self.norm2(h + self.project(embedding)[:, :, None, None]))
        h = self.conv2(F.dropout(h, self.dropout, self.training))
        return (self.skip(self.resample(x)) + h) * SCALE


class Attention(nn.Module):
    """models.blocks.AttentionBlock with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        h = F.scaled_dot_product_attention(*tokens.chunk(3, dim=-1))
        return (x + self.out(h.squeeze(1).transpose(1, 2).reshape(x.shape))) * SCALE


class DDPMpp(nn.Module):
    """models.song_unet.SongUNet with its standard encoder and decoder, attention at half the resolution."""

    def __init__(self, channels: int, blocks: int = 4, multipliers: tuple[int, ...] = (2, 2, 2), dropout: float = 0.13):
        super().__init__()
        embedding, widths, self.features = 4 * channels, [channels * m for m in multipliers], channels
        self.class_emb = nn.Linear(CLASSES, channels)
        self.augmentation_emb = nn.Linear(LABELS, channels, bias=False)
        self.dense0, self.dense1 = nn.Linear(channels, embedding), nn.Linear(embedding, embedding)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, wanted in enumerate(widths):
            for _ in range(blocks):
                attention = Attention(wanted) if level == 1 else nn.Identity()
                self.encoder.append(nn.ModuleList([Residual(width, wanted, embedding, dropout), attention]))
                width = wanted
                skips.append(width)
            if level < len(widths) - 1:
                self.encoder.append(nn.ModuleList([Residual(width, width, embedding, dropout, "down"), nn.Identity()]))
                skips.append(width)
        self.middle1 = Residual(width, width, embedding, dropout)
        self.middle_attention = Attention(width)
        self.middle2 = Residual(width, width, embedding, dropout)
        for level, wanted in reversed(list(enumerate(widths))):
            for index in range(blocks + 1):
                attention = Attention(wanted) if level == 1 and index == blocks else nn.Identity()
                block = Residual(width + skips.pop(), wanted, embedding, dropout)
                self.decoder.append(nn.ModuleList([block, attention]))
                width = wanted
            if level:
                self.decoder.append(nn.ModuleList([Residual(width, width, embedding, dropout, "up"), nn.Identity()]))
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        half = self.features // 2
        frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=x.device))
        angles = time[:, None] * frequencies
        h = torch.cat([angles.sin(), angles.cos()], dim=1)
        h = h + self.class_emb(F.one_hot(label, CLASSES).float() * math.sqrt(CLASSES))
        h = h + self.augmentation_emb(torch.zeros(len(x), LABELS, device=x.device))
        embedding = F.silu(self.dense1(F.silu(self.dense0(h))))
        h = self.conv_in(x)
        skips = [h]
        for block, attention in self.encoder:
            h = attention(block(h, embedding))
            skips.append(h)
        h = self.middle2(self.middle_attention(self.middle1(h, embedding)), embedding)
        for block, attention in self.decoder:
            h = torch.cat([h, skips.pop()], dim=1) if block.how == "none" else h
            h = attention(block(h, embedding))
        return self.conv_out(F.silu(self.norm_out(h)))


def loss_of(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """EDM's loss of uint8 images (B, 3, H, W)."""
    x = images.float() / 127.5 - 1
    sigma = torch.exp(1.2 * torch.randn(len(x), 1, 1, 1, device=x.device) - 1.2)
    total = sigma**2 + SIGMA_DATA**2
    z = x + sigma * torch.randn_like(x)
    output = network(z / total.sqrt(), sigma.flatten().log() / 4, labels).float()
    x_hat = SIGMA_DATA**2 / total * z + sigma * SIGMA_DATA / total.sqrt() * output
    return (total / (sigma * SIGMA_DATA) ** 2 * (x_hat - x) ** 2).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    network = DDPMpp(options.channels).to(options.device, memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters} parameters", flush=True)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=options.device == "cuda")
    images = torch.randint(0, 256, (options.batch, 3, 32, 32), dtype=torch.uint8, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (options.batch,), device=options.device)
    wait = torch.cuda.synchronize if options.device == "cuda" else contextlib.nullcontext

    for compiled in (False, True):
        loss = torch.compile(loss_of) if compiled else loss_of

        def update(loss=loss) -> None:
            with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                value = loss(network, images, labels)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            torch._foreach_lerp_(average, list(network.parameters()), 1e-3)

        begun = time.monotonic()
        update()
        wait()
        compile_seconds = time.monotonic() - begun
        for _ in range(3):
            update()
        wait()
        begun, updates = time.monotonic(), 0
        while updates < 2 or time.monotonic() - begun < options.seconds:
            for _ in range(5):
                update()
            updates += 5
            wait()
        record = {
            "benchmark": "teacher",
            "framework": f"torch {torch.__version__}" + (", compiled" if compiled else ""),
            "dtype": options.dtype,
            "parameters": parameters,
            "batch_size": options.batch,
            "images_per_second": updates * options.batch / (time.monotonic() - begun),
            "compile_seconds": compile_seconds,
            "memory_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
            "hardware": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        }
        print(json.dumps(record), flush=True)
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
