"""Writes torch_zip.pth and torch_legacy.pth, which test_torch_file.py reads. Needs torch (2.13.0 wrote them)."""

import pathlib

import torch

HERE = pathlib.Path(__file__).parent


def main() -> None:
    count = torch.arange(24, dtype=torch.float32)
    state = {
        "whole": count.reshape(2, 3, 4),
        "transposed": count.reshape(4, 6).T,
        "view": count[5:17:3],
        "half": (count / 7).half(),
        "brain": torch.tensor([1.0, 1.0078125, -3.0]).bfloat16(),
        "long": torch.tensor([2**40, -1]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "mask": torch.tensor([True, False]),
        "nested": {"parameter": torch.nn.Parameter(count[:3])},
        "step": 7,
    }
    torch.save(state, HERE / "torch_zip.pth")
    torch.save(state, HERE / "torch_legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
