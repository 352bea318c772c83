"""Writes golden_edm_networks.npz: what the reference implementation computes with tiny networks of drawn weights.

Run by hand, with torch, where a checkout of github.com/NVlabs/edm lies (its license allows no copy here):

    python make_golden_edm_networks.py CHECKOUT [FOLDER FOR THE PICKLES]

The file holds names and shapes of all tensors, inputs and outputs, not the weights: drawn_tensors.py draws them again.
"""

import json
import pathlib
import pickle
import sys

import numpy as np
import torch
from drawn_tensors import drawn

SONG = {"model_type": "SongUNet", "model_channels": 8, "num_blocks": 1, "attn_resolutions": [4], "augment_dim": 9}
NCSN = {**SONG, "embedding_type": "fourier", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]}
ADM = {"model_type": "DhariwalUNet", "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1}
VARIANTS = {
    "ddpmpp-cond": ("EDMPrecond", {**SONG, "channel_mult": [2, 2], "label_dim": 3}),
    "ddpmpp-uncond": ("VPPrecond", {**SONG, "channel_mult": [2, 2]}),
    "ddpmpp-64px": ("EDMPrecond", {**SONG, "channel_mult": [1, 2, 2], "sigma_data": 0.25}),
    "ncsnpp-cond": ("VEPrecond", {**NCSN, "channel_mult": [2, 2], "label_dim": 3, "encoder_type": "residual"}),
    "ncsnpp-64px": ("EDMPrecond", {**NCSN, "channel_mult": [1, 2, 2], "encoder_type": "residual"}),
    "skip-skip": ("EDMPrecond", {**NCSN, "channel_mult": [1, 2], "encoder_type": "skip", "decoder_type": "skip"}),
    "adm": ("EDMPrecond", {**ADM, "attn_resolutions": [4], "label_dim": 3, "augment_dim": 9}),
    "adm-iddpm": ("iDDPMPrecond", {**ADM, "attn_resolutions": [8, 4], "label_dim": 3}),
}
SIGMAS = [0.1, 2.0]


def draw_all(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Draws all weights of a module; returns the shape of every tensor, constants included."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not name.endswith("resample_filter"):
                tensor.copy_(torch.from_numpy(drawn(name, tuple(tensor.shape))))
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def main(checkout: str, folder: str = "") -> None:
    sys.path.insert(0, checkout)
    from generate import edm_sampler
    from training import networks

    golden = {}
    for name, (preconditioner, settings) in VARIANTS.items():
        net = getattr(networks, preconditioner)(img_resolution=8, img_channels=3, **settings).eval()
        shapes = draw_all(net.model)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
        label = torch.eye(3)[[2, 0]] if "label_dim" in settings else None
        augmentation = rng.standard_normal((2, 9)).astype(np.float32) if "augment_dim" in settings else None
        options = {} if augmentation is None else {"augment_labels": torch.from_numpy(augmentation)}
        with torch.no_grad():
            raw = net.model(torch.from_numpy(x), torch.tensor([-0.6, 0.9]), label, **options)
            denoised = net(torch.from_numpy(x), torch.tensor(SIGMAS), label, force_fp32=True)
        blocks = {path: module for path, module in net.model.named_modules() if hasattr(module, "num_heads")}
        facts = {
            "class": preconditioner,
            "attributes": {key: value for key, value in vars(net).items() if type(value) in (int, float)},
            "model": type(net.model).__name__,
            "blocks": {path: [block.num_heads, block.out_channels, block.dropout] for path, block in blocks.items()},
            "shapes": shapes,
        }
        golden[f"{name}/facts"] = json.dumps(facts)
        for key, images in (("x", x), ("raw", raw.numpy()), ("denoised", denoised.numpy())):
            golden[f"{name}/{key}"] = images.transpose(0, 2, 3, 1)
        if augmentation is not None:
            golden[f"{name}/augmentation"] = augmentation
        if name == "ddpmpp-cond":
            with torch.no_grad():
                images = edm_sampler(net, torch.from_numpy(x), label, num_steps=18)
            golden[f"{name}/sampled"] = images.numpy().astype(np.float32).transpose(0, 2, 3, 1)
        if folder:
            content = {"ema": net.requires_grad_(False), "loss_fn": None, "augment_pipe": None, "dataset_kwargs": {}}
            pathlib.Path(folder, f"{name}.pkl").write_bytes(pickle.dumps(content))
    np.savez_compressed(pathlib.Path(__file__).with_name("golden_edm_networks.npz"), **golden)


if __name__ == "__main__":
    main(*sys.argv[1:])
