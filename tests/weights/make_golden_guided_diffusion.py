"""Writes golden_guided_diffusion.npz and golden_p2.npz: what the reference computes with small networks, drawn weights.

Run by hand, with torch, where a checkout of github.com/openai/guided-diffusion lies:

    python make_golden_guided_diffusion.py CHECKOUT

The first is built as the network of ImageNet-64, the second as those of 128 pixels and more and the light one of P2
(Choi et al. 2022): without classes, one block per level, and queries, keys and values in the older order.

The files hold names and shapes of all tensors, inputs and outputs, not the weights: drawn_tensors.py draws them again.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from drawn_tensors import drawn


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    write("golden_guided_diffusion", num_res_blocks=2, num_classes=3, use_new_attention_order=True)
    write("golden_p2", num_res_blocks=1, num_classes=None, use_new_attention_order=False)


def write(name: str, **settings) -> None:
    from guided_diffusion.unet import UNetModel

    net = UNetModel(
        image_size=16,
        in_channels=3,
        model_channels=128,
        out_channels=6,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        **settings,
    ).eval()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        for parameter, tensor in net.named_parameters():
            tensor.copy_(torch.from_numpy(drawn(parameter, tuple(tensor.shape))))
        labels = torch.tensor([2, 0]) if settings["num_classes"] else None
        raw = net(torch.from_numpy(x), torch.tensor([3.0, 700.0]), labels)
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in net.state_dict().items()}
    golden = {"shapes": json.dumps(shapes), "x": x.transpose(0, 2, 3, 1), "raw": raw.numpy().transpose(0, 2, 3, 1)}
    np.savez_compressed(pathlib.Path(__file__).with_name(f"{name}.npz"), **golden)


if __name__ == "__main__":
    main(*sys.argv[1:])
