"""The table of attribution methods: how faithful, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from provgen.analysis.datamodeling import NoiseCeiling
from provgen.analysis.statistics import Estimate
from provgen.attribution.attributor import Cost
from provgen.run_folder import atomic_path

SCHEMA_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class LdsRow:
    """One method on one kind of query."""

    method: str
    queries: str
    """`generated` or `holdout`."""
    setting: str
    """What was chosen on the calibration subsets."""
    lds: Estimate
    over: Mapping[str, Estimate]
    """By how much it exceeds reference methods, paired."""
    ceiling: NoiseCeiling | None
    """None with one training seed, which does not show how noisy training is."""
    moved: Mapping[str, Estimate | None]
    """How far samples moved without the sources it names, by what was left out; None where that was not tried."""
    cost: Cost | None
    """None for a mixture, which costs what its parts do."""


def markdown_table(rows: Sequence[LdsRow]) -> str:
    """Lay out one table for each kind of query, best method first; LDS in percent with 95 % intervals."""
    kinds = list(dict.fromkeys(row.queries for row in rows))
    return "\n".join(_table(kind, [row for row in rows if row.queries == kind]) for kind in kinds)


def _table(kind: str, rows: Sequence[LdsRow]) -> str:
    others = list(rows[0].over)
    ceiling = rows[0].ceiling
    best = "unknown (one training seed)"
    if ceiling is not None:
        best = (
            f"{_percent(ceiling.estimate)} % (correlation of training seeds {ceiling.seed_correlation:.2f})"
        )
    titles = [
        "method",
        "LDS, %",
        *(f"over {name}" for name in others),
        *rows[0].moved,
        "set-up, s",
        "query, ms",
        "kept, MB",
        "setting",
    ]
    lines = [titles, ["---", *["---:"] * (len(titles) - 2), "---"]]
    for row in sorted(rows, key=lambda row: -row.lds.value):
        lines.append([
            row.method,
            _percent(row.lds),
            *(_percent(row.over[name]) if name != row.method else "-" for name in others),
            *("-" if some is None else _plain(some) for some in row.moved.values()),
            *_costs(row.cost),
            row.setting or "-",
        ])  # fmt: skip
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Queries: {kind}; {rows[0].lds.n} subset models; noise ceiling {best}\n\n{text}\n"


def _costs(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 3
    return [
        f"{cost.fit_seconds:.1f}",
        f"{1e3 * cost.seconds_per_query:.2f}",
        f"{cost.stored_bytes / 1e6:.2f}",
    ]


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def write_parquet(path: Path, rows: Sequence[LdsRow]) -> None:
    """Write one flat row for each method and kind of query."""
    flat = [
        {
            "method": row.method,
            "queries": row.queries,
            "setting": row.setting,
            "subsets": row.lds.n,
            **_columns("lds", row.lds),
            **{
                key: value
                for name, e in row.over.items()
                for key, value in _columns(f"over {name}", e).items()
            },
            **{
                key: value
                for name, e in row.moved.items()
                if e is not None
                for key, value in _columns(name, e).items()
            },
            **_ceiling(row.ceiling),
            **({} if row.cost is None else asdict(row.cost)),
        }
        for row in rows
    ]
    # Not every row has every column, and from_pylist looks at the first row alone.
    columns = list(dict.fromkeys(name for row in flat for name in row))
    table = pa.table({name: [row.get(name) for row in flat] for name in columns}).replace_schema_metadata(
        {"schema_version": SCHEMA_VERSION}
    )
    with atomic_path(path) as partial:
        pq.write_table(table, partial)


def _ceiling(ceiling: NoiseCeiling | None) -> dict[str, float | None]:
    if ceiling is None:
        return {"noise_ceiling": None, "seed_correlation": None}
    columns = _columns("noise_ceiling", ceiling.estimate)
    return {**columns, "seed_correlation": ceiling.seed_correlation}


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}
