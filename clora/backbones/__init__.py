"""The diffusion models clora trains on. Only the modules in here know diffusers and transformers."""

import logging

# Where torchao is installed diffusers imports it at once, and each tells of parts of it that nothing here uses.
for _name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_name).setLevel(logging.ERROR)
