"""served: the exported network is the eager model at its schedule's levels, in every shape and for both families."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from clora.backbones.load import load_backbone, rotary_positions, served_network
from clora.backbones.qwen_image.served import modulation_signal
from clora.export.onnx_graph import rotate as rotate_onnx
from clora.method.flow import few_step_sigmas
from tests.support.random_base import random_transformer

SIGMAS = few_step_sigmas(8, 3.0)
Grid = tuple[int, int]


def stock(
    model: Any, x: Tensor, refs: list[Tensor], grids: list[Grid], text: Tensor, mask: Tensor, step: Tensor
) -> Any:
    """The stock forward, as the pipeline calls it."""
    timestep = (SIGMAS[step] * 1000).to(x.dtype) / 1000
    with torch.no_grad():
        out = model(
            hidden_states=torch.cat([x, *refs], dim=1),
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *grid) for grid in grids]] * len(x),
            return_dict=False,
        )[0]
    return out[:, : x.shape[1]]


def served(
    model: Any, x: Tensor, refs: list[Tensor], grids: list[Grid], text: Tensor, step: Tensor, lens: Tensor
) -> Any:
    network = served_network(SimpleNamespace(transformer=model), SIGMAS)  # type: ignore[arg-type]
    cos, sin = positions(model, grids, text.shape[1])
    with torch.no_grad():
        return network(x, torch.cat(refs, dim=1), text, cos, sin, step, lens)


def positions(model: Any, grids: list[Grid], num_text: int) -> tuple[Tensor, Tensor]:
    from clora.backbones.qwen_image.served import rotary_positions as of_config

    return of_config(model.config, grids, num_text)


SHAPES = [
    ([(4, 4), (4, 4)], (17,)),
    ([(4, 6), (4, 6)], (9, 31)),
    ([(7, 3), (5, 3), (2, 2)], (24, 24, 24)),
    ([(8, 8), (8, 8)], (12, 30, 7, 25)),
    ([(2, 5), (3, 3)], (33, 20, 28, 5, 14, 40, 32, 3)),
]


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize(("grids", "lengths"), SHAPES)
def test_served_network_is_the_stock_forward(grids: list[Grid], lengths: tuple[int, ...], zero_cond_t: bool) -> None:
    model = random_transformer(zero_cond_t=zero_cond_t)
    rng = torch.Generator().manual_seed(len(lengths))
    B, M = len(lengths), 48
    x, *refs = (torch.randn(B, h * w, 64, generator=rng) for h, w in grids)
    text, lens = torch.randn(B, M, 32, generator=rng), torch.tensor(lengths)
    step = torch.arange(B) % 8
    mask = torch.arange(M) < lens[:, None]
    wanted = stock(model, x, refs, grids, text, mask, step)
    made = served(model, x, refs, grids, text, step, lens)
    assert (made - wanted).abs().max() <= 3e-6 * wanted.abs().max()
    # Every part shows.
    assert (served(model, x, refs, grids, text, (step + 1) % 8, lens) - made).abs().max() > 1e-3
    assert (served(model, x, [r + 1 for r in refs], grids, text, step, lens) - made).abs().max() > 1e-3
    assert (served(model, x, refs, grids, text + 1, step, lens) - made).abs().max() > 1e-3


def test_served_network_padded_text_changes_nothing() -> None:
    model, rng = random_transformer(), torch.Generator().manual_seed(0)
    x, ref = torch.randn(2, 12, 64, generator=rng), torch.randn(2, 6, 64, generator=rng)
    text, lens, step = torch.randn(2, 20, 32, generator=rng), torch.tensor([3, 11]), torch.tensor([0, 5])
    grids = [(3, 4), (2, 3)]
    made = served(model, x, [ref], grids, text, step, lens)
    other = text.clone()
    other[0, 3:], other[1, 11:] = 1e3, -1e3
    assert torch.equal(served(model, x, [ref], grids, other, step, lens), made)
    other[1, 10] = 0
    assert not torch.equal(served(model, x, [ref], grids, other, step, lens), made)


def test_served_network_a_sample_is_the_same_alone() -> None:
    model, rng = random_transformer(), torch.Generator().manual_seed(0)
    x, ref = torch.randn(4, 12, 64, generator=rng), torch.randn(4, 6, 64, generator=rng)
    text, lens, step = torch.randn(4, 32, 32, generator=rng), torch.tensor([3, 11, 30, 7]), torch.tensor([0, 5, 7, 2])
    grids = [(3, 4), (2, 3)]
    made = served(model, x, [ref], grids, text, step, lens)
    for i in range(4):
        one = slice(i, i + 1)
        alone = served(model, x[one], [ref[one]], grids, text[one], step[one], lens[one])
        assert (alone[0] - made[i]).abs().max() <= 3e-6 * made.abs().max()


@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_served_network_modulation_table_is_what_the_linears_give(dtype: torch.dtype, zero_cond_t: bool) -> None:
    model = random_transformer(zero_cond_t=zero_cond_t).to(dtype)
    network: Any = served_network(SimpleNamespace(transformer=model), SIGMAS)  # type: ignore[arg-type]
    levels = torch.cat([SIGMAS, torch.zeros(1)]) if zero_cond_t else SIGMAS
    temb = model.time_text_embed((levels * 1000).to(dtype) / 1000, torch.zeros(1, dtype=dtype))
    bar = 3e-6 if dtype == torch.float32 else 2e-2  # in bf16 the stock linears round twice on the way
    for served_block, block in zip(network.blocks, model.transformer_blocks, strict=True):
        for table, linear in ((served_block.img, block.img_mod), (served_block.txt, block.txt_mod)):
            assert table.shape == (8 + zero_cond_t, 6 * 48) and table.dtype == dtype
            wanted = linear(temb)
            assert (table.float() - wanted.float()).abs().max() <= bar * wanted.float().abs().max()
    # fp64 all the way, one rounding: nearer to exact than any forward in the weights' type can be.
    exact = modulation_signal(model, SIGMAS)
    assert exact.dtype == torch.float64
    linear = model.transformer_blocks[1].img_mod[1]
    table = network.blocks[1].img
    assert torch.equal(table, (exact @ linear.weight.double().T + linear.bias.double()).to(dtype))


def test_served_network_keeps_no_linear_of_modulation() -> None:
    network = served_network(SimpleNamespace(transformer=random_transformer()), SIGMAS)  # type: ignore[arg-type]
    names = [name for name, _ in network.named_parameters()]
    assert names and not any("mod" in name or "time" in name or "norm_out" in name for name in names)


def test_rotate_is_onnxs_operator() -> None:
    from clora.backbones.qwen_image.served import rotate

    rng = torch.Generator().manual_seed(0)
    x, angle = torch.randn(2, 3, 7, 16, generator=rng), torch.randn(7, 8, generator=rng)
    made = rotate(x, angle.cos(), angle.sin())
    assert (rotate_onnx(x, angle.cos(), angle.sin()) - made).abs().max() <= 1e-6
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    assert (torch.view_as_real(turned).flatten(-2) - made).abs().max() <= 1e-6


def test_rotary_positions_are_the_transformers_own() -> None:
    backbone = load_backbone("tiny", "cpu", torch.float32, ("transformer",))
    cos, sin = rotary_positions("tiny", [(4, 6), (8, 2)], 9)
    image, text = backbone.transformer.pos_embed(
        [[(1, 4, 6), (1, 8, 2)]], max_txt_seq_len=9, device=torch.device("cpu")
    )  # type: ignore[operator]
    wanted = torch.cat([image, text])
    assert torch.equal(cos, wanted.real) and torch.equal(sin, wanted.imag)
    assert cos.shape == (24 + 16 + 9, 16)


@pytest.mark.parametrize(("zero_cond_t", "table_mb"), [(False, 35.5), (True, 39.9)])
def test_served_network_at_full_size_is_a_third_smaller(zero_cond_t: bool, table_mb: float) -> None:
    """Counted at 60 blocks of width 3072 in bf16, without any weight."""
    config = {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584}
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config, zero_cond_t=zero_cond_t).to(torch.bfloat16)
        whole = sum(p.numel() for p in model.parameters())
        network: Any = served_network(SimpleNamespace(transformer=model), SIGMAS.to("meta"))  # type: ignore[arg-type]
    kept = sum(p.numel() for p in network.parameters())
    tables = sum(buffer.numel() * 2 for buffer in network.buffers())
    assert 2 * (whole - kept) == pytest.approx(13.65e9, rel=1e-3)
    assert tables == pytest.approx(table_mb * 1e6, rel=2e-3)
    assert 2 * kept + tables == pytest.approx(27.2e9, rel=5e-3)
