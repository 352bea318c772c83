"""Two of our networks layer by layer in PyTorch, and their training updates: what our speed is to be compared with.

    python benchmarks/torch_networks.py ddpmpp --out=results.jsonl            # on a GPU
    python benchmarks/torch_networks.py digits --device=cpu --dtype=float32

ddpmpp is DDPM++ of CIFAR-10 (models/song_unet.py) with EDM's preconditioning, noise and weight; digits is the UNet of
configs/digits.py (models/unet.py), which predicts v. Channels last, autocast for bfloat16, TF32 for float32 where
there is one, Adam, and the average of the parameters. First as it is, then, with --compile, through torch.compile. Not
part of the package, which does not need PyTorch. Augmentation is left out: its label is there, all zeros.
"""

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, LABELS, SIGMA_DATA = 10, 9, 0.5
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


class Residual(nn.Module):
    """models.blocks.ResidualBlock.

    modulated: the embedding gives scale and shift of the second norm; otherwise it is added in front of that norm, and
    skip paths that change the resolution are projected.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        norm: Callable[[int], nn.Module],
        how: str = "none",
        *,
        modulated: bool,
        dropout: float,
    ):
        super().__init__()
        self.how, self.modulated, self.dropout = how, modulated, dropout
        self.norm1, self.norm2 = norm(inputs), norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.project = nn.Linear(embedding, 2 * outputs if modulated else outputs)
        projected = inputs != outputs or (how != "none" and not modulated)
        self.skip = nn.Conv2d(inputs, outputs, 1) if projected else nn.Identity()
        self.scale = 1.0 if modulated else math.sqrt(0.5)

    def resample(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.how == "up" else x

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        condition = self.project(embedding)[:, :, None, None]
        if self.modulated:
            scale, shift = condition.chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm2(h + condition))
        h = self.conv2(F.dropout(h, self.dropout, self.training))
        return (self.skip(self.resample(x)) + h) * self.scale


class Attention(nn.Module):
    """models.blocks.AttentionBlock with one head."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module], scale: float):
        super().__init__()
        self.norm, self.scale = norm(channels), scale
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        h = F.scaled_dot_product_attention(*tokens.chunk(3, dim=-1))
        return (x + self.out(h.squeeze(1).transpose(1, 2).reshape(x.shape))) * self.scale


class UNet(nn.Module):
    """The stack that both networks have in common: encoder, middle, decoder, with skips by concatenation.

    A level of the decoder ends with the block that doubles the resolution; DDPM++ begins the next one with it, which is
    the same.
    """

    def __init__(
        self,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        embedding: int,
        image_channels: int,
        norm: Callable[[int], nn.Module],
        *,
        attention_levels: tuple[int, ...],
        attention_up: str,
        modulated: bool,
        dropout: float,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        scale = 1.0 if modulated else math.sqrt(0.5)

        def residual(inputs: int, outputs: int, how: str = "none") -> Residual:
            return Residual(inputs, outputs, embedding, norm, how, modulated=modulated, dropout=dropout)

        def attend(width: int, wanted: bool) -> nn.Module:
            return Attention(width, norm, scale) if wanted else nn.Identity()

        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        width, skips = channels, [channels]
        for level, wanted in enumerate(widths):
            for _ in range(blocks):
                pair = [residual(width, wanted), attend(wanted, level in attention_levels)]
                self.encoder.append(nn.ModuleList(pair))
                width = wanted
                skips.append(width)
            if level < len(widths) - 1:
                self.encoder.append(nn.ModuleList([residual(width, width, "down"), nn.Identity()]))
                skips.append(width)
        self.middle1, self.middle2 = residual(width, width), residual(width, width)
        self.middle_attention = Attention(width, norm, scale)
        for level, wanted in reversed(list(enumerate(widths))):
            for index in range(blocks + 1):
                attended = level in attention_levels and (attention_up == "all" or index == blocks)
                block = residual(width + skips.pop(), wanted)
                self.decoder.append(nn.ModuleList([block, attend(wanted, attended)]))
                width = wanted
            if level:
                self.decoder.append(nn.ModuleList([residual(width, width, "up"), nn.Identity()]))
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, image_channels, 3, padding=1)

    def stack(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
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


def sinusoids(value: torch.Tensor, features: int) -> torch.Tensor:
    half = features // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=value.device))
    angles = value[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class DDPMpp(UNet):
    """models.song_unet.SongUNet with its standard encoder and decoder, attention at half the resolution."""

    def __init__(self, channels: int):
        embedding = 4 * channels
        norm = lambda width: nn.GroupNorm(min(32, width // 4), width, eps=1e-6)  # noqa: E731
        super().__init__(
            *(channels, (2, 2, 2), 4, embedding, 3, norm),
            attention_levels=(1,),
            attention_up="last",
            modulated=False,
            dropout=0.13,
        )
        self.features = channels
        self.class_emb = nn.Linear(CLASSES, channels)
        self.augmentation_emb = nn.Linear(LABELS, channels, bias=False)
        self.dense0, self.dense1 = nn.Linear(channels, embedding), nn.Linear(embedding, embedding)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        h = sinusoids(time, self.features)
        h = h + self.class_emb(F.one_hot(label, CLASSES).float() * math.sqrt(CLASSES))
        h = h + self.augmentation_emb(torch.zeros(len(x), LABELS, device=x.device))
        return self.stack(x, F.silu(self.dense1(F.silu(self.dense0(h)))))


class Digits(UNet):
    """models.unet.UNet as configs/digits.py has it."""

    def __init__(self, channels: int):
        embedding = 4 * channels
        norm = lambda width: nn.GroupNorm(math.gcd(width, 8), width, eps=1e-6)  # noqa: E731
        super().__init__(
            *(channels, (1, 2), 1, embedding, 1, norm),
            attention_levels=(),
            attention_up="all",
            modulated=True,
            dropout=0.0,
        )
        self.features = channels
        self.class_emb = nn.Linear(CLASSES, embedding)
        self.dense0, self.dense1 = nn.Linear(channels, embedding), nn.Linear(embedding, embedding)

    def forward(self, x: torch.Tensor, time: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        h = self.dense1(F.silu(self.dense0(sinusoids(time, self.features))))
        return self.stack(x, F.silu(h + self.class_emb(F.one_hot(label, CLASSES).float())))


def edm_loss(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """EDM's loss of uint8 images (B, C, H, W)."""
    x = images.float() / 127.5 - 1
    sigma = torch.exp(1.2 * torch.randn(len(x), 1, 1, 1, device=x.device) - 1.2)
    total = sigma**2 + SIGMA_DATA**2
    z = x + sigma * torch.randn_like(x)
    output = network(z / total.sqrt(), sigma.flatten().log() / 4, labels).float()
    x_hat = SIGMA_DATA**2 / total * z + sigma * SIGMA_DATA / total.sqrt() * output
    return (total / (sigma * SIGMA_DATA) ** 2 * (x_hat - x) ** 2).mean()


def v_loss(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The squared error of x, weighted by max(SNR, 1), of a network that predicts v on the cosine schedule."""
    x = images.float() / 127.5 - 1
    angle = torch.rand(len(x), 1, 1, 1, device=x.device) * (math.pi / 2)
    alpha, sigma, eps = angle.cos(), angle.sin(), torch.randn_like(x)
    z = alpha * x + sigma * eps
    x_hat = alpha * z - sigma * network(z, 1000 * angle.flatten() / (math.pi / 2), labels).float()
    return ((alpha / sigma).clamp(min=1) ** 2 * (x_hat - x) ** 2).mean()


def where(update: Callable[[], None], updates: int) -> dict[str, float]:
    """Seconds of an update on CPUs that the profiler sees in convolutions, of both directions, and in all else."""
    with torch.profiler.profile() as seen:
        for _ in range(updates):
            update()
    found = {"convolutions": 0.0, "other": 0.0}
    for operation in seen.key_averages():
        part = "convolutions" if "conv" in operation.key else "other"
        found[part] += operation.self_cpu_time_total / 1e6 / updates
    return found


NETWORKS: dict[str, tuple[type[UNet], Loss, int, int, int]] = {  # loss, channels, side, channels of the image
    "ddpmpp": (DDPMpp, edm_loss, 128, 32, 3),
    "digits": (Digits, v_loss, 32, 8, 1),
}


def main() -> None:
    """The command lines at the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--channels", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--traced", type=int, default=0, help="further updates that the profiler watches, on CPUs")
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    if options.traced and options.device != "cpu":
        parser.error("--traced says where the time of CPUs goes: leave it away, or give --device=cpu")
    kind, plain_loss, channels, side, image_channels = NETWORKS[options.network]
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    network = kind(options.channels or channels).to(options.device, memory_format=torch.channels_last)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=options.device == "cuda")
    shape = (options.batch, image_channels, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=options.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, CLASSES, (options.batch,), device=options.device)
    wait = torch.cuda.synchronize if options.device == "cuda" else contextlib.nullcontext

    for compiled in (False, True)[: 2 if options.compile else 1]:
        loss = torch.compile(plain_loss) if compiled else plain_loss

        def update(loss: Loss = loss) -> None:
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
        for _ in range(2):
            update()
        wait()
        begun, updates = time.monotonic(), 0
        while updates < 2 or time.monotonic() - begun < options.seconds:
            update()
            updates += 1
        wait()
        rate = updates * options.batch / (time.monotonic() - begun)
        record = {
            "benchmark": "teacher",
            "network": options.network,
            "framework": f"torch {torch.__version__}" + (", compiled" if compiled else ""),
            "dtype": options.dtype,
            "parameters": parameters,
            "batch_size": options.batch,
            "images_per_second": rate,
            "compile_seconds": compile_seconds,
            "memory_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
            "hardware": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        }
        if options.traced:
            record["where"] = where(update, options.traced)
        print(json.dumps(record), flush=True)
        if options.out:
            with open(options.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
