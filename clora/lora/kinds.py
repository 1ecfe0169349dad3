"""Updates that a file gives by other factors than a LoRA's, as the LoRA that is exactly them, or nearest to them.

    LoRA   B A                          LoHa   (w1_a w1_b) * (w2_a w2_b), element by element
    diff   the update itself            LoKr   w1 (x) w2, the Kronecker product; each of them may be w_a w_b

Each is scaled by alpha / dim, with dim the rank of the factors; a LoKr of two whole matrices and a diff have
none. Exactly, LoHa is a LoRA of rank r1 r2 (products of columns) and LoKr one of rank(w1) rank(w2) (as
(P Q) (x) (R S) = (P (x) R)(Q (x) S)). DoRA (`dora_delta`) needs the base's weight and has no exact LoRA.

Shape legend: N outputs, K inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from clora.lora.keys import Part
from clora.lora.module import LoraModule

Kind = Literal["LoRA", "LoHa", "LoKr", "diff"]
Shape = tuple[int, ...]
LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# Beyond so many columns the nearest update is sought in a space of random directions first.
_SMALL = 1024


def kind_of(parts: Mapping[Part, object]) -> Kind | None:
    """What a module's tensors are; None where they are of several kinds, or of none."""
    kinds: set[Kind] = set()
    for part in parts:
        if part in ("A", "B"):
            kinds.add("LoRA")
        elif part == "diff":
            kinds.add("diff")
        elif part.startswith(("hada", "lokr")):
            kinds.add("LoHa" if part.startswith("hada") else "LoKr")
    return kinds.pop() if len(kinds) == 1 else None


def missing_parts(kind: Kind, parts: Mapping[Part, object]) -> list[Part]:
    """The tensors that a module of this kind lacks."""
    if kind == "LoRA":
        return [f"lora_{part}" for part in ("A", "B") if part not in parts]
    if kind == "LoHa":
        return [part for part in LOHA_PARTS if part not in parts]
    if kind == "diff":
        return []
    missing = []
    for factor in ("lokr_w1", "lokr_w2"):
        halves = [half for half in (f"{factor}_a", f"{factor}_b") if half in parts]
        if factor not in parts and len(halves) < 2:
            missing.append(factor if not halves else f"{factor}_{'b' if halves[0].endswith('a') else 'a'}")
    return missing


def weight_shape(kind: Kind, shapes: Mapping[Part, Shape]) -> tuple[int, int] | None:
    """(N, K) of the weight that a module's matrices are for; None where they do not fit each other."""
    if kind == "diff":
        return shapes["diff"][0], shapes["diff"][1]
    if kind == "LoRA":
        return _product_shape(shapes["B"], shapes["A"])
    if kind == "LoHa":
        first = _product_shape(shapes["hada_w1_a"], shapes["hada_w1_b"])
        return first if first == _product_shape(shapes["hada_w2_a"], shapes["hada_w2_b"]) else None
    factors = [_factor_shape(shapes, name) for name in ("lokr_w1", "lokr_w2")]
    if factors[0] is None or factors[1] is None:
        return None
    return factors[0][0] * factors[1][0], factors[0][1] * factors[1][1]


def scale_dim(kind: Kind, shapes: Mapping[Part, Shape]) -> int | None:
    """What alpha is divided by; None where alpha plays no part."""
    if kind == "LoRA":
        return shapes["A"][0]
    names = {"LoHa": ("hada_w1_b",), "LoKr": ("lokr_w1_b", "lokr_w2_b"), "diff": ()}[kind]
    return next((shapes[name][0] for name in names if name in shapes), None)


def exact_rank(kind: Kind, shapes: Mapping[Part, Shape]) -> int:
    """The rank of the LoRA that `exact_module` makes."""
    N, K = weight_shape(kind, shapes) or (0, 0)
    if kind == "LoRA":
        return shapes["A"][0]
    if kind == "diff":
        return min(N, K)
    if kind == "LoHa":
        rank = shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0]
    else:
        rank = math.prod(
            min(shapes[name]) if name in shapes else shapes[f"{name}_b"][0] for name in ("lokr_w1", "lokr_w2")
        )
    return min(rank, N, K)


def exact_module(kind: Kind, values: Mapping[Part, Tensor], scale: float) -> LoraModule:
    """The LoRA that is exactly this update.

    A LoRA's own matrices stay as they are. What is computed is rounded once to fp32, or to fp64 where a tensor has
    that; of half precision the products of two factors are exact in fp32.
    """
    if kind == "LoRA":
        return LoraModule(values["A"], values["B"], scale * len(values["A"]))
    shapes = {part: tuple(value.shape) for part, value in values.items()}
    rank, (N, K) = exact_rank(kind, shapes), weight_shape(kind, shapes) or (0, 0)
    if rank == min(N, K):
        delta = _delta(kind, values)
        eye = torch.eye(rank, dtype=torch.float64)
        B_Nr, A_rK = (eye, delta) if N <= K else (delta, eye)
    else:
        B_Nr, A_rK = _factors(kind, values)
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values.values()) else torch.float32
    return LoraModule(A_rK.to(dtype), B_Nr.to(dtype), scale * rank)


def nearest_module(kind: Kind, values: Mapping[Part, Tensor], scale: float, rank: int) -> tuple[LoraModule, float]:
    """The LoRA of this rank that is nearest to an update, and what it lacks: ||D - B A|| / ||D||, 0 for D = 0.

    By the singular values of the factors, so that no update is formed but for a whole one (`diff`); fp32, alpha =
    rank, the singular values shared evenly between A and B. An update of this rank or less is taken exactly.
    """
    shapes = {part: tuple(value.shape) for part, value in values.items()}
    if exact_rank(kind, shapes) <= rank:
        return exact_module(kind, values, scale), 0.0
    if kind == "diff":
        return nearest_to(values["diff"].double() * scale, rank)
    if kind == "LoKr":
        U, sigma, Vh = _kron_svd(_factor(values, "lokr_w1"), _factor(values, "lokr_w2"), rank)
        return _cut(U, sigma, Vh, scale, rank)
    B_Nr, A_rK = (values["B"].double(), values["A"].double()) if kind == "LoRA" else _factors(kind, values)
    Q_NR, R_Rr = torch.linalg.qr(B_Nr)
    P_KR, S_Rr = torch.linalg.qr(A_rK.T)
    U, sigma, Vh = torch.linalg.svd(R_Rr @ S_Rr.T, full_matrices=False)
    return _cut(Q_NR @ U, sigma, Vh @ P_KR.T, scale, rank)


def nearest_to(delta_NK: Tensor, rank: int) -> tuple[LoraModule, float]:
    """The LoRA of this rank nearest to an update in fp64, and the part of it that is lost, as `nearest_module`."""
    if min(delta_NK.shape) <= max(_SMALL, rank):
        U, sigma, Vh = torch.linalg.svd(delta_NK, full_matrices=False)
        return _cut(U, sigma, Vh, 1.0, rank)
    # Of a fixed seed, so that equal files give equal results; more directions than asked for, since they are random.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, sigma, V = torch.svd_lowrank(delta_NK.float(), q=min(rank + 32, *delta_NK.shape), niter=6)
    module, _ = _cut(U.double(), sigma.double(), V.double().T, 1.0, rank)
    whole = float(delta_NK.norm())
    return module, float((delta_NK - module.delta()).norm()) / whole if whole else 0.0


def dora_delta(weight: Tensor, delta_NK: Tensor, norms: Tensor) -> Tensor:
    """The update of a weight by DoRA in fp64: m (W + D) / ||W + D|| - W.

    `norms` m are those of rows, (N,) or (N, 1), or of columns, (1, K).
    """
    W_NK = weight.double()
    turned = W_NK + delta_NK
    rows = norms.ndim == 1 or norms.shape[0] == W_NK.shape[0]
    length = turned.norm(dim=1 if rows else 0, keepdim=True)
    update: Tensor = turned * (norms.double().view(length.shape) / length) - W_NK
    return update


def whole_delta(kind: Kind, values: Mapping[Part, Tensor], scale: float) -> Tensor:
    """The update itself, (N, K) in fp64."""
    return _delta(kind, values) * scale


def _delta(kind: Kind, values: Mapping[Part, Tensor]) -> Tensor:
    if kind == "diff":
        return values["diff"].double()
    if kind == "LoRA":
        return values["B"].double() @ values["A"].double()
    if kind == "LoKr":
        return torch.kron(_factor(values, "lokr_w1"), _factor(values, "lokr_w2"))
    w1_a, w1_b, w2_a, w2_b = (values[part].double() for part in LOHA_PARTS)
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def _factors(kind: Kind, values: Mapping[Part, Tensor]) -> tuple[Tensor, Tensor]:
    """B (N, r) and A (r, K) of a LoHa or LoKr in fp64."""
    if kind == "LoHa":
        w1_a, w1_b, w2_a, w2_b = (values[part].double() for part in LOHA_PARTS)
        B_Nr = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        return B_Nr, (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    (left1, right1), (left2, right2) = (_split(values, name) for name in ("lokr_w1", "lokr_w2"))
    return torch.kron(left1, left2), torch.kron(right1, right2)


def _split(values: Mapping[Part, Tensor], name: Part) -> tuple[Tensor, Tensor]:
    """A factor of LoKr as a product over its rank."""
    if name not in values:
        return values[f"{name}_a"].double(), values[f"{name}_b"].double()
    whole = values[name].double()
    eye = torch.eye(min(whole.shape), dtype=whole.dtype)
    return (eye, whole) if whole.shape[0] <= whole.shape[1] else (whole, eye)


def _factor(values: Mapping[Part, Tensor], name: Part) -> Tensor:
    if name in values:
        return values[name].double()
    return values[f"{name}_a"].double() @ values[f"{name}_b"].double()


def _kron_svd(w1: Tensor, w2: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of a Kronecker product, the largest first, and the vectors of the first `rank`: products of
    the factors' own."""
    (U1, sigma1, Vh1), (U2, sigma2, Vh2) = (torch.linalg.svd(w, full_matrices=False) for w in (w1, w2))
    products = torch.outer(sigma1, sigma2).flatten()
    order = products.argsort(descending=True, stable=True)
    first, second = order[:rank] // len(sigma2), order[:rank] % len(sigma2)
    U = (U1[:, None, first] * U2[None, :, second]).flatten(0, 1)
    return U, products[order], (Vh1[first, :, None] * Vh2[second, None, :]).flatten(1)


def _cut(U: Tensor, sigma: Tensor, Vh: Tensor, scale: float, rank: int) -> tuple[LoraModule, float]:
    root = (sigma[:rank] * scale).sqrt()
    A_rK, B_Nr = root[:, None] * Vh[:rank], U[:, :rank] * root
    whole = float(sigma.norm())
    lost = float(sigma[rank:].norm()) / whole if whole else 0.0
    return LoraModule(A_rK.float(), B_Nr.float(), float(len(root))), lost


def _product_shape(left: Shape, right: Shape) -> tuple[int, int] | None:
    return (left[0], right[1]) if left[1] == right[0] else None


def _factor_shape(shapes: Mapping[Part, Shape], name: Part) -> tuple[int, int] | None:
    if name in shapes:
        return shapes[name][0], shapes[name][1]
    return _product_shape(shapes[f"{name}_a"], shapes[f"{name}_b"])
