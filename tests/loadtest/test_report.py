"""The HTML template of reports."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from ladderstitch_loadtest.load.report import ReportTable, write_page


def test_write_page_escapes_titles_names_and_cells(tmp_path: Path) -> None:
    evil = "<b>'&\""
    plots = {evil: Figure(figsize=(1, 1))}
    table = ReportTable([evil, "head"], [[evil, "cell"]])
    write_page(tmp_path / "page.html", evil, None, {evil: evil}, table, plots)
    page = (tmp_path / "page.html").read_text()
    assert evil not in page
    assert page.count("&lt;b&gt;&#39;&amp;&#34;") == 7  # title twice, overview, table, plot
    assert page.count("<td>cell</td>") == 1
    assert page.count('src="data:image/png;base64,') == 1
    assert 'class="bad"' not in page


def test_write_page_with_late_generator_says_so(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "run", 0.0125, {}, ReportTable([], []), {})
    assert "late by 12.50 ms" in (tmp_path / "page.html").read_text()
