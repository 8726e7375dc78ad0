"""Attributions joined, and how many sources can be asked for."""

import pytest
import torch

from provgen.tracing.attribution import Attribution, Explained, check_top_k


def attribution_of(rows: torch.Tensor) -> Attribution:
    """Fill every field with numbers of its own, row by row; two levels."""
    return Attribution(
        example_index=rows[:, :2].long(),
        posterior=rows[:, :2],
        weight=rows[:, 1:3],
        mass_not_shown=rows[:, 0],
        mass_unreachable=rows[:, 1],
        entropy=rows[:, 2],
        commitment_step=rows[:, 3].long(),
        step_entropy=rows[:, 2:4],
        alpha_bar=torch.tensor([0.2, 0.5]),
        explained=Explained(
            share=rows[:, 0],
            by_nearest=rows[:, 1],
            by_class_mean=rows[:, 2],
            nearest=rows[:, 3].long(),
            least=rows[:, 1] / 2,
            copy=rows[:, 2] / 2,
        ),
    )


def test_joining_attributions_joins_their_queries():
    rows = 9 * torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    whole, *parts = (attribution_of(part) for part in (rows, rows[:2], rows[2:]))
    joined = Attribution.concatenate(parts)
    assert len(joined) == 5
    for one, other in ((whole, joined), (whole.explained, joined.explained)):
        fields = {name: value for name, value in vars(one).items() if name != "explained"}
        assert all(torch.equal(value, getattr(other, name)) for name, value in fields.items())


@pytest.mark.parametrize("top_k", [0, -1, 6])
def test_an_impossible_top_k_is_refused(top_k, message_of):
    message = message_of(check_top_k, top_k, 5)
    assert "top_k must be between 1 and 5" in message
    assert f"got {top_k}" in message
    check_top_k(1, 5)
    check_top_k(5, 5)
