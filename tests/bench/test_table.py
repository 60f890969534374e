"""Result tables: what is shown of a value, what it is sorted by, and the same rows in each form."""

from __future__ import annotations

import csv
import io
import math

import pytest
from gramlite.bench.statistics import NOTHING, Estimate
from gramlite.bench.table import Column, Table, Value, megabytes, p_value, percent, points, whole

SHARE = Estimate(0.5, 0.25, 0.75, 8)


@pytest.mark.parametrize(
    ("column", "value", "text", "key"),
    [
        (Column("name"), "Q8_0", "Q8_0", "Q8_0"),
        (Column("name"), None, "–", ""),
        (Column("rate", percent, interval=True), SHARE, "50.0 [25.0, 75.0]", "0.5"),
        (Column("rate", percent), SHARE, "50.0", "0.5"),
        (Column("rate", percent, interval=True), NOTHING, "–", ""),
        (Column("rate", percent), NOTHING, "–", ""),
        (Column("change", points, interval=True), Estimate(-0.01, -0.02, 0.0, 9), "-1.0 [-2.0, +0.0]", "-0.01"),
        (Column("change", points), "base", "base", ""),
        (Column("size", megabytes), 1_234_567_890, "1,234.6", "1234567890"),
        (Column("rows", whole), 0, "0", "0"),
        (Column("figure", percent), math.nan, "–", ""),
        (Column("p", p_value), 0.00005, "< 0.0001", "5e-05"),
    ],
)
def test_what_is_shown_and_sorted_by(column: Column, value: Value, text: str, key: str) -> None:
    assert (column.text(value), column.key(value)) == (text, key)


def test_one_table_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[list[Value]] = [["=a|b", SHARE, 2], ["c", None, None]]
    table = Table("Of [rates]", [Column("name"), Column("rate", percent, interval=True), Column("rows", whole)], rows)
    assert table.texts()[0] == {"name": "=a|b", "rate": "50.0 [25.0, 75.0]", "rows": "2"}
    assert table.markdown() == [
        "| name | rate | rows |",
        "| --- | ---: | ---: |",
        r"| =a\|b | 50.0 [25.0, 75.0] | 2 |",
        "| c | – | – |",
    ]
    assert list(csv.reader(io.StringIO(table.csv()))) == [
        ["name", "rate", "rate_low", "rate_high", "rate_n", "rows"],
        ["'=a|b", "0.5", "0.25", "0.75", "8", "2"],
        ["c", "", "", "", "", ""],
    ]
    table.show()
    printed = capsys.readouterr().out
    assert "Of [rates]" in printed and "50.0 [25.0, 75.0]" in printed
    assert Table("Empty", [Column("name")], []).markdown() == []
