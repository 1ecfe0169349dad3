"""The diffusion models clora trains on. Only the modules in here know diffusers and transformers."""

import logging
from typing import Literal

# Where torchao is installed diffusers imports it at once, and each tells of parts of it that nothing here uses.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)

Kernels = Literal["auto", "reference", "fused"]  # what runs the transformer's blocks
COMPONENTS = ("vae", "text_encoder", "transformer")  # the parts of a base that have weights
