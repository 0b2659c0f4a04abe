"""Rows of the search benchmark: what was measured, under what it was measured, and how it is shown."""

from typing import Any, NamedTuple

from tools.logs import table

from .timing import Timing


class Row(NamedTuple):
    """One measured configuration; seconds are of one call on a whole batch."""

    section: str
    system: str
    precision: str
    pool: int | None
    batch: int
    beams: int | None
    seconds: float
    least: float
    most: float
    repeats: int
    queries_per_second: float
    peak_mebibytes: float | None


class Setting(NamedTuple):
    """What the calls of one comparison share."""

    section: str
    pool: int
    beams: int
    token_ids: list[list[int]]

    def row(self, name: str, precision: str, timing: Timing) -> Row:
        size = len(self.token_ids)
        peak = None if timing.peak_mebibytes is None else round(timing.peak_mebibytes, 1)
        return Row(
            self.section,
            name,
            precision,
            self.pool,
            size,
            self.beams,
            timing.median,
            timing.least,
            timing.most,
            timing.repeats,
            round(size / timing.median, 2),
            peak,
        )


def cells(row: Row) -> dict[str, Any]:
    """A row as a table for people has it."""
    per_query = row.seconds / row.batch * 1e3
    return {
        "system": row.system,
        "precision": row.precision,
        "pool": "-" if row.pool is None else f"{row.pool:,}",
        "batch": row.batch,
        "beams": row.beams,
        "ms/query": round(per_query, 3 if per_query < 1 else 1),
        "queries/s": row.queries_per_second,
        "spread": f"{row.least / row.seconds:.2f}-{row.most / row.seconds:.2f}",
        "peak MiB": row.peak_mebibytes,
    }


def say(section: str, rows: list[Row]) -> None:
    """Print one comparison."""
    print(f"\n{section}\n" + table([cells(row) for row in rows]), flush=True)
