"""The diffusion models clora trains on. Only the modules in here know diffusers and transformers."""
