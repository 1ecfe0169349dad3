"""Names of the linears that LoRA files and configurations speak of, by model family (so far Qwen-Image)."""

from __future__ import annotations

# The linear layers of one Qwen-Image block that an adapter usually covers.
BLOCK_LINEARS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mlp.net.0.proj",
    "img_mlp.net.2",
    "txt_mlp.net.0.proj",
    "txt_mlp.net.2",
    "img_mod.1",
    "txt_mod.1",
)

# What an adapter covers where `student.targets` names nothing: all of them (the authors' list), as suffixes of module
# names. Spelled as configurations always have, whose fingerprints compare words.
QWEN_IMAGE_TARGETS = tuple(name.removeprefix("attn.") for name in BLOCK_LINEARS)

# The linear layers outside the blocks, which few adapters cover.
TOP_LINEARS = (
    "img_in",
    "txt_in",
    "proj_out",
    "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2",
)
