"""Adapter slots: whatever is loaded, switched, mixed or summed, a sample sees W + (alpha / rank) B A of its
own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clora.errors import InputError, InputErrors
from clora.lora.adapters import Adapters, inject_adapters
from clora.lora.layers import BLOCK_LINEARS, QWEN_IMAGE_TARGETS
from clora.lora.module import LoraModule
from clora.lora.recompute import checkpoint_fn
from tests.support.random_base import random_transformer

SHAPES = {"first": (6, 5), "last": (4, 6)}


class Toy(nn.Module):
    """Two linears with something nonlinear between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def toy(dtype: torch.dtype = torch.float64) -> tuple[Toy, Adapters]:
    torch.manual_seed(0)
    model = Toy().to(dtype)
    return model, inject_adapters(model, ["first", "last"])


def lora(seed: int, names: Any = ("first", "last"), rank: int = 2, alpha: float = 3.0) -> dict[str, LoraModule]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: LoraModule(
            torch.randn(rank, SHAPES[name][1], generator=rng),
            torch.randn(SHAPES[name][0], rank, generator=rng),
            alpha,
        )
        for name in names
    }


def expected(model: Toy, x: Tensor, *loras: dict[str, LoraModule]) -> Tensor:
    """The toy with fp64 weights W + sum of (alpha / r) B A."""
    first, last = model.first.weight.double(), model.last.weight.double()
    for modules in loras:
        first = first + (modules["first"].delta() if "first" in modules else 0)
        last = last + (modules["last"].delta() if "last" in modules else 0)
    return torch.tanh(x.double() @ first.T + model.first.bias.double()) @ last.T


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    # The adapters are held in fp32; everything else here is fp64.
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_inject_adapters_shares_and_freezes_the_weights() -> None:
    model = random_transformer()
    before = dict(model.named_parameters())
    adapters = inject_adapters(model, QWEN_IMAGE_TARGETS)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] and not after[name].requires_grad for name in before)
    assert len(adapters.linears) == 2 * len(QWEN_IMAGE_TARGETS)
    shapes = adapters.module_shapes
    assert shapes["transformer_blocks.1.img_mod.1"] == (6 * 48, 48) and "proj_out" not in shapes
    # Their names in full name the same layers.
    assert list(inject_adapters(random_transformer(), BLOCK_LINEARS).module_shapes) == list(shapes)


def test_inject_adapters_lists_unknown_targets() -> None:
    with pytest.raises(InputErrors) as caught:
        inject_adapters(random_transformer(), ["attn.to_q", "attn.to_qq", "q"])
    assert len(caught.value.faults) == 2
    assert "'attn.to_qq'" in caught.value.faults[0] and "'attn.to_q'" in caught.value.faults[0]
    model = random_transformer()
    inject_adapters(model, QWEN_IMAGE_TARGETS)
    with pytest.raises(ValueError, match="already"):
        inject_adapters(model, QWEN_IMAGE_TARGETS)


def test_without_use_the_base_alone() -> None:
    model, adapters = toy()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    plain = copy.deepcopy(model)
    adapters.add_stack("t", ["a"], 2, 2, trainable=False, init="zeros")
    adapters.load_slot("a", lora(0))
    assert_same(model(x), expected(plain, x), 1e-12)
    with adapters.use([None]):
        assert_same(model(x), expected(plain, x), 1e-12)


names = st.sampled_from([("first",), ("last",), ("first", "last")])
loras = st.builds(lora, st.integers(0, 10**6), names, st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0, 7.0]))


@given(
    teachers=st.lists(loras, min_size=1, max_size=5),
    moves=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=12),
    choice=st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=1, max_size=6),
)
@settings(max_examples=60)
def test_load_slot_any_order_of_switches(teachers: Any, moves: Any, choice: Any) -> None:
    model, adapters = toy()
    adapters.add_stack("teachers", ["t0", "t1", "t2"], 4, 4, trainable=False, init="zeros")
    held: list[dict[str, LoraModule]] = [{}, {}, {}]
    x = torch.randn(len(choice), 3, 5, dtype=torch.float64)
    for slot, teacher in moves:
        held[slot] = teachers[teacher % len(teachers)]
        adapters.load_slot(f"t{slot}", held[slot])
        for index, modules in enumerate(held):
            for name, (N, K) in SHAPES.items():
                wanted = modules[name].delta() if name in modules else torch.zeros(N, K, dtype=torch.float64)
                assert_same(adapters.delta(f"t{index}", name), wanted, 1e-12)
            found = adapters.slot_modules(f"t{index}")
            assert {n: (m.rank, m.alpha) for n, m in found.items()} == {
                n: (m.rank, m.alpha) for n, m in modules.items()
            }
            assert all(torch.equal(m.A, modules[n].A) and torch.equal(m.B, modules[n].B) for n, m in found.items())
        with adapters.use([None if index is None else f"t{index}" for index in choice]):
            found_y = model(x)
        wanted_y = [expected(model, x[i : i + 1], {} if s is None else held[s]) for i, s in enumerate(choice)]
        assert_same(found_y, torch.cat(wanted_y))


slot_names = ["s", "c", "t0", "t1", "t2"]
entries = st.one_of(
    st.none(),
    st.sampled_from(slot_names),
    st.lists(st.sampled_from(slot_names), min_size=1, max_size=3).map(tuple),
)


@given(
    choice=st.lists(entries, min_size=1, max_size=6),
    tokens=st.sampled_from([None, 1, 3]),
    repeats=st.integers(1, 3),
)
@settings(max_examples=150)
def test_use_mixed_batch_equals_single_samples(choice: Any, tokens: int | None, repeats: int) -> None:
    model, adapters = toy()
    adapters.add_stack("student", ["s"], 3, 6, trainable=True)
    adapters.add_stack("critic", ["c"], 2, 2, trainable=True)
    adapters.add_stack("teachers", ["t0", "t1", "t2"], 4, 4, trainable=False, init="zeros")
    held = {
        "s": lora(1, rank=3, alpha=6),
        "c": lora(2, rank=2),
        "t0": lora(3, rank=1, alpha=0.5),
        "t1": lora(4, ("last",), 4, 2.0),
        "t2": {},
    }
    for slot, modules in held.items():
        adapters.load_slot(slot, modules)
    # Rows beyond the batch are the batch again: row i belongs to sample i mod B.
    shape = (repeats * len(choice), 5) if tokens is None else (repeats * len(choice), tokens, 5)
    x = torch.randn(shape, dtype=torch.float64)
    with adapters.use(choice):
        found = model(x)
    wanted = []
    for row in range(shape[0]):
        entry = choice[row % len(choice)]
        slots = () if entry is None else (entry,) if isinstance(entry, str) else entry
        wanted.append(expected(model, x[row : row + 1], *(held[slot] for slot in slots)))
    assert_same(found, torch.cat(wanted))


def test_use_one_entry_holds_for_any_batch_and_more_must_divide_it() -> None:
    model, adapters = toy()
    adapters.add_stack("t", ["a", "b"], 2, 2, trainable=False, init="zeros")
    adapters.load_slot("a", lora(0))
    x = torch.randn(5, 5, dtype=torch.float64)
    with adapters.use(["a"]):
        assert_same(model(x), expected(model, x, lora(0)))
    with adapters.use(["a", "b"]), pytest.raises(ValueError, match="5 rows are no multiple of the 2 samples"):
        model(x)


def test_use_nests_and_restores_after_errors() -> None:
    model, adapters = toy()
    adapters.add_stack("t", ["a", "b"], 2, 2, trainable=False, init="zeros")
    adapters.load_slot("a", lora(0))
    adapters.load_slot("b", lora(1))
    x = torch.randn(2, 5, dtype=torch.float64)
    with adapters.use(["a"]):
        with pytest.raises(RuntimeError), adapters.use(["b", None]):
            assert_same(model(x)[:1], expected(model, x[:1], lora(1)))
            raise RuntimeError
        assert_same(model(x), expected(model, x, lora(0)))
    assert_same(model(x), expected(model, x), 1e-12)


def test_use_unknown_slot_names_the_known_ones() -> None:
    _, adapters = toy()
    adapters.add_stack("t", ["manga_tone", "clay"], 2, 2, trainable=False, init="zeros")
    with pytest.raises(InputError, match=r"unknown slot 'manga_ton'; did you mean 'manga_tone'\?"):
        with adapters.use(["manga_ton"]):
            pass
    with pytest.raises(InputError, match="known: manga_tone, clay"), adapters.use(["xyz"]):
        pass
    adapters.remove_stack("t")
    with pytest.raises(InputError, match="known: none"), adapters.use(["clay"]):
        pass


def test_load_slot_lists_every_misfit_and_changes_nothing() -> None:
    _, adapters = toy()
    adapters.add_stack("t", ["a"], 2, 2, trainable=False, init="zeros")
    adapters.load_slot("a", lora(0))
    before = adapters.delta("a", "first")
    bad = lora(1, rank=3) | {"middle": lora(2)["first"]}
    bad["last"] = LoraModule(torch.zeros(1, 6), torch.zeros(9, 1), 1.0)
    with pytest.raises(InputErrors) as caught:
        adapters.load_slot("a", bad)
    assert [fault.split(" ")[2] for fault in caught.value.faults] == ["first", "last", "middle"]
    assert torch.equal(adapters.delta("a", "first"), before)


def test_add_stack_lora_start_changes_nothing_and_ignores_global_state() -> None:
    model, adapters = toy()
    adapters.add_stack("a", ["a"], 4, 4, trainable=True, generator=torch.Generator().manual_seed(3))
    torch.randn(7)
    adapters.add_stack("b", ["b"], 4, 4, trainable=True, generator=torch.Generator().manual_seed(3))
    x = torch.randn(2, 5, dtype=torch.float64)
    with adapters.use(["a"]):
        assert_same(model(x), expected(model, x), 1e-12)
    for (name, a), b in zip(adapters.named_parameters("a").items(), adapters.parameters("b"), strict=True):
        assert torch.equal(a, b) and a.requires_grad and a.dtype == torch.float32
        bound = SHAPES[name[:-2]][1] ** -0.5
        assert (a.abs().max() <= bound and a.std() > bound / 3) if name.endswith(".A") else not a.any()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".A." not in name and ".B." not in name)


def test_init_slot_same_function_but_everything_can_learn() -> None:
    model, adapters = toy()
    adapters.add_stack("s", ["s"], 4, 8, trainable=True)
    given_lora = lora(0, ("last",), rank=2, alpha=3)
    adapters.init_slot("s", given_lora, torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, dtype=torch.float64)
    with adapters.use(["s"]):
        y = model(x)
    assert_same(y, expected(model, x, given_lora))
    assert {n: (m.rank, m.alpha) for n, m in adapters.slot_modules("s").items()} == {
        "first": (4, 8),
        "last": (4, 8),
    }
    y.square().sum().backward()
    gradient = adapters.named_parameters("s")["last.B"].grad
    assert gradient is not None and (gradient[0].abs().amax(0) > 0).all()  # the padding's columns too
    first = adapters.named_parameters("s")["first.B"].grad
    assert first is not None and first.abs().max() > 0


def test_remove_stack_takes_its_parameters_and_slots() -> None:
    model, adapters = toy()
    before = set(model.state_dict())
    adapters.add_stack("t", ["a"], 2, 2, trainable=True)
    assert len(set(model.state_dict()) - before) == 4
    adapters.remove_stack("t")
    assert set(model.state_dict()) == before and adapters.slot_names == () and not list(model.named_buffers())
    adapters.add_stack("t", ["a"], 3, 2, trainable=True)


@pytest.mark.parametrize("rows", [["s"], ["s"] * 4, [None, "s", "s", "t"], ["s", "t", "s", "t"], [("s", "t")] * 4])
def test_gradients_match_fp64_autograd(rows: Any) -> None:
    model, adapters = toy()
    adapters.add_stack("u", ["s", "t"], 3, 6, trainable=True)
    adapters.load_slot("s", lora(0, rank=3, alpha=6))
    adapters.load_slot("t", lora(1, rank=2, alpha=1))
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    with adapters.use(rows):
        model(x).square().sum().backward()
    full = rows * 4 if len(rows) == 1 else rows
    reference = {
        (slot, name, part): getattr(module, part).double().requires_grad_()
        for slot, modules in (("s", lora(0, rank=3, alpha=6)), ("t", lora(1, rank=2, alpha=1)))
        for name, module in modules.items()
        for part in ("A", "B")
    }
    scale = {"s": 2.0, "t": 0.5}
    x2 = x.detach().clone().requires_grad_()
    for i, entry in enumerate(full):
        weights = {name: getattr(model, name).weight.double() for name in SHAPES}
        for slot in () if entry is None else (entry,) if isinstance(entry, str) else entry:
            for name in SHAPES:
                update = reference[slot, name, "B"] @ reference[slot, name, "A"]
                weights[name] = weights[name] + scale[slot] * update
        y = torch.tanh(x2[i] @ weights["first"].T + model.first.bias) @ weights["last"].T
        y.square().sum().backward()
    assert_same(x.grad, x2.grad)
    for name, parameter in adapters.named_parameters("u").items():
        for index, slot in enumerate(("s", "t")):
            wanted = reference[slot, name[:-2], name[-1]].grad
            rank = 3 if slot == "s" else 2
            found = parameter.grad[index] if parameter.grad is not None else torch.zeros_like(parameter[index])
            found = found[:rank] if name.endswith("A") else found[:, :rank]
            assert_same(found, torch.zeros_like(found).double() if wanted is None else wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slot_linear_matches_peft(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Toy()
    peft_model = inject_adapter_in_model(
        LoraConfig(r=3, lora_alpha=6, target_modules=["first", "last"]), copy.deepcopy(model)
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapters = inject_adapters(model.to(dtype), ["first", "last"])
    adapters.add_stack("s", ["s"], 3, 6, trainable=True)
    adapters.load_slot(
        "s",
        {
            name: LoraModule(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 6.0)
            for name in SHAPES
            for layer in [peft_model.get_submodule(name)]
        },
    )
    x = torch.randn(64, 7, 5)
    y_peft = peft_model(x)
    y_peft.square().mean().backward()
    with adapters.use(["s"]):
        y = model(x.to(dtype))
    y.square().mean().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), y_peft, rtol=tolerance, atol=tolerance)
    for name, parameter in adapters.named_parameters("s").items():
        layer = peft_model.get_submodule(name[:-2])
        wanted = getattr(layer, f"lora_{name[-1]}")["default"].weight.grad
        assert parameter.grad.dtype == torch.float32  # the master's
        error = (parameter.grad[0] - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), name


@pytest.mark.parametrize("rows", [["s"], [None, "s", "t"], ["t", "s", ("s", "t")]])
@pytest.mark.parametrize("zero_cond_t", [False, True])
def test_checkpoint_fn_same_gradients(rows: Any, zero_cond_t: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = random_transformer(zero_cond_t=zero_cond_t)
        adapters = inject_adapters(model, QWEN_IMAGE_TARGETS)
        adapters.add_stack("u", ["s", "t"], 3, 6, trainable=True, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for i, parameter in enumerate(adapters.parameters("u")):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
        if checkpointed:
            model.enable_gradient_checkpointing(checkpoint_fn(adapters.choice))
        rng = torch.Generator().manual_seed(1)
        with adapters.use(rows):
            out = model(
                torch.randn(3, 8, 64, generator=rng),
                torch.randn(3, 5, 32, generator=rng),
                timestep=torch.tensor([0.9, 0.5, 0.1]),
                img_shapes=[[(1, 2, 2), (1, 2, 2)]] * 3,
            ).sample
        loss = out.square().sum()
        parameters = adapters.named_parameters("u")
        loss.backward(retain_graph=True)  # outside of `use`, as training does
        once = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        loss.backward()
        gradients.append([once, {name: p.grad for name, p in parameters.items() if p.grad is not None}])
    # All but the last block's text side, which the output does not see.
    assert sum(bool(gradient.any()) for gradient in gradients[0][0].values()) > 0.7 * len(parameters)
    for plain, checkpointed_ in zip(*gradients, strict=True):
        assert plain.keys() == checkpointed_.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed_[name], gradient, rtol=0, atol=0)


def test_checkpoint_without_the_slots_would_be_wrong() -> None:
    # The test above must be able to fail: the stock function recomputes the base.
    model = random_transformer()
    adapters = inject_adapters(model, QWEN_IMAGE_TARGETS)
    adapters.add_stack("s", ["s"], 3, 6, trainable=True)
    model.enable_gradient_checkpointing()
    with adapters.use(["s"]):
        out = model(torch.randn(1, 4, 64), torch.randn(1, 5, 32), timestep=torch.ones(1), img_shapes=[[(1, 2, 2)]])
    with pytest.raises(Exception, match="checkpoint"):
        out.sample.square().sum().backward()


@pytest.mark.parametrize("slot", ["a", ("a", "b"), "empty"])
def test_merged_same_result_and_restores_bitwise(slot: Any) -> None:
    model, adapters = toy(torch.float32)
    adapters.add_stack("t", ["a", "b", "empty"], 2, 2, trainable=False, init="zeros")
    held = {"a": lora(0), "b": lora(1, ("first",)), "empty": {}}
    for name, modules in held.items():
        adapters.load_slot(name, modules)
    weights = {name: getattr(model, name).weight for name in SHAPES}
    copies = {name: weight.clone() for name, weight in weights.items()}
    x = torch.randn(3, 5)
    plain = model(x)
    used = [held[name] for name in ((slot,) if isinstance(slot, str) else slot)]
    with torch.no_grad(), adapters.use(["a"]), adapters.merged(slot):
        assert_same(model(x), expected(model, x, *used), 1e-5)
        with adapters.use([slot]):
            assert_same(model(x), expected(model, x, *used), 1e-5)
        with pytest.raises(ValueError, match="is merged into the weights"), adapters.use([None]):
            pass
        with pytest.raises(RuntimeError, match="merged already"), adapters.merged("b"):
            pass
        assert_same(model(x), expected(model, x, *used), 1e-5)
    for name, weight in weights.items():
        assert getattr(model, name).weight is weight and torch.equal(weight, copies[name])
    assert torch.equal(model(x), plain)
    with pytest.raises(RuntimeError, match="no_grad"), adapters.merged("a"):
        pass


def test_use_none_runs_no_extra_operation() -> None:
    model, adapters = toy()
    adapters.add_stack("t", ["a", "b"], 2, 2, trainable=False, init="zeros")
    adapters.load_slot("a", lora(0, ("first",)))
    x = torch.randn(2, 5, dtype=torch.float64)

    def count(rows: Any) -> int:
        with torch.profiler.profile() as profile, adapters.use(rows):
            model(x)
        return sum(event.count for event in profile.key_averages() if "mm" in event.key)

    base = count([None])
    assert count([None, None]) == base
    assert count(["b"]) == base  # an empty slot costs nothing either
    assert count(["a"]) > base


def flops(forward: Any, *slots: Any, adapters: Adapters) -> int:
    with FlopCounterMode(display=False) as counter, adapters.use(slots):
        forward()
    return counter.get_total_flops() // 2


def test_slot_linear_takes_the_cheaper_order_of_products() -> None:
    K, N, r, rows = 16, 8, 6, 40
    layers = nn.Sequential(nn.Linear(K, N))
    adapters = inject_adapters(layers, ["0"])
    adapters.add_stack("t", ["a", "b"], r, r, trainable=True)
    adapters.add_stack("u", ["c"], r, r, trainable=True)
    x = torch.randn(rows, K)
    sum_first, factors = r * N * K + rows * N * K, rows * (N * K + r * (N + K))
    with torch.no_grad():
        assert flops(lambda: layers(x), "a", adapters=adapters) == sum_first
        assert flops(lambda: layers(x), ("a", "c"), adapters=adapters) == sum_first + r * N * K
        assert flops(lambda: layers(x[:4]), "a", adapters=adapters) == 4 * factors // rows  # few rows
        assert flops(lambda: layers(x), *("ab" * (rows // 2)), adapters=adapters) == factors  # each its own
        layers.to(torch.bfloat16)
        assert flops(lambda: layers(x.bfloat16()), "a", adapters=adapters) == factors  # would be rounded
        layers.float()

    def there_and_back() -> None:
        x.requires_grad_().grad = None
        layers(x).sum().backward()

    # The gradient of a sum of weights is as large as they are, so that low ranks keep to their factors.
    assert flops(there_and_back, "a", adapters=adapters) == 3 * sum_first
    adapters.add_stack("v", ["d"], 1, 1, trainable=True)
    assert flops(there_and_back, "d", adapters=adapters) == 2 * rows * N * K + 3 * rows * 1 * (N + K)


@pytest.mark.parametrize("rows", [["a"], ["a", "b", "a", "b"], ["b", "a", "a", None], [("a", "b")]])
def test_slot_linear_compiles_without_breaks(rows: Any) -> None:
    model, adapters = toy(torch.float32)
    adapters.add_stack("t", ["a", "b"], 2, 2, trainable=True)
    adapters.load_slot("a", lora(0))
    adapters.load_slot("b", lora(1, rank=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5)
    results = []
    for run in (model, compiled):
        adapters.parameters("t")[0].grad = None
        with adapters.use(rows):
            y = run(x)
        y.square().sum().backward()
        results.append((y.detach(), adapters.parameters("t")[0].grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    with adapters.use([None]):  # the compiled code notices another choice
        torch.testing.assert_close(compiled(x), model(x))


def test_add_lora_is_the_lora_at_its_largest_rank() -> None:
    """Mixed ranks, a linear that it lacks, and a trainable slot."""
    model, adapters = toy()
    modules = lora(0, ["first"], rank=3) | lora(1, ["last"], rank=1)
    adapters.add_lora("whole", modules, trainable=True)
    adapters.add_lora("part", lora(2, ["last"]))
    for name, module in modules.items():
        torch.testing.assert_close(adapters.delta("whole", name), module.delta(), rtol=1e-6, atol=1e-6)
    assert adapters.delta("part", "first").abs().max() == 0
    assert {p.shape[1] for n, p in adapters.named_parameters("whole").items() if n.endswith(".A")} == {3}
    assert all(p.requires_grad for p in adapters.parameters("whole"))
    assert not any(p.requires_grad for p in adapters.parameters("part"))
