"""Columns follow the training examples, labels rule out what they must, and saving loses nothing."""

import pytest
import torch

from provgen.attribution.network import NetworkPosterior
from provgen.models.diffusion import record_stages
from provgen.models.provenance import ProvenanceNetwork


@pytest.fixture(scope="module")
def images(random_images):
    return random_images(11, num_classes=3)


@pytest.fixture(scope="module")
def networks(images, tiny_networks):
    return tiny_networks(images, fingerprint="abc")


@pytest.fixture(scope="module")
def queries(networks):
    """Stages, signal levels and labels: each class once, then the null label twice."""
    denoiser, _ = networks
    labels = torch.tensor([0, 1, 2, 3, 3])
    noisy = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record_stages(denoiser) as stages:
        denoiser(noisy, torch.tensor([5, 300, 500, 700, 990]), class_labels=labels)
    return stages, torch.tensor([0.99, 0.6, 0.4, 0.1, 0.01]), labels


def outputs(provenance, queries):
    with torch.no_grad():
        return provenance(*queries)


def test_a_label_rules_out_all_other_classes_and_the_null_label_none(networks, queries, images):
    logits = outputs(networks[1], queries).index_logits
    probs, lowest = logits.softmax(dim=1), torch.finfo(torch.float32).min
    torch.testing.assert_close(probs.sum(1), torch.ones(5))
    for row, label in enumerate(queries[2][:3]):
        assert not probs[row, images.labels != label].any()
        assert (logits[row, images.labels == label] > lowest).all()
    assert (logits[3:] > lowest).all()


def test_logits_are_finite_and_tell_queries_and_examples_apart(networks, queries):
    output = outputs(networks[1], queries)
    assert output.index_logits.isfinite().all()
    assert output.index_logits.shape == (5, 11)
    assert output.class_logits.shape == (5, 3)
    free = output.index_logits[3:]
    assert free.std(dim=1).min() > 0
    assert not torch.allclose(free[0], free[1])


def test_permuting_the_examples_permutes_the_columns(networks, queries, generator):
    provenance = networks[1]
    order = torch.randperm(11, generator=generator)
    permuted = ProvenanceNetwork(**dict(provenance.config))
    state = provenance.state_dict()
    for name in ("index_head.prototypes", "index_head.bias", "example_labels"):
        state[name] = state[name][order]
    permuted.load_state_dict(state)
    before, after = outputs(provenance, queries), outputs(permuted, queries)
    torch.testing.assert_close(after.index_logits, before.index_logits[:, order], rtol=1e-6, atol=1e-6)
    assert torch.equal(after.class_logits, before.class_logits)
    assert not torch.equal(after.index_logits, before.index_logits)


def test_a_row_does_not_depend_on_its_batch(networks, queries):
    stages, signal, labels = queries
    whole = outputs(networks[1], queries)
    for row in range(5):
        part = slice(row, row + 1)
        alone = outputs(networks[1], ([stage[part] for stage in stages], signal[part], labels[part]))
        torch.testing.assert_close(alone.index_logits, whole.index_logits[part], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(alone.class_logits, whole.class_logits[part], rtol=1e-5, atol=1e-5)


def test_saving_and_loading_gives_equal_outputs(networks, queries, tmp_path):
    provenance = networks[1]
    provenance.save_pretrained(tmp_path)
    loaded = ProvenanceNetwork.from_pretrained(tmp_path)
    before, after = outputs(provenance, queries), outputs(loaded, queries)
    assert torch.equal(after.index_logits, before.index_logits)
    assert torch.equal(after.class_logits, before.class_logits)
    assert torch.equal(loaded.example_labels, provenance.example_labels)
    assert loaded.config.fingerprint == "abc"
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_the_class_head_sees_no_label(networks, queries):
    stages, signal, labels = queries
    shifted = outputs(networks[1], (stages, signal, (labels + 1) % 4))
    assert torch.equal(shifted.class_logits, outputs(networks[1], queries).class_logits)


def test_without_a_class_head_there_are_no_class_logits_and_no_parameters(networks, queries):
    config = {**networks[1].config, "has_class_head": False}
    bare = ProvenanceNetwork(**config)
    assert outputs(bare, queries).class_logits is None
    assert not any("class" in name for name, _ in bare.named_parameters())


def test_a_network_that_shares_fewer_stages_ignores_the_later_ones(networks, queries):
    config = {**networks[1].config, "stages": networks[1].config.stages[:2]}
    short = ProvenanceNetwork(**config)
    torch.nn.init.normal_(short.index_head.embedding.projection.weight)
    stages, signal, labels = queries
    changed = [*stages[:2], *[stage + 1 for stage in stages[2:]]]
    before = outputs(short, queries).index_logits
    assert torch.equal(outputs(short, (changed, signal, labels)).index_logits, before)
    changed = [stages[0], stages[1] + 1, *stages[2:]]
    assert not torch.equal(outputs(short, (changed, signal, labels)).index_logits, before)


def test_a_set_without_labels_has_only_the_null_label(random_images, tiny_networks, alphas_cumprod):
    images = random_images(6, num_classes=0)
    posterior = NetworkPosterior(*tiny_networks(images))
    logits = posterior.index_logits(
        images.images.float() / 127.5 - 1,
        torch.full((6,), 500),
        alphas_cumprod[500].expand(6),
        torch.zeros(6, dtype=torch.int64),
    )
    assert (logits.softmax(dim=1) > 0).all()


def test_index_logits_alone_are_those_of_the_whole_forward_pass(networks, queries):
    whole = outputs(networks[1], queries).index_logits
    with torch.no_grad():
        assert torch.equal(networks[1].index_logits(*queries), whole)


def test_heads_compute_in_their_own_precision_under_autocast(networks, queries):
    with torch.autocast("cpu", torch.bfloat16):
        inside = outputs(networks[1], queries)
    assert inside.index_logits.dtype == torch.float32
    assert torch.equal(inside.index_logits, outputs(networks[1], queries).index_logits)
