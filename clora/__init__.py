"""CollectionLoRA: many image-editing effects and few-step sampling distilled into one LoRA."""

__version__ = "0.1.0"
