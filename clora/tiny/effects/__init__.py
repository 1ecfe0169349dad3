"""The drawings behind the effects of the tiny world.

Every effect is a function (Rendered, np.random.Generator) -> (H, W, 3) float32 about [0, 1]; those that draw from the
generator say from what. No pattern has a period under four or five pixels of 64, nor a hard edge: a small autoencoder
must be able to keep it.
"""

from clora.tiny.effects.table import EFFECTS, Effect, apply_effect, find_effect

__all__ = ["EFFECTS", "Effect", "apply_effect", "find_effect"]
