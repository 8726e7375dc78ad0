"""Seeds decide images, traces change nothing, saving loses nothing, and mistakes end in one line."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from provgen.data.images import to_pil, to_uint8
from provgen.data.manifest import Manifest
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.temperatures import Tracer
from provgen.pipeline import ProvenancePipeline
from provgen.run import seal

FAST = {"num_inference_steps": 10, "output_type": "pt"}
LABELS = [3, 1, None]


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture
def pipe(trained):
    return trained.pipeline


@pytest.fixture(scope="module")
def three(trained):
    """Three images with traces by the network and by the closed form."""
    closed_form = trained.closed_form()
    return trained.pipeline(LABELS, generator=seeds(0, 1, 2), top_k=5, closed_form=closed_form, **FAST)


def tensors_of(attribution):
    """All tensors of an attribution, those of what is explained among them."""
    return {**vars(attribution), **vars(attribution.explained), "explained": attribution.explained.share}


def assert_same(first, second):
    torch.testing.assert_close(tensors_of(first), tensors_of(second), rtol=0, atol=0, equal_nan=True)


def assert_close(first, second, rows, tolerance):
    for name in ("posterior", "entropy", "mass_not_shown", "step_entropy", "weight", "explained", "by_nearest"):
        actual, expected = tensors_of(first)[name], tensors_of(second)[name][rows]
        # Kernels are of differences of squares, which are rounded otherwise in another batch.
        torch.testing.assert_close(actual, expected, rtol=0, atol=max(tolerance, 1e-4 if name == "weight" else 0))


def of_posteriors_alone(pipe):
    """The same pipeline without a credit head and without training images: what it names is what it believes."""
    return ProvenancePipeline(**(pipe.components | {"credit": None})).with_manifest(pipe.manifest)


def test_saving_and_loading_gives_identical_images_and_traces(pipe, three, trained, tmp_path):
    pipe.save_pretrained(tmp_path / "copy")
    loaded = ProvenancePipeline.from_pretrained(tmp_path / "copy").with_training_images(trained.data.train)
    loaded.set_progress_bar_config(disable=True)
    again = loaded(LABELS, generator=seeds(0, 1, 2), top_k=5, **FAST)
    assert torch.equal(again.images, three.images)
    assert_same(again.attribution, three.attribution)
    assert loaded.manifest.fingerprint == pipe.manifest.fingerprint
    assert loaded.manifest.table.equals(pipe.manifest.table)
    suffixes = {path.suffix for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".parquet"}


def test_the_same_seeds_give_the_same_images_and_other_seeds_others(pipe, three):
    again = pipe(LABELS, generator=seeds(0, 1, 2), top_k=5, **FAST)
    assert torch.equal(again.images, three.images)
    assert_same(again.attribution, three.attribution)
    other = pipe(LABELS, generator=seeds(3, 4, 5), top_k=5, **FAST)
    assert not any(torch.equal(a, b) for a, b in zip(other.images, three.images, strict=True))


@pytest.mark.parametrize("rows", [[0], [1], [2], [2, 0]])
def test_an_image_and_its_trace_do_not_depend_on_the_batch(rows, pipe, three, trained):
    part = pipe(
        [LABELS[row] for row in rows],
        generator=seeds(*rows),
        top_k=5,
        closed_form=trained.closed_form(),
        **FAST,
    )
    difference = part.images.int() - three.images[rows].int()
    assert difference.abs().max() <= 1
    assert_close(part.attribution, three.attribution, rows, 1e-4)
    assert_close(part.closed_form, three.closed_form, rows, 1e-2)
    assert torch.equal(part.attribution.example_index[:, 0], three.attribution.example_index[rows, 0])


def test_generating_without_traces_gives_the_same_images(pipe, three):
    plain = pipe(LABELS, generator=seeds(0, 1, 2), top_k=None, **FAST)
    assert torch.equal(plain.images, three.images)
    assert plain.attribution is None
    assert plain.closed_form is None


@pytest.mark.parametrize(
    ("kind", "labels", "scale"), [("diffusion", LABELS, 1.0), ("diffusion", LABELS, 2.0), ("vae", None, 1.0)]
)
def test_sampling_without_traces_is_a_loop_over_steps(kind, labels, scale, trained_of):
    pipeline = trained_of(kind).pipeline
    null, asked = pipeline.null_label, {"num_inference_steps": 10, "guidance_scale": scale}
    given = torch.tensor([null if label is None else label for label in labels or [None] * 3])
    for step in pipeline.generator.sample(given, null_label=null, generator=seeds(0, 1, 2), **asked):
        images = step.images
    plain = pipeline(labels, batch_size=3, generator=seeds(0, 1, 2), top_k=None, output_type="pt", **asked)
    assert torch.equal(to_uint8(images), plain.images)


def test_a_trace_is_complete(three, trained):
    for attribution in (three.attribution, three.closed_form):
        assert attribution.example_index.shape == (3, 5)
        shown = attribution.posterior.sum(1)
        torch.testing.assert_close(shown + attribution.mass_not_shown, torch.ones(3), rtol=0, atol=1e-5)
        assert not attribution.explained.is_copy.any(), "the original of a copy would come first"
        assert (attribution.weight.diff(dim=1) <= 0).all()
        assert attribution.step_entropy.shape == (3, len(attribution.alpha_bar))
        assert (attribution.alpha_bar.diff() > 0).all()
        levels = trained.pipeline.generator.alpha_bars(10)
        torch.testing.assert_close(attribution.alpha_bar, levels[levels > trained.pipeline.window[0]])
        labels = trained.data.train.labels
        for row, label in enumerate(LABELS[:2]):
            named = labels[attribution.example_index[row][attribution.posterior[row] > 0]]
            assert (named == label).all(), "a labelled trace stays inside its class"
    assert torch.equal(three.closed_form.weight, three.closed_form.posterior)
    assert not torch.allclose(three.attribution.weight, three.attribution.posterior, atol=1e-3)


def test_all_examples_can_be_shown(pipe, trained):
    count = len(trained.data.train)
    output = pipe([None], generator=seeds(0), top_k=count, **FAST)
    assert torch.equal(output.attribution.example_index.sort(dim=1).values[0], torch.arange(count))
    assert output.attribution.mass_not_shown.item() < 1e-5


def test_images_are_pil_unless_asked_otherwise(pipe, three):
    output = pipe(LABELS, generator=seeds(0, 1, 2), top_k=5, num_inference_steps=10)
    assert [image.tobytes() for image in output.images] == [to_pil(image).tobytes() for image in three.images]


def test_without_labels_the_batch_size_counts(pipe):
    output = pipe(batch_size=2, generator=seeds(0, 1), top_k=1, **FAST)
    named = pipe([None, None], generator=seeds(0, 1), top_k=1, **FAST)
    assert torch.equal(output.images, named.images)
    tensor = pipe(torch.tensor([3, 10]), generator=seeds(0, 1), top_k=1, **FAST)
    assert torch.equal(tensor.images[1], named.images[1])


def test_labels_and_guidance_change_the_image(pipe, three):
    unlabelled = pipe([None, None], generator=seeds(0, 1), **FAST).images
    assert not torch.equal(unlabelled, three.images[:2])
    strong = pipe(LABELS, generator=seeds(0, 1, 2), guidance_scale=2.0, top_k=5, **FAST)
    assert not torch.equal(strong.images[:2], three.images[:2])
    # Without a label there is nothing to be guided by.
    assert (strong.images[2].int() - three.images[2].int()).abs().max() <= 1
    none = pipe([3, 1], generator=seeds(0, 1), guidance_scale=0.0, **FAST).images
    assert (none.int() - unlabelled.int()).abs().max() <= 1


def test_an_impossible_top_k_is_refused(pipe, message_of):
    for top_k in (0, 41):
        assert "between 1 and 40" in message_of(pipe, [1], top_k=top_k, **FAST)
        assert "between 1 and 40" in message_of(pipe.attribute, torch.zeros(1, 1, 8, 8).byte(), top_k=top_k)


@pytest.mark.parametrize("label", [-1, 11, 100])
def test_an_impossible_label_is_refused(label, pipe, message_of):
    for message in (
        message_of(pipe, [1, label], **FAST),
        message_of(pipe.attribute, torch.zeros(2, 1, 8, 8).byte(), class_labels=[1, label]),
    ):
        assert "class labels must be 0 to 9" in message
        assert f"got {label}" in message


@pytest.mark.parametrize("count", [1, 3])
def test_the_wrong_number_of_generators_is_refused(count, pipe, message_of):
    message = message_of(pipe, [1, 2], generator=seeds(*range(count)), **FAST)
    assert f"2 images, {count} generators" in message


@pytest.mark.parametrize("steps", [0, 9, 1001])
def test_an_impossible_number_of_steps_is_refused(steps, pipe, message_of):
    assert f"got {steps}" in message_of(pipe, [1], num_inference_steps=steps)
    assert f"got {steps}" in message_of(pipe.attribute, torch.zeros(1, 1, 8, 8).byte(), num_inference_steps=steps)


def test_tracing_every_zeroth_step_is_refused(pipe, message_of):
    assert "trace_every must be at least 1, got 0" in message_of(pipe, [1], trace_every=0, **FAST)
    outside = torch.zeros(1, 1, 8, 8).byte()
    assert "trace_every must be at least 1, got -1" in message_of(pipe.attribute, outside, trace_every=-1)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_guidance_scale_that_is_no_number_is_refused(scale, pipe, message_of):
    assert "guidance_scale must be a finite number" in message_of(pipe, [1], guidance_scale=scale, **FAST)


def test_no_images_are_refused(pipe, message_of):
    for arguments in ({"class_labels": []}, {"batch_size": 0}):
        assert "at least 1, got 0" in message_of(pipe, **arguments, **FAST)


def test_an_unknown_output_type_is_refused(pipe, message_of):
    assert "'np'" in message_of(pipe, [1], num_inference_steps=10, output_type="np")


def test_a_folder_without_a_pipeline_is_refused(tmp_path, message_of):
    assert str(tmp_path) in message_of(ProvenancePipeline.from_pretrained, tmp_path)


def test_another_data_set_is_refused(pipe, trained, message_of):
    train, holdout = trained.data.train, trained.data.holdout
    swapped = train.select(torch.tensor([1, 0, *range(2, 40)]))
    for changed in (swapped, train.select(torch.arange(39)), replace(train, labels=train.labels.flip(0))):
        manifest = Manifest.of(changed, holdout)
        message = message_of(pipe.with_manifest, manifest)
        assert manifest.fingerprint[:12] in message
        assert pipe.manifest.fingerprint[:12] in message
    assert pipe.with_manifest(Manifest.of(train, holdout)) is pipe


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(1, 1, 9, 9, dtype=torch.uint8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8),
        [],
    ],
)
def test_images_that_do_not_fit_are_refused(images, pipe, message_of):
    message_of(pipe.attribute, images)


@pytest.mark.parametrize("is_labelled", [False, True])
def test_the_closed_form_finds_every_training_image(is_labelled, pipe, trained):
    train = trained.data.train
    labels = train.labels if is_labelled else None
    believed = of_posteriors_alone(pipe)
    found = believed.attribute(train.images, top_k=3, class_labels=labels, closed_form=trained.closed_form())
    assert torch.equal(found.example_index[:, 0], torch.arange(len(train)))
    assert (found.posterior[:, 0] > found.posterior[:, 1]).all()
    assert (found.commitment_step == -1).all()


def test_the_network_is_asked_unless_a_closed_form_is_given(pipe, trained):
    images = trained.data.train.images[:4]
    network = pipe.attribute(images, top_k=3)
    exact = pipe.attribute(images, top_k=3, closed_form=trained.closed_form())
    assert not torch.allclose(network.posterior, exact.posterior, atol=1e-2)
    torch.testing.assert_close(network.alpha_bar, exact.alpha_bar)


def test_attributing_does_not_depend_on_the_rest_of_the_batch(pipe, trained):
    images = trained.data.train.images[:6]
    whole = pipe.attribute(images, top_k=4)
    rows = [4, 1]
    part = pipe.attribute(images[rows], top_k=4)
    assert_close(part, whole, rows, 1e-5)
    assert torch.equal(part.example_index, whole.example_index[rows])


def test_attributing_depends_on_the_noise_seed_and_on_nothing_global(pipe, trained):
    images = trained.data.train.images[:3]
    torch.manual_seed(0)
    first = pipe.attribute(images)
    torch.manual_seed(1)
    assert_same(pipe.attribute(images), first)
    assert not torch.equal(pipe.attribute(images, seed=1).entropy, first.entropy)


def test_pil_images_and_tensors_are_attributed_alike(pipe, trained):
    images = trained.data.train.images[:3]
    as_pil = [to_pil(image) for image in images]
    assert_same(pipe.attribute(as_pil), pipe.attribute(images))
    colour = [image.convert("RGB") for image in as_pil]
    assert_same(pipe.attribute(colour), pipe.attribute(images))


FORMS = {
    "array (query, height, width)": lambda pixels, folder: pixels[:, 0].numpy(),
    "array (query, height, width, 1)": lambda pixels, folder: pixels.permute(0, 2, 3, 1).numpy(),
    "array (query, height, width, 3)": lambda pixels, folder: pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy(),
    "list of arrays": lambda pixels, folder: [image[0].numpy() for image in pixels],
    "tuple of colour arrays": lambda pixels, folder: tuple(np.stack([image[0]] * 3, axis=-1) for image in pixels),
    "list of tensors": lambda pixels, folder: list(pixels),
    "list of paths": lambda pixels, folder: saved(pixels, folder),
    "list of strings": lambda pixels, folder: [str(path) for path in saved(pixels, folder)],
    "a little of each": lambda pixels, folder: [to_pil(pixels[0]), str(saved(pixels, folder)[1]), pixels[2, 0].numpy()],
}


def saved(pixels, folder):
    paths = [folder / f"{number}.png" for number in range(len(pixels))]
    for image, path in zip(pixels, paths, strict=True):
        to_pil(image).save(path)
    return paths


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_pixels_is_attributed_alike(form, pipe, trained, tmp_path):
    pixels = trained.data.train.images[:3]
    assert_same(pipe.attribute(FORMS[form](pixels, tmp_path), top_k=3), pipe.attribute(pixels, top_k=3))


@pytest.mark.parametrize("form", ["PIL", "array", "colour array", "path", "string"])
def test_one_image_is_attributed_without_a_list(form, pipe, trained, tmp_path):
    pixels = trained.data.train.images[4:5]
    array, (path,) = pixels[0, 0].numpy(), saved(pixels, tmp_path)
    forms = {"PIL": to_pil(pixels[0]), "array": array, "colour array": np.stack([array] * 3, axis=-1)}
    image = (forms | {"path": path, "string": str(path)})[form]
    assert_same(pipe.attribute(image, class_labels=3), pipe.attribute(pixels, class_labels=[3]))


def test_arrays_of_another_size_are_resized_as_pil_images_are(pipe):
    pixels = np.random.default_rng(0).integers(256, size=(2, 20, 30, 3), dtype=np.uint8)
    assert_same(pipe.attribute(pixels), pipe.attribute([Image.fromarray(image) for image in pixels]))


@pytest.mark.parametrize(
    "labels", [np.array([3, 1]), (np.int64(3), torch.tensor(1)), range(3, 0, -2), torch.tensor([3, 1])]
)
def test_labels_may_come_in_any_form(labels, pipe, trained):
    images = trained.data.train.images[:2]
    assert_same(pipe.attribute(images, class_labels=labels), pipe.attribute(images, class_labels=[3, 1]))


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_one_label_is_that_of_one_image(label, pipe, three, message_of):
    alone = pipe(label, generator=seeds(0)[0], top_k=5, **FAST)
    assert torch.equal(alone.images, pipe([3], generator=seeds(0), top_k=5, **FAST).images)
    assert "2 images, 1 labels" in message_of(pipe.attribute, three.images[:2], class_labels=label)
    assert "batch_size=2, but 1 labels" in message_of(pipe, label, batch_size=2, **FAST)


def test_a_tuple_of_generators_is_a_list_of_them(pipe, three):
    given = pipe(LABELS, generator=tuple(seeds(0, 1, 2)), top_k=5, **FAST)
    assert torch.equal(given.images, three.images)


def test_without_a_dict_comes_a_tuple(pipe, three):
    images, attribution, closed_form, resamplings = pipe(
        LABELS, generator=seeds(0, 1, 2), top_k=5, return_dict=False, **FAST
    )
    assert torch.equal(images, three.images)
    assert_same(attribution, three.attribution)
    assert closed_form is None
    assert resamplings.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"class_labels": [True]}, "got True"),
        ({"class_labels": np.array([True])}, "got True"),
        ({"class_labels": "3"}, "got '3'"),
        ({"class_labels": [1.0]}, "got 1.0"),
        ({"class_labels": torch.zeros(1, 2).long()}, "got [0, 0]"),
        ({"generator": 0}, "torch.Generator().manual_seed("),
        ({"generator": [0]}, "torch.Generator().manual_seed("),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"num_inference_steps": 20.0}, "num_inference_steps must be a whole number"),
        ({"top_k": True}, "top_k must be a whole number"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number, got '3'"),
        ({"resample_below": float("nan")}, "resample_below must be a positive finite number"),
        ({"resample_below": float("inf")}, "resample_below must be a positive finite number"),
    ],
)
def test_what_cannot_be_asked_of_sampling_is_refused(arguments, expected, pipe, message_of):
    assert expected in message_of(pipe, **{"num_inference_steps": 10, **arguments})


@pytest.mark.parametrize(
    ("images", "arguments", "expected"),
    [
        (np.zeros((8, 8)), {}, "got float64 of shape (8, 8)"),
        ([np.zeros((8, 8), bool)], {}, "images[0] must be uint8"),
        (np.zeros((1, 1, 8, 8), np.uint8), {}, "(height, width, channel)"),
        (np.zeros((0, 8, 8), np.uint8), {}, "at least one"),
        ([torch.zeros(1, 9, 9).byte()], {}, "uint8 of shape (1, 8, 8)"),
        ([torch.zeros(1, 8, 8)], {}, "got torch.float32"),
        (
            [Image.new("L", (8, 8)), None],
            {},
            "images[1] must be a PIL image, an array, a tensor or a path, got NoneType",
        ),
        ([Image.new("F", (8, 8))], {}, "images[0]"),
        ("absent.png", {}, "no image at absent.png"),
        (np.zeros((8, 8), np.uint8), {"top_k": None}, "top_k must be a whole number, got None"),
        (np.zeros((8, 8), np.uint8), {"seed": -1}, "seed must be at least 0, got -1"),
        (np.zeros((8, 8), np.uint8), {"seed": 0.5}, "seed must be a whole number"),
    ],
)
def test_what_cannot_be_attributed_is_refused(images, arguments, expected, pipe, message_of):
    assert expected in message_of(pipe.attribute, images, **arguments)


@pytest.mark.parametrize("scale", [1e30, -1e38])
@pytest.mark.parametrize("top_k", [None, 3])
def test_samples_that_are_not_finite_are_refused(scale, top_k, pipe, message_of):
    message = message_of(pipe, [3, 1], generator=seeds(0, 1), guidance_scale=scale, top_k=top_k, **FAST)
    assert message.startswith(f"sampling gave pixels that are not finite; guidance_scale={scale:g} is too large")


def test_samples_that_are_finite_have_traces_that_are(pipe):
    output = pipe([3, 1], generator=seeds(0, 1), guidance_scale=1e10, top_k=3, **FAST)
    assert output.attribution.weight.isfinite().all()


def test_weights_that_are_not_finite_are_named(pipe, message_of):
    broken = ProvenancePipeline(**(pipe.components | {"unet": deepcopy(pipe.unet)})).with_manifest(pipe.manifest)
    broken.set_progress_bar_config(disable=True)
    next(broken.unet.parameters()).data.fill_(float("nan"))
    message = message_of(broken, [3], top_k=None, **FAST)
    assert "not finite; the weights of this pipeline are damaged" in message


def test_a_label_restricts_what_an_outside_image_is_traced_to(pipe, trained):
    train = trained.data.train
    labels = [(int(label) + 1) % 10 for label in train.labels[:5]]
    found = of_posteriors_alone(pipe).attribute(train.images[:5], top_k=1, class_labels=labels)
    assert train.labels[found.example_index[:, 0]].tolist() == labels
    # Credit may be due to other classes, and an original comes first, but neither is believed to be the parent.
    credited = pipe.attribute(train.images[:5], top_k=len(train), class_labels=labels)
    is_other = train.labels[credited.example_index] != torch.tensor(labels)[:, None]
    assert credited.posterior[is_other].max() == 0
    assert credited.example_index[:, 0].tolist() == list(range(5))
    assert credited.explained.is_copy.all()


def test_attributing_uses_levels_inside_the_window_alone(pipe, trained):
    found = pipe.attribute(trained.data.train.images[:1], num_inference_steps=20)
    low, high = pipe.window
    levels = pipe.generator.alpha_bars(20)
    assert torch.equal(found.alpha_bar, levels[(levels > low) & (levels < high)])
    assert (low, high) == (pipe.temperatures.config.low, pipe.temperatures.config.high)
    assert 0 < low < high < 1
    assert len(found.alpha_bar) == found.step_entropy.shape[1] > 3


def test_without_credit_the_weight_is_the_posterior(pipe, three):
    believed = of_posteriors_alone(pipe)
    believed.set_progress_bar_config(disable=True)
    plain = believed(LABELS, generator=seeds(0, 1, 2), top_k=40, **FAST)
    assert torch.equal(plain.images, three.images)
    assert torch.equal(plain.attribution.weight, plain.attribution.posterior)
    assert plain.attribution.explained.share.isnan().all(), "not known without training images"
    # The same posteriors as with credit, in another order.
    whole = pipe(LABELS, generator=seeds(0, 1, 2), top_k=40, **FAST).attribution
    dense = [torch.zeros(3, 40).scatter(1, a.example_index, a.posterior) for a in (whole, plain.attribution)]
    assert torch.equal(*dense)


def test_without_temperatures_posteriors_are_plain_and_all_levels_are_averaged(pipe, trained, mean_over_ratios):
    """Fold by hand the softmax of the network's own logits at every level of the sampler."""
    plain = ProvenancePipeline(**(pipe.components | {"credit": None, "temperatures": None}))
    plain = plain.with_manifest(pipe.manifest)
    images, null = trained.data.train.images[:3], torch.full((3,), 10)
    found = plain.attribute(images, top_k=40, num_inference_steps=10)
    with torch.no_grad():
        steps = list(pipe.generator.renoise(images.float() / 127.5 - 1, null, num_inference_steps=10, seed=0))
        probs = [pipe.provenance.index_logits(s.feature_maps, s.alpha_bars, null).softmax(dim=1) for s in steps]
    dense = torch.zeros(3, 40).scatter(1, found.example_index, found.posterior)
    torch.testing.assert_close(dense, mean_over_ratios([float(step.alpha_bar) for step in steps], probs))
    assert len(found.alpha_bar) == 10


@pytest.mark.parametrize("is_closed_form", [False, True])
def test_posteriors_are_tempered_at_every_level_and_averaged_over_the_window(
    is_closed_form, pipe, trained, mean_over_ratios
):
    """Fold by hand with the pipeline's own temperatures and window."""
    images, labels = trained.data.train.images[:4], torch.tensor([0, 10, 3, 10])
    closed_form = trained.closed_form()
    tracer = Tracer.CLOSED_FORM if is_closed_form else Tracer.NETWORK
    given = {"closed_form": closed_form} if is_closed_form else {}
    found = pipe.attribute(images, top_k=40, class_labels=labels, num_inference_steps=20, **given)
    levels, probs = [], []
    with torch.no_grad():
        steps = pipe.generator.renoise(images.float() / 127.5 - 1, labels, num_inference_steps=20, seed=0)
        for step in steps:
            if pipe.window[0] < step.alpha_bar < pipe.window[1]:
                temperature = pipe.temperatures.temperature(tracer, step.alpha_bars, labels)
                logits = pipe.provenance.index_logits(step.feature_maps, step.alpha_bars, labels)
                if is_closed_form:
                    logits = closed_form.logits(step.query, step.alpha_bars, labels)
                levels.append(float(step.alpha_bar))
                probs.append((logits.double() / temperature.double()[:, None]).softmax(dim=1))
    dense = torch.zeros(4, 40).scatter(1, found.example_index, found.posterior.float())
    torch.testing.assert_close(dense, mean_over_ratios(levels, probs).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["diffusion", "vae", "none"])
def test_what_is_explained_is_of_the_very_images_and_a_copy_names_its_original_first(kind, trained_of):
    trained = trained_of(kind)
    train, pipeline = trained.data.train, trained.pipeline
    found = pipeline.attribute(train.images, top_k=1)
    torch.testing.assert_close(found.explained.by_nearest, torch.ones(len(train)))
    # Two images may be the same but for their brightness.
    others = pipeline.mixtures.images[found.example_index[:, 0]] - pipeline.mixtures.images
    torch.testing.assert_close(others.std(dim=1), torch.zeros(len(train)), atol=1e-5, rtol=0)
    noise = torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        vars(pipeline.attribute(noise, top_k=1).explained), vars(pipeline.mixtures.explain(noise.float() / 127.5 - 1))
    )
    config = pipeline.temperatures.config
    assert (float(found.explained.least[0]), float(found.explained.copy[0])) == pytest.approx(
        (config.least_explained, config.copy)
    )


def test_samples_are_explained_as_images_from_outside_are(pipe, three):
    outside = pipe.attribute(three.images, top_k=1).explained
    for name in ("share", "by_nearest", "by_class_mean"):
        inside = getattr(three.attribution.explained, name)
        torch.testing.assert_close(inside, getattr(outside, name), atol=0.02, rtol=0)
    assert three.closed_form.explained is three.attribution.explained


@pytest.fixture(scope="module")
def decoded(trained_of):
    """Three images of an autoencoder with traces by the network and by the closed form."""
    trained = trained_of("vae")
    closed_form = trained.closed_form()
    return trained.pipeline(batch_size=3, generator=seeds(0, 1, 2), top_k=5, closed_form=closed_form, **FAST)


def test_an_autoencoder_generates_and_traces(trained_of, decoded):
    pipe = trained_of("vae").pipeline
    assert not pipe.generator.is_class_conditional
    assert decoded.images.shape == (3, 1, 8, 8)
    assert decoded.images.dtype == torch.uint8
    for attribution in (decoded.attribution, decoded.closed_form):
        assert attribution.example_index.shape == (3, 5)
        shown = attribution.posterior.sum(1) + attribution.mass_not_shown
        torch.testing.assert_close(shown, torch.ones(3), rtol=0, atol=1e-5)
        assert attribution.alpha_bar.tolist() == pytest.approx([CLEAN_ALPHA_BAR])
        torch.testing.assert_close(attribution.step_entropy[:, 0], attribution.entropy)
        assert attribution.commitment_step.tolist() == [-1] * 3
    assert not torch.equal(decoded.attribution.posterior, decoded.closed_form.posterior)


def test_seeds_decide_the_images_of_an_autoencoder(trained_of, decoded):
    pipe = trained_of("vae").pipeline
    again = pipe([None] * 3, generator=seeds(0, 1, 2), top_k=5, **FAST)
    assert torch.equal(again.images, decoded.images)
    assert_same(again.attribution, decoded.attribution)
    plain = pipe(batch_size=3, generator=seeds(0, 1, 2), top_k=None, **FAST)
    assert torch.equal(plain.images, decoded.images)
    assert plain.attribution is None
    other = pipe(batch_size=3, generator=seeds(3, 4, 5), top_k=5, **FAST).images
    assert not any(torch.equal(a, b) for a, b in zip(other, decoded.images, strict=True))
    part = pipe(batch_size=1, generator=seeds(2), top_k=5, **FAST)
    assert (part.images.int() - decoded.images[2:].int()).abs().max() <= 1
    assert_close(part.attribution, decoded.attribution, [2], 1e-4)


@pytest.mark.parametrize("kind", ["vae", "none"])
def test_saving_and_loading_other_kinds_gives_identical_traces(kind, trained_of, decoded, tmp_path):
    trained = trained_of(kind)
    trained.pipeline.save_pretrained(tmp_path / "copy")
    loaded = ProvenancePipeline.from_pretrained(tmp_path / "copy").with_training_images(trained.data.train)
    images = trained.data.train.images[:6]
    assert_same(loaded.attribute(images), trained.pipeline.attribute(images))
    if kind == "vae":
        again = loaded(batch_size=3, generator=seeds(0, 1, 2), top_k=5, **FAST)
        assert torch.equal(again.images, decoded.images)
        assert_same(again.attribution, decoded.attribution)
    component = "vae" if kind == "vae" else "classifier"
    files = {"model_index.json", "manifest.parquet", "sha256.json", component, "provenance", "temperatures", "credit"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == files
    suffixes = {path.suffix for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".safetensors", ".parquet"}


@pytest.mark.parametrize("kind", ["vae", "none"])
def test_outside_images_are_traced_by_every_kind_whatever_is_in_the_batch(kind, trained_of):
    trained = trained_of(kind)
    images = trained.data.train.images[:6]
    whole = trained.pipeline.attribute(images, top_k=4)
    part = trained.pipeline.attribute([to_pil(image) for image in images[[4, 1]]], top_k=4)
    assert_close(part, whole, [4, 1], 1e-5)
    assert torch.equal(part.example_index, whole.example_index[[4, 1]])
    labels = [(int(label) + 1) % 10 for label in trained.data.train.labels[:6]]
    is_conditional = of_posteriors_alone(trained.pipeline).attribute(images, top_k=1, class_labels=labels)
    assert trained.data.train.labels[is_conditional.example_index[:, 0]].tolist() == labels
    exact = trained.pipeline.attribute(images, top_k=4, closed_form=trained.closed_form())
    assert not torch.allclose(exact.entropy, whole.entropy, atol=1e-4)


def test_without_a_generator_the_closed_form_finds_every_training_image(trained_of):
    trained = trained_of("none")
    train = trained.data.train
    believed = of_posteriors_alone(trained.pipeline)
    found = believed.attribute(train.images, top_k=2, closed_form=trained.closed_form())
    assert torch.equal(found.example_index[:, 0], torch.arange(len(train)))
    assert (found.posterior[:, 0] > found.posterior[:, 1]).all()


def test_what_a_kind_cannot_do_is_refused(trained_of, message_of):
    vae, classifier = trained_of("vae").pipeline, trained_of("none").pipeline
    assert "without class labels" in message_of(vae, [3], **FAST)
    assert "guidance_scale must be 1" in message_of(vae, guidance_scale=2.0, **FAST)
    for top_k in (None, 3):
        message = message_of(classifier, batch_size=2, top_k=top_k, **FAST)
        assert "cannot generate 2 images" in message
    assert not classifier.generator.is_class_conditional


@pytest.fixture
def bare(pipe):
    """The pipeline without its provenance network."""
    alone = ProvenancePipeline(unet=pipe.unet, scheduler=pipe.scheduler).with_manifest(pipe.manifest)
    alone.set_progress_bar_config(disable=True)
    return alone


def test_without_a_provenance_network_images_are_the_same_and_come_without_traces(bare, three):
    plain = bare(LABELS, generator=seeds(0, 1, 2), top_k=None, **FAST)
    assert torch.equal(plain.images, three.images)
    assert plain.attribution is None


def test_without_a_provenance_network_tracing_is_refused(bare, trained_of, message_of):
    for message in (
        message_of(bare, [1], top_k=1, **FAST),
        message_of(bare.attribute, torch.zeros(1, 1, 8, 8).byte()),
    ):
        assert "no provenance network" in message
        assert "top_k=None" in message
    trained = trained_of("vae")
    vae = ProvenancePipeline(vae=trained.pipeline.vae).with_manifest(trained.data.manifest)
    assert "no provenance network" in message_of(vae, top_k=1, **FAST)
    assert vae(batch_size=2, top_k=None, **FAST).images.shape == (2, 1, 8, 8)


def test_a_pipeline_without_provenance_network_is_saved_and_loaded(bare, three, tmp_path):
    bare.save_pretrained(tmp_path / "bare")
    loaded = ProvenancePipeline.from_pretrained(tmp_path / "bare")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(LABELS, generator=seeds(0, 1, 2), top_k=None, **FAST).images, three.images)
    assert loaded.manifest.table.equals(bare.manifest.table)


def test_a_pipeline_of_another_version_is_refused(pipe, tmp_path, message_of):
    pipe.save_pretrained(tmp_path / "old")
    config = tmp_path / "old" / "provenance" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["head"]
    config.write_text(json.dumps(content), encoding="utf-8")
    seal(tmp_path / "old")
    assert "cannot be loaded (TypeError" in message_of(ProvenancePipeline.from_pretrained, tmp_path / "old")
