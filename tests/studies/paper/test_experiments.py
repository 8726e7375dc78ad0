"""Experiment files to runs: every combination once, names that make folders, mistakes in one line."""

import re

import pytest

from provgen.settings_file import load_settings
from provgen.studies.jobs import Shard
from provgen.studies.paper.experiments import Experiment, load_experiment

SMALL = """
title: A title
question: A question?
config: digits
settings:
  generator.kind: none
  training.max_steps: 600
vary:
  provenance.label_mixing: [0, 0.5]
  provenance.shared_stages: [1, null]
seeds: 2
x: provenance.label_mixing
lines: [provenance.shared_stages]
figure: [index_top1]
table: [index_top1, kl_gap]
claims:
  - {text: Falls., source: ours, metric: index_top1, along: provenance.label_mixing, expected: falls, tolerance: 0.01}
quick:
  seeds: 1
  settings: {training.max_steps: 9, training.warmup_steps: 2}
  vary: {provenance.label_mixing: [0, 1], provenance.shared_stages: [null]}
"""

NAMED = """
title: A title
question: A question?
config: digits
variants:
  none: {provenance.index_head: none}
  stop-0.1: {provenance.gradient: stop, provenance.loss_weight: 1e-1}
seeds: 1
figure: [holdout_loss]
table: [holdout_loss]
"""


@pytest.fixture
def load_text(tmp_path, repository):
    """Load an experiment from the text of its file."""

    def load(text: str, **more) -> Experiment:
        path = tmp_path / "given.yaml"
        path.write_text(text, encoding="utf-8")
        return load_experiment(path, repository / "recipes", **more)

    return load


@pytest.fixture(scope="module")
def shipped(repository):
    """Every shipped experiment, full and quick."""
    files = sorted((repository / "recipes" / "paper").glob("*.yaml"))
    assert len(files) == 10
    return [load_experiment(path, repository / "recipes", quick=quick) for path in files for quick in (False, True)]


def test_every_combination_is_a_variant_and_every_seed_a_run(load_text, tmp_path):
    runs = load_text(SMALL).runs()
    assert [run.name for run in runs] == [
        "given/label_mixing=0,shared_stages=1-seed0",
        "given/label_mixing=0,shared_stages=all-seed0",
        "given/label_mixing=0.5,shared_stages=1-seed0",
        "given/label_mixing=0.5,shared_stages=all-seed0",
        "given/label_mixing=0,shared_stages=1-seed1",
        "given/label_mixing=0,shared_stages=all-seed1",
        "given/label_mixing=0.5,shared_stages=1-seed1",
        "given/label_mixing=0.5,shared_stages=all-seed1",
    ]
    assert runs[5].overrides(tmp_path) == [
        "generator.kind=none",
        "training.max_steps=600",
        "provenance.label_mixing=0",
        "provenance.shared_stages=null",
        "training.seed=1",
        f"output_dir={tmp_path}/given/label_mixing=0,shared_stages=all-seed1",
    ]
    assert runs[5].variant.values == {"provenance.label_mixing": 0.0, "provenance.shared_stages": None}


def test_a_variant_that_leaves_a_varied_key_out_has_the_value_of_the_settings(load_text):
    none, stop = load_text(NAMED).variants
    assert none.values == {
        "provenance.index_head": "none",
        "provenance.gradient": "joint",
        "provenance.loss_weight": 0.01,
    }
    assert list(stop.values.values()) == ["class_independent", "stop", 0.1]


def test_named_variants_are_combined_with_varied_values(load_text):
    both = load_text(f"{NAMED}vary: {{provenance.targets: [posterior, one_hot]}}\n")
    names = [variant.name for variant in both.variants]
    assert names == [f"{name},targets={t}" for name in ("none", "stop-0.1") for t in ("posterior", "one_hot")]
    assert both.variants[3].settings.provenance.targets == "one_hot"
    assert both.variants[3].settings.provenance.gradient == "stop"


def test_a_claim_may_name_a_variant_to_compare_with(load_text):
    claim = "{text: It costs., source: ours, metric: holdout_loss, along: provenance.loss_weight, "
    claim += "where: {provenance.gradient: [stop]}, reference: none, expected: rises, tolerance: 0}"
    (read,) = load_text(f"{NAMED}claims:\n  - {claim}\n").description.claims
    assert (read.reference, read.where, read.tolerance) == ("none", {"provenance.gradient": ["stop"]}, 0.0)


def test_quick_replaces_settings_one_by_one_and_the_rest_as_a_whole(load_text):
    quick = load_text(SMALL, quick=True)
    assert [run.name for run in quick.runs()] == [
        "given/label_mixing=0,shared_stages=all-seed0",
        "given/label_mixing=1,shared_stages=all-seed0",
    ]
    settings = quick.variants[0].settings
    assert settings.generator.kind == "none"
    assert (settings.training.max_steps, settings.training.warmup_steps) == (9, 2)
    assert load_text(SMALL).variants[0].settings.training.max_steps == 600


def test_settings_of_a_run_are_those_its_arguments_make(load_text, tmp_path):
    for run in load_text(SMALL, overrides=["training.batch_size=7"]).runs()[1::3]:
        assert run.settings(tmp_path) == load_settings(run.experiment.config, run.overrides(tmp_path))
        assert run.settings(tmp_path).training.batch_size == 7


def test_a_row_holds_what_the_run_is_and_its_metrics(load_text):
    row = load_text(SMALL).runs()[4].row({"index_top1": 0.5})
    assert row == {
        "experiment": "given",
        "variant": "label_mixing=0,shared_stages=1",
        "seed": 1,
        "provenance.label_mixing": 0.0,
        "provenance.shared_stages": 1,
        "index_top1": 0.5,
    }


def test_every_shipped_run_has_a_folder_of_its_own_with_a_safe_name(shipped):
    for quick in (0, 1):
        names = [run.name for chosen in shipped[quick::2] for run in chosen.runs()]
        assert len({name.casefold() for name in names}) == len(names)
        assert all(re.fullmatch(r"\w+/[\w.,=+-]{1,100}-seed\d", name, flags=re.ASCII) for name in names)


def test_shipped_variants_differ_in_their_settings(shipped):
    for chosen in shipped:
        settings = [variant.settings for variant in chosen.variants]
        assert len(set(settings)) == len(settings), chosen.name


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_shards_cover_every_run_exactly_once(count, shipped):
    runs = [run for chosen in shipped[::2] for run in chosen.runs()]
    shards = [Shard(number, count).share(runs) for number in range(1, count + 1)]
    names = [run.name for shard in shards for run in shard]
    assert sorted(names) == sorted(run.name for run in runs)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_a_shard_is_read_as_number_of_count(message_of):
    assert Shard.parse("2/3") == Shard(2, 3)
    for text in ("0/2", "3/2", "1", "a/b", "1/0", "-1/2", ""):
        assert text in message_of(Shard.parse, text)


MISTAKES = {
    "unknown key": ("seeds: 2", "seed: 2", "did you mean seeds?"),
    "missing key": ("title: A title\n", "", "title is missing"),
    "unknown quick key": ("  seeds: 1\n", "  steps: 1\n", "unknown key steps=1"),
    "unknown setting": ("generator.kind: none", "generator.kid: none", "did you mean generator.kind?"),
    "impossible setting": ("[0, 0.5]", "[0, 1.5]", "provenance.label_mixing must be in [0, 1]"),
    "setting of the wrong type": ("[0, 0.5]", "[0, much]", "provenance.label_mixing"),
    "values that are no list": ("[0, 0.5]", "0.5", "vary must be of type"),
    "no values": ("[0, 0.5]", "[]", "vary.provenance.label_mixing must be a list"),
    "the same value twice": ("[0, 0.5]", "[0.5, 0.5]", "two variants are named"),
    "no seeds": ("seeds: 2", "seeds: 0", "seeds must be"),
    "half a seed": ("seeds: 2", "seeds: 0.5", "seeds must be"),
    "no such settings": ("config: digits", "config: digit", "digit.yaml"),
    "unknown metric": ("[index_top1, kl_gap]", "[index_top1, kl_gaps]", "did you mean kl_gap?"),
    "x that does not vary": ("x: provenance.label_mixing", "x: provenance.width", "provenance.width does not vary"),
    "lines that mix": ("lines: [provenance.shared_stages]\n", "", "neither x nor in lines"),
    "unknown claim key": ("expected: falls", "expects: falls", "did you mean expected?"),
    "a claim without a source": ("source: ours, ", "", "source is missing"),
    "a source that is none": ("source: ours", "source: body", "abstract"),
    "a claim that is none": ("  - {text", "  - text\n  - {text", "a claim must hold"),
    "claims that are no list": ("claims:\n", "claims: 3\nold:\n", "claims must be a list"),
    "metric of a claim": ("metric: index_top1", "metric: kl_gaps", "did you mean kl_gap?"),
    "reference that is no variant": ("expected: falls", "reference: alone, expected: falls", "'alone'"),
    "tolerance that is not finite": ("tolerance: 0.01", "tolerance: .inf", "tolerance must be a finite number"),
    "unknown direction": ("expected: falls", "expected: sinks", "rises"),
    "negative tolerance": ("tolerance: 0.01", "tolerance: -1", "tolerance must be"),
    "claim along what does not vary": ("along: provenance.label_mixing", "along: provenance.width", "does not vary"),
    "claim about no variant": ("expected: falls", "where: {provenance.shared_stages: [3]}, expected: falls", "where"),
    "a section": ("generator.kind: none", "generator: {kind: none}", "generator must be a single value"),
    "a list as a value": ("[0, 0.5]", "[[0, 0.5]]", "vary must be of type"),
    "a setting of the driver": ("training.max_steps: 600", "training.seed: 600", "training.seed"),
    "interpolation": ("generator.kind: none", "generator.kind: ${config}", "${config} is not allowed"),
    "not YAML": ("vary:", "vary: [", "not valid YAML"),
    "text instead of a number": ("title: A title", "title: [1]", "title must be of type"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_file(mistake, load_text, message_of):
    old, new, expected = MISTAKES[mistake]
    assert SMALL.count(old) >= 1
    message = message_of(load_text, SMALL.replace(old, new, 1))
    assert expected in message
    assert "given.yaml" in message


def test_names_of_variants_are_names_of_folders(load_text, message_of):
    assert "'a/b'" in message_of(load_text, NAMED.replace("none:", "a/b:"))


@pytest.mark.parametrize("override", ["provenance.label_mixing=1", "training.seed=3", "output_dir=x"])
def test_what_differs_between_runs_cannot_be_set_for_all(override, load_text, message_of):
    assert override.split("=")[0] in message_of(load_text, SMALL, overrides=[override])


def test_a_missing_file_lists_those_that_there_are(repository, message_of):
    folder = repository / "recipes" / "paper"
    message = message_of(load_experiment, folder / "beta.yaml", repository / "recipes")
    assert "beta.yaml" in message
    assert "alpha, " in message
