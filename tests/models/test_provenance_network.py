"""Columns follow the training examples, labels and coverage rule out what they must, and saving loses nothing."""

import pytest
import torch

from provgen.models.diffusion import record_feature_maps
from provgen.models.provenance import ProvenanceNetwork

LOWEST = torch.finfo(torch.float32).min

HEADS = {
    "class_independent": {"kind": "ClassIndependentHead"},
    "class_conditional": {
        "kind": "ClassConditionalHead",
        "num_classes": 3,
        "num_slots": 4,
        "has_class_branch": True,
    },
    "two_stage": {"kind": "TwoStageHead", "num_cells": 3, "num_classes": 3},
}


@pytest.fixture(scope="module")
def images(random_images):
    return random_images(11, num_classes=3)


@pytest.fixture(scope="module", params=HEADS)
def networks(request, images, tiny_networks):
    return tiny_networks(images, head=HEADS[request.param], fingerprint="abc")


@pytest.fixture(scope="module")
def plain(images, tiny_networks):
    """Networks with the head that is one softmax."""
    return tiny_networks(images)


@pytest.fixture(scope="module")
def queries(plain):
    """Feature maps, values of alpha_bar and labels: each class once, then the null label twice."""
    labels = torch.tensor([0, 1, 2, 3, 3])
    noisy = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record_feature_maps(plain[0]) as feature_maps:
        plain[0](noisy, torch.tensor([5, 300, 500, 700, 990]), class_labels=labels)
    return feature_maps, torch.tensor([0.99, 0.6, 0.4, 0.1, 0.01]), labels


def outputs(provenance, queries):
    with torch.no_grad():
        return provenance(*queries)


def test_a_label_rules_out_all_other_classes_and_the_null_label_none(networks, queries, images):
    logits = outputs(networks[1], queries).index_logits
    probs = logits.softmax(dim=1)
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    for row, label in enumerate(queries[2][:3]):
        assert not probs[row, images.labels != label].any()
        assert (logits[row, images.labels == label] > LOWEST).all()
    assert (logits[3:] > LOWEST).all()
    assert (logits == LOWEST).equal(networks[1].ruled_out(queries[2]))


def test_logits_are_finite_and_tell_queries_and_examples_apart(networks, queries):
    output = outputs(networks[1], queries)
    assert output.index_logits.isfinite().all()
    assert output.index_logits.shape == (5, 11)
    assert output.class_logits.shape == (5, 3)
    free = output.index_logits[3:]
    assert free.std(dim=1).min() > 0
    assert not torch.allclose(free[0], free[1])


def test_permuting_the_examples_permutes_the_columns(plain, queries, generator):
    provenance = plain[1]
    order = torch.randperm(11, generator=generator)
    permuted = ProvenanceNetwork(**dict(provenance.config))
    state = provenance.state_dict()
    for name in ("index_head.prototypes.points", "index_head.prototypes.bias", "example_labels"):
        state[name] = state[name][order]
    permuted.load_state_dict(state)
    before, after = outputs(provenance, queries), outputs(permuted, queries)
    torch.testing.assert_close(after.index_logits, before.index_logits[:, order], rtol=1e-6, atol=1e-6)
    assert torch.equal(after.class_logits, before.class_logits)
    assert not torch.equal(after.index_logits, before.index_logits)


def test_a_row_does_not_depend_on_its_batch(networks, queries):
    feature_maps, alpha_bar, labels = queries
    whole = outputs(networks[1], queries)
    for row in range(5):
        part = slice(row, row + 1)
        alone = outputs(networks[1], ([stage[part] for stage in feature_maps], alpha_bar[part], labels[part]))
        torch.testing.assert_close(alone.index_logits, whole.index_logits[part], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(alone.class_logits, whole.class_logits[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared_stages", [0, 2, 4])
@pytest.mark.parametrize("head", HEADS)
def test_saving_and_loading_gives_equal_outputs(head, shared_stages, images, tiny_networks, queries, tmp_path):
    covered = torch.tensor([0, 1, 2, 5, 6, 7, 9])
    _, provenance = tiny_networks(
        images, head=HEADS[head], shared_stages=shared_stages, covered=covered, fingerprint="abc", beam=2
    )
    provenance.save_pretrained(tmp_path)
    loaded = ProvenanceNetwork.from_pretrained(tmp_path)
    before, after = outputs(provenance, queries), outputs(loaded, queries)
    assert torch.equal(after.index_logits, before.index_logits)
    assert torch.equal(after.class_logits, before.class_logits)
    assert torch.equal(loaded.example_labels, provenance.example_labels)
    assert torch.equal(loaded.covered, covered)
    assert (loaded.config.fingerprint, loaded.config.beam) == ("abc", 2)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_the_class_head_sees_no_label(networks, queries):
    feature_maps, alpha_bar, labels = queries
    shifted = outputs(networks[1], (feature_maps, alpha_bar, (labels + 1) % 4))
    assert torch.equal(shifted.class_logits, outputs(networks[1], queries).class_logits)


def test_without_a_class_head_there_are_no_class_logits_and_no_parameters(plain, queries):
    bare = ProvenanceNetwork(**{**plain[1].config, "has_class_head": False})
    assert outputs(bare, queries).class_logits is None
    assert not any("class" in name for name, _ in bare.named_parameters())


def test_class_logits_of_a_classifier_take_the_place_of_the_class_head(images, tiny_networks, queries):
    is_conditional = HEADS["class_conditional"] | {"has_class_branch": False}
    _, bare = tiny_networks(images, head=is_conditional, has_class_head=False)
    feature_maps, alpha_bar, _ = queries
    null = torch.full((5,), 3)
    sure = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    output = outputs(bare, (feature_maps, alpha_bar, null, sure))
    assert output.class_logits is sure
    mass = output.index_logits.softmax(dim=1) @ torch.nn.functional.one_hot(images.labels, 3).float()
    torch.testing.assert_close(mass, sure.softmax(dim=1))


@pytest.mark.parametrize("shared_stages", [0, 1, 2, 4])
def test_only_the_shared_stages_are_read(shared_stages, images, tiny_networks, queries):
    _, network = tiny_networks(images, shared_stages=shared_stages)
    feature_maps, alpha_bar, labels = queries
    before = outputs(network, queries).index_logits
    for number in range(5):
        changed = [stage + (place == number) for place, stage in enumerate(feature_maps)]
        after = outputs(network, (changed, alpha_bar, labels)).index_logits
        # The image is read where nothing is shared, and only there.
        is_read = number == 0 if shared_stages == 0 else 1 <= number <= shared_stages
        assert torch.equal(after, before) != is_read
    cut = outputs(network, (feature_maps[: shared_stages + 1], alpha_bar, labels)).index_logits
    assert torch.equal(cut, before)


@pytest.mark.parametrize("shared_stages", [0, 2, 4])
def test_the_last_stage_is_what_the_heads_read(shared_stages, images, tiny_networks, queries):
    _, network = tiny_networks(images, shared_stages=shared_stages)
    feature_maps, alpha_bar, _ = queries
    with torch.no_grad():
        last = network.last_feature_map(feature_maps, alpha_bar)
        expected = network.class_head([last])
    assert last.shape == feature_maps[-1].shape
    assert torch.equal(last, feature_maps[-1]) == (shared_stages == 4)
    assert torch.equal(outputs(network, queries).class_logits, expected)


@pytest.mark.parametrize("head", HEADS)
def test_examples_that_are_not_covered_cannot_be_named(head, images, tiny_networks, queries):
    covered = torch.tensor([0, 1, 2, 5, 6, 7, 9])
    _, network = tiny_networks(images, head=HEADS[head], covered=covered)
    logits = outputs(network, queries).index_logits
    assert logits.shape == (5, 11)
    is_covered = torch.zeros(11, dtype=torch.bool).index_fill(0, covered, value=True)
    assert (logits[:, ~is_covered] == LOWEST).all()
    assert (logits[3:, is_covered] > LOWEST).all()
    assert not logits.softmax(dim=1)[:, ~is_covered].any()
    for row, label in enumerate(queries[2][:3]):
        assert torch.equal(logits[row] > LOWEST, is_covered & (images.labels == label))


def test_the_covered_examples_are_those_of_a_network_for_them_alone(images, tiny_networks, queries):
    covered = torch.tensor([0, 1, 2, 5, 6, 7, 9])
    _, some = tiny_networks(images, covered=covered)
    _, alone = tiny_networks(images.select(covered))
    expected = outputs(alone, queries).index_logits
    assert torch.equal(outputs(some, queries).index_logits[:, covered], expected)


def test_a_set_without_labels_has_only_the_null_label(random_images, tiny_networks, queries):
    images = random_images(6, num_classes=0)
    _, network = tiny_networks(images)
    feature_maps, alpha_bar, _ = queries
    logits = outputs(network, (feature_maps, alpha_bar, torch.zeros(5, dtype=torch.int64))).index_logits
    assert (logits.softmax(dim=1) > 0).all()


def test_index_logits_alone_are_those_of_the_whole_forward_pass(networks, queries):
    whole = outputs(networks[1], queries).index_logits
    with torch.no_grad():
        assert torch.equal(networks[1].index_logits(*queries), whole)


def test_a_beam_leaves_the_examples_of_the_best_cells_in_their_proportions(images, tiny_networks, queries):
    _, network = tiny_networks(images, head=HEADS["two_stage"])
    with torch.no_grad():
        whole = network.index_logits(*queries).softmax(dim=1)
        for beam in (1, 2, 3):
            probs = network.index_logits(*queries, beam=beam).softmax(dim=1)
            kept = torch.where(probs > 0, whole, 0)
            torch.testing.assert_close(probs, kept / kept.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
            left_out = (probs[3:] == 0) & (whole[3:] > 0)
            assert left_out.any() == (beam < 3)


def test_heads_compute_in_their_own_precision_under_autocast(networks, queries):
    with torch.autocast("cpu", torch.bfloat16):
        inside = outputs(networks[1], queries)
    assert inside.index_logits.dtype == torch.float32
    assert torch.equal(inside.index_logits, outputs(networks[1], queries).index_logits)
