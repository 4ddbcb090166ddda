"""Groups, the terminal text and the page."""

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from qjax.report import Report, SiteRow
from qjax.report.card import render_card
from qjax.report.groups import fold_notes, group_rows, ranges
from qjax.report.scores import score_lines, score_value
from qjax.report.text import size


def _row(name, **more):
    facts = {"op": "dot", "leaf": name, "shape": (4, 4), "format": "int8", "bytes_before": 64, "bytes_after": 20}
    return SiteRow(name=name, **{**facts, **more})


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers, text",
    [([0], "0"), ([0, 1], "0,1"), ([0, 1, 2], "0..2"), ([1, 3, 4, 5, 9], "1,3..5,9"), (range(0, 20, 2), "0,2,4,…,18")],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text


def test_equal_layers_are_one_group_in_program_order():
    rows = [_row(f"layers/{i}/{part}/kernel") for i in range(32) for part in ("up", "down")]
    groups = group_rows(rows)
    assert [(g.name, g.count) for g in groups] == [("layers/{0..31}/up/kernel", 32), ("layers/{0..31}/down/kernel", 32)]
    assert groups[0].bytes_after == 32 * 20 and groups[0].bits == 10.0


def test_notes_that_differ_in_numbers_are_one():
    notes = [f"S: layers/{n}/up: factors {0.5 + n / 10:g} to {2 + n} put into fc1" for n in range(4)]
    assert fold_notes(["one 1", *notes, "two"]) == (
        "one 1",
        "S: layers/{0..3}/up: factors 0.5–0.8 to {2..5} put into fc1 (×4)",
        "two",
    )


def test_a_group_never_claims_sites_it_does_not_hold():
    # layers/1/experts/2 is missing: one product of ranges would claim it.
    rows = [_row(f"layers/{i}/experts/{e}/up") for i in range(3) for e in range(4) if (i, e) != (1, 2)]
    groups = group_rows(rows)
    assert sum(g.count for g in groups) == 11
    assert "layers/1/experts/{0,1,3}/up" in [g.name for g in groups]
    full = group_rows([_row(f"layers/{i}/experts/{e}/up") for i in range(3) for e in range(4)])
    assert [g.name for g in full] == ["layers/{0..2}/experts/{0..3}/up"]


def test_what_differs_stays_apart():
    rows = [_row("l/0/w"), _row("l/1/w", format="int4"), _row("l/2/w", reason="skipped"), _row("l/3/w", note="slow")]
    assert [g.count for g in group_rows(rows)] == [1, 1, 1, 1]


def test_a_reason_that_names_its_own_site_does_not_keep_layers_apart():
    rows = [_row(f"l/{i}/w", reason=f"l/{i}/w is read by an opaque call") for i in range(4)]
    assert [g.name for g in group_rows(rows)] == ["l/{0..3}/w"]


def test_names_without_numbers_and_repeated_names():
    assert [g.name for g in group_rows([_row("head/kernel"), _row("stem/kernel")])] == ["head/kernel", "stem/kernel"]
    assert [g.count for g in group_rows([_row("w"), _row("w")])] == [2]
    assert group_rows([]) == ()


def test_scattered_formats_become_one_line_with_counts():
    rows = [_row(f"l/{i}/w", format="int4" if i % 3 else "int8") for i in range(60)]
    (group,) = group_rows(rows)
    assert group.name == "l/{0..59}/w" and group.formats == (("int4", 40), ("int8", 20))


def test_nan_in_a_group_is_not_hidden():
    (group,) = group_rows([_row("l/0/w", sqnr_db=20.0), _row("l/1/w", sqnr_db=float("nan"))])
    assert str(group.sqnr) == "(nan, nan)"


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_text_keeps_the_width(any_report, width):
    text = any_report.text(width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text and text.endswith("\n") and not re.search(r"[ \t]\n", text)


def test_text_says_what_matters(small_report):
    text = small_report.text(120)
    for part in (
        "stories260k · W4A16",
        "496 kB → 185 kB",
        "layers/{0,1}/mlp/down/kernel",
        "×2",
        "int4 g128",
        "14 sites",
        "left by rule 1",
        "(12 sites)",
        "85.68 %",
        "84.12 %",
        "4.50",
    ):
        assert part in text, part


def test_text_of_500_sites_is_short(large_report):
    text = large_report.text(100)
    assert len(text.splitlines()) < 90
    assert "layers/{0..71}/attn/" in text and "search left the site in float" in text


def test_text_of_nothing():
    assert "No site was found" in Report("m", "W8A16").text()


def test_printing_by_rich_has_colour(small_report):
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system="standard")
    console.print(small_report)
    assert "\x1b[" in console.file.getvalue()


def test_markup_in_names_is_not_interpreted():
    report = Report("m", "r", (_row("a/[bold]/w", reason="[red]no[/red]"),), 0, 64, 20)
    text = report.text(120)
    assert "a/[bold]/w" in text and "[red]no[/red]" in text


@pytest.mark.parametrize(
    "n, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1_044_992, "1.04 MB"),
        (12_345, "12.3 kB"),
        (999_600, "1.00 MB"),
        (3.2e12, "3.20 TB"),
    ],
)
def test_size(n, text):
    assert size(n) == text


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("perplexity", 4.294, "4.2940"),
        ("agreement", 0.98765, "98.77 %"),
        ("tokens", 56046.0, "56,046"),
        ("kl", 0.000312, "0.000312"),
        ("recovery", 99.5, "99.50 %"),
        ("kl", float("nan"), "NaN"),
    ],
)
def test_score_value(name, value, text):
    assert score_value(name, value) == text


@pytest.mark.parametrize(
    "kl, stderr, text",
    [
        (0.0004878, 4.2e-6, "0.000488 ± 0.000004"),
        (0.1567, 0.00121, "0.157 ± 0.001"),
        (1.3e-9, 2e-11, "1.3e-09 ± 2e-11"),
    ],
)
def test_divergence_shows_the_digits_that_are_sure(kl, stderr, text):
    (line,) = score_lines({"kl": kl, "kl_stderr": stderr})
    assert line.after == text


def test_scores_in_lines():
    lines = score_lines(
        {"top1": 0.8, "correct": 4.0, "float_top1": 1.0, "float_correct": 5.0, "images": 5.0, "recovery": 80.0}
    )
    assert [(x.name, x.before, x.after, x.kept) for x in lines] == [
        ("top1", "100.00 % (5)", "80.00 % (4)", "80.00 %"),
        ("images", "", "5", ""),
    ]


# -- page --------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Collects tags and ids, and checks that the page's elements nest."""

    VOID = {"meta", "input", "br", "wbr", "link", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.rows = [], [], [], 0
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_page_is_whole_and_self_contained(any_report):
    html = any_report.html()
    page = _Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://|@import|\bsrc=|<link", html)
    tags = [t for t, _ in page.tags]
    assert tags.count("script") == 1 and tags.count("style") == 1 and "svg" in tags
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert references and set(references) <= set(page.ids)


def test_every_site_is_in_the_page_once(large_report):
    html = large_report.html()
    ids = re.findall(r'<tr class="(?:done|float)(?: weight)?" id="r(\d+)"', html)
    assert ids == [str(i) for i in range(len(large_report.rows))]


def test_page_escapes_what_it_is_given(awkward_report):
    html = awkward_report.html()
    assert "<script>alert" not in html and "alert(1)</script>" not in html.replace("/<wbr>", "/")
    assert "m &amp; &lt;n&gt;" in html


def test_points_carry_their_names(small_report):
    html = small_report.html()
    titles = re.findall(r"<title>(.*?)</title>", html, flags=re.S)[1:]
    assert len(titles) == 2 * len(small_report.quantized)  # two figures
    assert titles[0].startswith("layers/0/")


def test_equal_reports_give_equal_pages(small_report):
    assert small_report.html() == Report.from_dict(small_report.to_dict()).html()


def test_page_of_nothing():
    _Page(Report("m", "W8A16").html())


def test_sizes_are_compared_with_what_was_quantized_and_with_the_folder():
    report = Report(
        "m", "W8A16", (_row("w"),), 0, 64, 20, float_dtype="float32", source_bytes=32, source_dtype="bfloat16"
    )
    assert report == Report.from_dict(report.to_dict())
    for form in (report.text(), report.html()):
        assert "float32" in form and "smaller than in its folder, which holds 32 B (bfloat16)" in form
    assert "64 B (float32) → 20 B (3.20x smaller)" in report.text() and "1.60x" in report.text()
    same = Report("m", "W8A16", (_row("w"),), 0, 64, 20, float_dtype="float32", source_bytes=64, source_dtype="float32")
    assert "folder" not in same.text()
    large = Report(
        "m", "W8A16", (_row("w"),), 0, 64, 40, float_dtype="float32", source_bytes=32, source_dtype="bfloat16"
    )
    assert "1.25x as large as in its folder" in large.text() and "what stays float is kept as float32" in large.text()


def test_the_card_says_what_it_is_and_how_to_run_it(small_report):
    said = {"data": "/some/where/text.txt", "rows": [1, 2], "seed": 3}
    card = render_card(
        small_report,
        version="9.9",
        recipe='name = "x"',
        runs="run(it)",
        license="license: mit",
        original="R.md",
        calibration=said,
    )
    assert card.startswith("---\nlibrary_name: qjax\n") and "\nlicense: mit\n---\n" in card
    for part in (
        "qjax 9.9",
        "[R.md](R.md)",
        "run(it)",
        'name = "x"',
        "2 rows of text.txt, drawn by seed 3",
        "quantized, ",
    ):
        assert part in card
    long = render_card(small_report, version="9.9", recipe="a = 1\n" * 100, runs="run(it)")
    assert "toml" not in long and "The card of" not in long
