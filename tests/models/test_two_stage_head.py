"""A cell, then an example in it: against the closed form, softmaxes one by one, and exhaustive search."""

import math

import pytest
import torch

from provgen.models.index_heads import TwoStageHead

CLASSES = 3
LOWEST = torch.finfo(torch.float64).min


@pytest.mark.parametrize(("cells", "num_cells"), [("kmeans", 3), ("kmeans", 5), ("classes", 3)])
def test_with_an_anchor_per_example_it_is_the_closed_form(cells, num_cells, random_case, assert_same_posterior):
    case = random_case(12)
    head = case.exact(TwoStageHead, cells=cells, num_cells=num_cells)
    with torch.no_grad():
        head.log_cells.weights[head.log_cells.weights < 0] = -1e30  # anchors that no example took
    assert_same_posterior(case.logits(head), case.closed_form)


def test_it_is_a_softmax_over_cells_times_one_in_each_cell(random_case):
    case = random_case(15)
    head = case.random(TwoStageHead, num_cells=4)
    logits = case.logits(head)
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(20, dtype=torch.float64))
    with torch.no_grad():
        embedding = head.embedding(case.feature_maps())
        log_cells, free = (
            head.log_cells(embedding, case.alpha_bar),
            head.prototypes(embedding, case.alpha_bar),
        )
    assert log_cells.exp().std(0).min() > 0.001
    for cell in range(4):
        own = head.example_cells == cell
        expected = free[:, own].log_softmax(1) + log_cells[:, cell, None]
        torch.testing.assert_close(logits[:, own], expected)


def test_where_cells_are_classes_the_classes_get_what_the_cells_say(random_case):
    case = random_case(14, relabelled={1: CLASSES})  # present: 0, 2, and none
    head = case.random(TwoStageHead, cells="classes")
    probs = case.logits(head).exp()
    with torch.no_grad():
        cells = head.log_cells(head.embedding(case.feature_maps()), case.alpha_bar).exp()
    torch.testing.assert_close(case.class_probs(probs)[:, [0, 2, 3]], cells)


class TestBeam:
    """Eight cells of 40 examples: most mix the classes, some lack one."""

    @pytest.fixture
    def case(self, random_case):
        return random_case(40, queries=60)

    @pytest.fixture
    def class_labels(self):
        return torch.arange(60) % (CLASSES + 1)

    @pytest.fixture
    def head(self, case):
        return case.random(TwoStageHead, num_cells=8)

    @pytest.fixture
    def search(self, case, head, class_labels):
        return lambda beam: case.logits(head, class_labels=class_labels, beam=beam)

    def test_a_beam_of_all_cells_is_exhaustive(self, case, head, search, class_labels):
        # A row of a class is not shown cells without it, which the network rules out anyway.
        hidden = (head.log_class_shares == -math.inf)[class_labels][:, head.example_cells]
        possible = (class_labels == CLASSES)[:, None] | (class_labels[:, None] == case.labels)
        assert hidden.any()
        assert not (hidden & possible).any()
        torch.testing.assert_close(search(8), search(None).masked_fill(hidden, LOWEST))
        assert torch.equal(search(99), search(8))

    @pytest.mark.parametrize("beam", [1, 3])
    def test_that_many_cells_are_scored_and_nothing_else(self, beam, head, search):
        logits, everything = search(beam), search(None)
        is_scored = logits > LOWEST
        torch.testing.assert_close(logits[is_scored], everything[is_scored])
        for row in is_scored:
            cells = head.example_cells[row].unique()
            assert len(cells) == beam
            assert torch.equal(row, torch.isin(head.example_cells, cells))

    def test_no_row_looks_into_a_cell_without_its_class(self, case, search, class_labels):
        fits = class_labels[:, None] == case.labels
        holds_one = ((search(1) > LOWEST) & fits).any(1)
        assert holds_one[class_labels < CLASSES].all()

    def test_a_null_row_takes_the_most_probable_cells(self, head, search, class_labels):
        everything, is_scored = search(None).exp(), search(3) > LOWEST
        for row in (class_labels == CLASSES).nonzero().flatten():
            mass = everything.new_zeros(8).index_add(0, head.example_cells, everything[row])
            best = set(mass.topk(3).indices.tolist())
            assert set(head.example_cells[is_scored[row]].tolist()) == best

    def test_the_other_cells_are_never_computed(self, head, search):
        logits = search(1)
        unused = ~(logits > LOWEST).any(0)
        assert unused.any(), "some cell is chosen by no row"
        with torch.no_grad():
            head.prototypes.points[unused] = math.nan
        assert torch.equal(search(1), logits)

    def test_a_row_of_a_class_weighs_a_cell_by_its_share_of_the_class(self, head_case):
        # Two clusters on a line. x_t is nearer to the first, in which one of ten has class 0; the other has
        # nothing else.
        train = torch.zeros(20, 1, 4, 4, dtype=torch.float64)
        train[:, 0, 0, 0] = torch.arange(20) / 100 + 1.0 * (torch.arange(20) >= 10)
        labels = torch.tensor([0] + [1] * 9 + [0] * 10)
        case = head_case(train, labels, queries=5)
        case.alpha_bar.fill_(0.2)
        case.noisy.zero_()[:, 0, 0, 0] = 0.4 * math.sqrt(0.2)
        is_conditional = torch.tensor([0, 0, CLASSES, CLASSES, CLASSES])
        head = case.exact(TwoStageHead, num_cells=2)
        is_scored = case.logits(head, class_labels=is_conditional, beam=1) > LOWEST
        second = torch.arange(20) >= 10
        assert torch.equal(is_scored, torch.where((is_conditional == 0)[:, None], second, ~second))

    def test_a_row_of_a_class_without_examples_is_left_alone(self, random_case):
        case = random_case(12, relabelled={2: 0}, queries=5)
        logits = case.logits(case.started(TwoStageHead), class_labels=torch.full((5,), 2), beam=2)
        assert (logits == LOWEST).all()
