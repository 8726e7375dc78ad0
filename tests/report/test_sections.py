"""Sections of the report: what stands in tables, metrics and figures is what was measured."""

import math
from collections import Counter

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from provgen.metrics.set_measures import SetMeasure
from provgen.metrics.statistics import Estimate
from provgen.metrics.verdicts import KINDS, Evidence, Limits, Verdict
from provgen.report.sections.networks import (
    generalization_section,
    index_section,
    loss_ratios,
    plot_by_level,
    plot_temperatures,
    temperature_section,
)
from provgen.report.sections.samples import agreement_section, explained_section
from provgen.report.sections.sets import READ, memorization_section, plot_set_measures, sets_section
from provgen.report.sections.verdicts import (
    PANELS,
    gallery_rows,
    plot_evidence,
    plot_verdicts,
    verdicts_section,
    write_verdicts,
)
from provgen.tracing.attribution import Explained


def by_name(metrics):
    return {metric.name: metric for metric in metrics}


TRAIN = torch.tensor([[1.0, 1.5, 2.0]] * 3)
HOLDOUT = 2 * TRAIN
DIVERGENCE = {100: torch.tensor([1.0, 3.0]), 700: torch.tensor([0.0, 0.0])}


def test_losses_and_divergence_are_metrics():
    section, metrics = generalization_section("denoising_loss", "Loss", TRAIN, HOLDOUT, DIVERGENCE)
    assert {metric.name: metric.value for metric in metrics}.items() >= {
        "train_denoising_loss": 1.5,
        "holdout_denoising_loss": 3,
        "denoising_loss_ratio": 2,
        "denoising_loss_ratio_little_noise": 2,
        "denoising_loss_ratio_some_noise": 2,
        "denoising_loss_ratio_much_noise": 2,
        "divergence_from_closed_form_nats": 1,
    }.items()
    assert section.figures
    assert {row[0]: row[1].split()[0] for row in section.table.rows}["held-out"] == "3.000"


@pytest.mark.parametrize("name", ["autoencoder_loss", "class_loss"])
def test_generators_without_noise_levels_have_no_figure(name):
    section, metrics = generalization_section(name, "Loss", TRAIN, HOLDOUT, None)
    assert not section.figures
    assert any(metric.name.endswith("_ratio") for metric in metrics)
    assert not any("noise" in metric.name for metric in metrics)


def test_curves_are_drawn_where_they_were_measured():
    left, right = plot_by_level(TRAIN, HOLDOUT, DIVERGENCE).axes
    curves = {line.get_label(): line for line in left.lines}
    assert {name: curves[name].get_ydata().tolist() for name in ("training", "held-out")} == {
        "training": [1, 1.5, 2],
        "held-out": [2, 3, 4],
    }
    assert curves["training"].get_xdata().tolist() == pytest.approx([500 / 3, 500, 2500 / 3])
    assert right.lines[0].get_xydata().tolist() == [[100, 2], [700, 0]]


def test_ratios_of_thirds_by_hand():
    unseen = TRAIN * torch.tensor([3.0, 2.0, 1.0])
    found = loss_ratios(TRAIN, unseen)
    assert {name: ratio.value for name, ratio in found.items()} == pytest.approx(
        {"all": 8 / 4.5, "little_noise": 3, "some_noise": 2, "much_noise": 1}
    )
    assert list(loss_ratios(TRAIN[:, :1], unseen[:, :1])) == ["all"]


def quality(alpha_bar, rows, top1):
    numbers = {"cross_entropy": 1.0, "cross_entropy_ceiling": 0.5, "kl_gap": 0.5, "n": 30}
    for name, value in (("top1", top1), ("top5", 2 * top1)):
        numbers |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1, f"{name}_ceiling": 0.9}
    return {"alpha_bar": alpha_bar, "rows": rows, **numbers}


def test_the_index_is_reported_at_the_middle_level_beside_chance_and_ceiling():
    places = (0.3, 0.87, 0.95)
    levels = [quality(level, kind, level / 3) for kind in ("conditional", "unconditional") for level in places]
    gaps = {f"kl_gap_{kind}{end}": 0.5 for kind in ("conditional", "unconditional") for end in ("", "_low", "_high")}
    section, metrics = index_section({"index_quality": levels, **gaps}, 40, 10)
    top1 = by_name(metrics)["index_top1_conditional_at_the_middle_level"]
    assert (top1.value, top1.n, top1.ceiling) == (0.87 / 3, 30, 0.9)
    assert top1.baseline == 10 / 40, "one of the four images of the class"
    assert by_name(metrics)["index_top5_unconditional_at_the_middle_level"].baseline == 5 / 40
    assert by_name(metrics)["index_kl_gap_conditional_nats"].ceiling == 0
    assert len(section.table.rows) == len(levels)
    alone = index_section({"index_quality": levels[:1], **gaps}, 40, 10)
    assert "index_top1_conditional" in by_name(alone[1]), "a generator without noise levels has one"
    assert not alone[0].figures


def test_temperatures_are_drawn_where_they_were_fitted_and_reported_over_the_window():
    names = [f"{tracer}_{kind}" for tracer in ("closed_form", "network") for kind in ("conditional", "unconditional")]
    rows = [
        {"alpha_bar": level, **{name: base * factor for factor, name in enumerate(names, 1)}}
        for level, base in ((0.1, 1.0), (0.5, 2.0), (0.9, 8.0))
    ]
    section, metrics = temperature_section(rows, (0.2, 0.95))
    # The geometric mean of 2 and 8 is 4.
    found = {metric.name: (metric.value, metric.n, metric.baseline, metric.ceiling) for metric in metrics}
    assert found == {
        "temperature_conditional": (pytest.approx(4), 2, None, 1.0),
        "temperature_unconditional": (pytest.approx(8), 2, None, 1.0),
    }
    everywhere = temperature_section(rows, (0.95, 0.97))[1]
    assert [metric.value for metric in everywhere] == pytest.approx([16 ** (1 / 3), 2 * 16 ** (1 / 3)])
    assert len(section.figures) == 1
    (axes,) = plot_temperatures(rows, (0.2, 0.95)).axes
    drawn = {line.get_label(): line for line in axes.lines}
    for factor, name in enumerate(names, 1):
        line = drawn[name.replace("closed_form_", "closed form, ").replace("network_", "network, ")]
        assert line.get_ydata().tolist() == [factor, 2 * factor, 8 * factor]
        assert line.get_xdata().tolist() == pytest.approx([-math.log(9), 0, math.log(9)])
    assert axes.get_yscale() == "log"
    (span,) = axes.patches
    assert sorted(span.get_corners()[:, 0])[::2] == pytest.approx([math.log(0.2 / 0.8), math.log(0.95 / 0.05)])


def shares(rows, least=0.25, copy=0.95) -> Explained:
    """What is explained of images, (query, 3): share, by the nearest, by a class mean."""
    share, by_nearest, by_class_mean = torch.tensor(rows).T
    ones = torch.ones(len(rows))
    nearest = torch.zeros(len(rows), dtype=torch.int64)
    return Explained(
        share=share, by_nearest=by_nearest, by_class_mean=by_class_mean, nearest=nearest, least=least * ones,
        copy=copy * ones,
    )  # fmt: skip


def test_what_is_explained_stands_between_noise_and_copies():
    sets = {
        "generated": shares([[0.5, 0.25, 0.125], [0.75, 0.5, 0.25], [0.125, 0.0, 0.0], [1.0, 0.96, 0.25]]),
        "held-out": shares([[0.5, 0.25, 0.25], [1.0, 0.5, 0.5]]),
        "copied": shares([[1.0, 1.0, 0.5]] * 3),
        "noise": shares([[0.0625, 0.0, 0.0]] * 3),
    }
    section, metrics = explained_section(sets)
    found = {metric.name: (metric.value, metric.baseline, metric.ceiling, metric.n) for metric in metrics}
    assert found == {
        "explained_share": (0.59375, 0.0625, 1.0, 4),
        "share_without_sources": (0.25, 1.0, None, 4),
        "share_copies": (0.25, None, 1.0, 4),
        "holdout_explained_share": (0.75, 0.0625, 1.0, 2),
    }
    assert [row[0] for row in section.table.rows] == list(sets)
    cells = {row[0]: [float(str(cell).split()[0]) for cell in row[1:]] for row in section.table.rows}
    assert cells["generated"] == pytest.approx([0.594, 0.4275, 0.15625, 0.25, 0.25])
    assert cells["copied"] == pytest.approx([1, 1, 0.5, 0, 1])
    assert "Below 25% an image has no sources" in section.text
    assert "From 95% by the nearest alone it is a copy" in section.text
    without = explained_section({name: of_set for name, of_set in sets.items() if name != "held-out"})[1]
    assert "holdout_explained_share" not in by_name(without)


def traces(*sources):
    return [
        {"sample": sample, "rank": rank, "example_index": index}
        for sample, named in enumerate(sources)
        for rank, index in enumerate(named)
    ]


def test_agreement_stands_beside_that_with_another_sample_of_the_class():
    samples = [{"class_label": label} for label in (0, 0, 1)]
    network, closed_form = traces([4, 7], [1, 2], [3, 5]), traces([4, 8], [4, 1], [3, 5])
    section, metrics = agreement_section(samples, network, closed_form, 40)
    top1, overlap = by_name(metrics)["agreement_top1"], by_name(metrics)["agreement_top2_overlap"]
    assert (top1.value, overlap.value) == pytest.approx((2 / 3, (1 / 2 + 1 / 2 + 1) / 3))
    # Sample 0 beside the answer for 1, sample 1 beside that for 0; the third is alone in its class.
    assert (top1.baseline, overlap.baseline) == pytest.approx((1 / 2, (1 / 2 + 0) / 2))
    assert [row[1].split()[0] for row in section.table.rows] == ["0.667", "0.667"]
    _, without = agreement_section(samples[:1], network[:2], closed_form[:2], 40)
    assert by_name(without)["agreement_top1"].baseline is None


def test_copies_are_the_ceiling_of_the_share_memorized(generator):
    train, holdout = torch.randn(50, 6, generator=generator), torch.randn(20, 6, generator=generator)
    generated = torch.cat([train[:5] + 1e-6, holdout[:5] + 100])
    section, (metric,) = memorization_section(generated, holdout, train[:10], train)
    assert (metric.value, metric.ceiling, metric.n) == (0.5, 1, 10)
    assert metric.baseline < 0.2
    assert {row[0] for row in section.table.rows} == {"generated", "held-out", "copied"}
    assert memorization_section(generated, holdout[:0], train[:10], train)[1][0].baseline is None


def around(value):
    return Estimate(value, value - 0.5, value + 1, 30)


@pytest.fixture
def measures():
    columns = [[around(number + place) for place in (0, 0.25, 0.5)] for number in range(len(READ))]
    return {name: SetMeasure(*three) for name, three in zip(READ, columns, strict=True)}


def test_table_and_metrics_hold_all_columns_of_a_set_measure(measures):
    section, metrics = sets_section(measures, "pixels")
    row = dict(zip(section.table.header, section.table.rows[1], strict=True))
    assert row["measure"] == "C_T in deviations"
    assert (row["generated"], row["held-out"], row["copies"]) == (
        "1 [0.5, 2]",
        "1.25 [0.75, 2.25]",
        "1.5 [1, 2.5]",
    )
    assert "share_memorized" not in by_name(metrics), "it has a section of its own"
    copying = by_name(metrics)["data_copying"]
    assert (copying.value, copying.low, copying.high) == (1, 0.5, 2)
    assert (copying.baseline, copying.ceiling, copying.n) == (1.25, 1.5, 30)


def test_the_figure_has_a_panel_for_every_set_measure(measures):
    panels = {axes.get_title(): axes for axes in plot_set_measures(measures).axes if axes.axison}
    assert panels.keys() == {title for title, _ in READ.values()}
    heights = [container.lines[0].get_ydata()[0] for container in panels["closer to train"].containers]
    assert heights == [3, 3.25, 3.5]


NAMES = ("ratio", "calibrated", "distance", "patches", "sources", "late_entropy", "of_class", "top", "agreement")
LIMITS = Limits(calibrated=0.8, distance=0.6, sources=50.0, few=4.0, of_class=0.2, n=100)


@pytest.fixture
def judged():
    return {
        "generated": [
            Verdict("copy", "a"),
            Verdict("novel", "b"),
            Verdict("novel", "c"),
            Verdict("near copy", "d"),
        ],
        "held-out": [Verdict("novel", "e")] * 3,
        "copies": [Verdict("copy", "f")] * 2,
    }


def evidence_of(count):
    """Make evidence whose every kind counts up, each from its own place on."""
    return Evidence(**{name: torch.arange(float(count)) + place for place, name in enumerate(NAMES)})


@pytest.fixture
def evidence(judged):
    return {name: evidence_of(len(verdicts)) for name, verdicts in judged.items()}


def test_shares_stand_beside_those_of_held_out_images_and_copies(judged, evidence):
    section, metrics = verdicts_section(judged, evidence, LIMITS, Image.new("RGB", (30, 20)))
    assert 30 in {picture.width for picture in section.figures}, "the gallery"
    rows = {row[0]: dict(zip(section.table.header, row, strict=True)) for row in section.table.rows}
    assert rows.keys() == set(KINDS)
    shares = [rows["copy"][name].split()[0] for name in ("generated", "held-out", "copies")]
    assert shares == ["0.250", "0.000", "1.000"]
    novel = by_name(metrics)["share_novel"]
    assert (novel.value, novel.baseline, novel.ceiling, novel.n) == (0.5, 1, 0, 4)
    assert by_name(metrics)["share_near_copy"].value == 0.25
    assert sum(metric.value for metric in metrics) == 1


def test_bars_are_as_long_as_shares(judged):
    (axes,) = plot_verdicts(judged).axes
    lengths = Counter()
    for bars in axes.containers:
        lengths[round(bars[0].get_y() + bars[0].get_height() / 2)] += bars[0].get_width()
    assert lengths == {0: 1, 1: 1, 2: 1}
    assert {bars[0].get_width() for bars in axes.containers} == {0, 0.25, 0.5, 1}


def test_every_sample_is_written_with_its_reason(judged, tmp_path):
    write_verdicts(tmp_path / "verdicts.parquet", evidence_of(4), judged["generated"], [30, None, 40, None])
    rows = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[2].items() >= {
        "sample": 2, "verdict": "novel", "reason": "c", "ratio": 2, "calibrated": 3, "distance": 4, "patches": 5,
        "sources": 6, "late_entropy": 7, "of_class": 8, "top": 9, "agreement": 10, "commitment_step": 40,
    }.items()  # fmt: skip
    assert rows[1]["commitment_step"] is None


def test_the_gallery_has_the_first_of_each_verdict():
    kinds = ["novel", "copy", "novel", "copy", "near copy", "novel", "novel"]
    assert gallery_rows([Verdict(kind, "") for kind in kinds]) == [1, 3, 4, 0, 2, 5]


def test_evidence_is_drawn_with_its_limits(evidence):
    evidence["held-out"].patches[:] = torch.nan
    panels = {axes.get_title(): axes for axes in plot_evidence(evidence, LIMITS).axes}
    assert panels.keys() == set(PANELS.values())
    curves = {line.get_label(): len(line.get_xdata()) - 1 for line in panels["calibrated distance"].lines}
    assert {name: curves[name] for name in evidence} == {"generated": 4, "held-out": 3, "copies": 2}
    assert [0.8, 0.8] in [list(line.get_xdata()) for line in panels["calibrated distance"].lines]
    drawn = {line.get_label() for line in panels["parts from one image"].lines}
    assert "held-out" not in drawn, "without the set that has no parts that tell"
