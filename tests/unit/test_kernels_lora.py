"""Low-rank adapters mixed in one batch, against float64, through Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.interpreter  # noqa: F401
from realm.engine.kernels import lora
from realm.engine.kernels.lora import FEW, MANY, Group, lora_tile, splits, workspace_size
from realm.engine.kernels.lora_plan import GROUP_TARGETS, HEAD, MOST_RANK, lora_plan, most_words
from tests.lora_cases import LoraCase, make_lora

QKV, OUTPUT, GATE_UP, DOWN = (
    Group(0, 48, (48, 16, 16)),
    Group(1, 48, (48,)),
    Group(2, 48, (80, 80)),
    Group(3, 80, (48,)),
)
GROUPS = (QKV, OUTPUT, GATE_UP, DOWN)
MIXED = [[16, 16, 0, 0], [0, 48, 16, 16], [128, 0, 0, 32], [256, 16, 32, 16], [0, 0, 0, 0]]


def check(case: LoraCase, *, tolerance: float = 1e-5) -> None:
    for group in case.groups:
        x, out = case.operands(group)
        expected, before = case.expected(x, out, group), out.clone()
        case.run(x, out, group)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        for row, slot in enumerate(case.slots):
            adapted = slot >= 0 and case.ranks[slot, group.number] > 0
            assert adapted != torch.equal(out[row], before[row]), "exactly the rows that have an adapter are changed"


@pytest.mark.parametrize("tile", [FEW, MANY])
@pytest.mark.parametrize(
    "slots",
    [[0], [3, -1, 0, 2, -1, 1, 0, 4], [-1, 2] + [0] * 19 + [3] * 3, [1] * 70],
    ids=["one", "mixed", "more than a tile", "more than a large tile"],
)
def test_ranks_are_mixed(slots: list[int], tile: int) -> None:
    check(make_lora(GROUPS, slots, MIXED, tile=tile))


@pytest.mark.parametrize("tile", [FEW, MANY])
def test_two_bytes_an_element(tile: int) -> None:
    """The interpreter multiplies no bfloat16; float16 takes the same way, and a GPU's tests the other."""
    case = make_lora(GROUPS, [3, -1, 0, 2, 1, 0], MIXED, tile=tile, dtype=torch.float16)
    check(case, tolerance=5e-3)


@pytest.mark.parametrize("inner", [512, 576, 1100, 5000])
def test_a_long_inner_dimension_is_split(inner: int) -> None:
    groups = (Group(0, inner, (33, 20, 70)), Group(1, inner, (300,)))
    assert splits(4, groups[0]) == min(4, -(-inner // 512)) and splits(4, groups[1]) == min(8, -(-inner // 512))
    check(make_lora(groups, [1, 0, -1, 1], [[16, 32], [48, 16]]))


def test_a_step_of_many_rows_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "SPLIT_ROWS", 3)
    group = Group(0, 1100, (33, 20, 70))
    assert splits(4, group) == 1 and splits(3, group) == 3
    check(make_lora((group,), [1, 0, -1, 1], [[16], [32]], tile=MANY))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_mix(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    ranks = data.draw(st.lists(st.lists(st.sampled_from([0, 16, 32, 80]), min_size=2, max_size=2), min_size=count))
    slots = data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=24))
    groups = (Group(0, data.draw(st.sampled_from([16, 40, 130])), (24, 8, 8)), Group(1, 64, (40,)))
    check(make_lora(groups, slots, ranks, tile=data.draw(st.sampled_from([FEW, MANY])), seed=count))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """To the bit: otherwise a tenant's text might change with who else is there."""
    slots, group = [2, 0, -1, 3, 0, 1, 2], QKV
    together = make_lora(GROUPS, slots, MIXED)
    x, out = together.operands(group)
    base = out.clone()
    together.run(x, out, group, multiprocessors=3)
    for row in range(len(slots)):
        alone = [-1] * len(slots)
        alone[row] = slots[row]
        case = make_lora(GROUPS, alone, MIXED)
        only = base.clone()
        case.run(x, only, group)
        assert torch.equal(only[row], out[row])


def test_layers_have_their_own_tables() -> None:
    """The case's weights are of its last layer; the others have none."""
    group = Group(0, 48, (48,))
    case = make_lora((group,), [0, 0], [[16]], layers=3)
    x, out = case.operands(group)
    before, partial = out.clone(), torch.full((workspace_size(2),), float("nan"))
    for layer in range(2):
        options = {"layer": layer, "tile": FEW, "multiprocessors": 1}
        lora.lora_shrink(x, case.adapters, case.plan(), partial, group, **options)
        lora.lora_expand(partial, case.adapters, case.plan(), out, group, **options)
    assert torch.equal(out, before)


# --- plans ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-1, 9), max_size=300),
    st.lists(st.lists(st.integers(0, 16), min_size=4, max_size=4), min_size=10, max_size=10),
    st.sampled_from([FEW, MANY]),
    st.sampled_from([(0, 1), (0, 1, 2, 3)]),
)
def test_a_plan_has_every_row_and_every_line_once(
    slots: list[int], ranks: list[list[int]], tile: int, groups: tuple[int, ...]
) -> None:
    lines = np.array(ranks, np.int32) * 16 * np.array(GROUP_TARGETS, np.int32)
    plan = lora_plan(np.array(slots, np.int32), lines, groups, tile=tile, block=tile)
    assert plan.dtype == np.int32
    assert len(plan) <= most_words(len(slots), len(set(slots)), tile=tile, block=tile)

    def quads(which: int) -> list[list[int]]:
        count, at = plan[2 * which : 2 * which + 2].tolist()
        assert at % 4 == 0 or count == 0
        return plan[at : at + 4 * count].reshape(-1, 4).tolist()

    seen: list[int] = []
    for first, count, slot, _ in quads(0):
        rows = plan[HEAD + first : HEAD + first + count].tolist()
        assert 0 < count <= tile and {slots[row] for row in rows} == {slot}
        seen += rows
    assert sorted(seen) == [row for row, slot in enumerate(slots) if slot >= 0]
    for group in range(4):
        wanted = [
            [first, count, slot, block]
            for first, count, slot, _ in quads(0)
            for block in range(-(-int(lines[slot, group]) // tile))
        ]
        assert quads(1 + group) == (wanted if group in groups else [])


def test_a_plan_fits_whatever_the_ranks() -> None:
    """Every row another adapter of the largest rank on everything."""
    lines = np.tile(MOST_RANK * np.array(GROUP_TARGETS, np.int32), (70, 1))
    for tile in (FEW, MANY):
        for rows, sequences in ((70, 70), (300, 70), (70, 1)):
            slots = np.arange(rows, dtype=np.int32) % sequences
            plan = lora_plan(np.sort(slots), lines, range(4), tile=tile, block=tile)
            assert len(plan) <= most_words(rows, sequences, tile=tile, block=tile)


def test_steps_with_long_prompts_have_large_tiles() -> None:
    assert [lora_tile(tokens) for tokens in (0, 16, 64, 65, 8192)] == [FEW, FEW, FEW, MANY, MANY]
