"""One report in two forms: what both say, what each makes harmless, and how wide a terminal's text gets."""

from __future__ import annotations

import json
import math

import pytest

from shapecheck.report.document import LINE, Document, Facts, Heading, Lines, Paragraph, Points, Table
from shapecheck.report.numbers import dump_json, format_count

HOSTILE = "a\x1b[31m<b>|c\nd\u202e"
HUMAN = "a\\x1b[31m<b>|c d\\u202e"
MARKDOWN = "a\\x1b[31m\\<b>\\|c d\\u202e"


@pytest.mark.parametrize(
    "part",
    [Heading(HOSTILE), Paragraph(HOSTILE), Points([HOSTILE]), Facts([("name", HOSTILE)]), Table(("x",), [(HOSTILE,)])],
)
def test_text_from_outside_is_harmless_in_every_part(part):
    assert HUMAN in part.render("human")
    assert MARKDOWN in part.render("markdown")


def test_title_and_verdict_are_harmless_too():
    document = Document(HOSTILE, [], [HOSTILE])
    assert document.render("human") == f"{HUMAN}\n\n{HUMAN}\n\n{HUMAN}\n"
    assert document.render("markdown") == f"# {MARKDOWN}\n\n**{MARKDOWN}**\n"


def test_a_command_keeps_its_letters_in_both_forms():
    assert Lines(["cat <a | b"], "    ").render("markdown") == Lines(["cat <a | b"], "    ").render("human") == "    cat <a | b"
    assert Lines(["<a"]).render("markdown") == "\\<a"


def test_parts_that_say_nothing_leave_no_gap():
    parts = [Facts([("empty", "")]), Points([]), Paragraph(""), Heading("one"), Table(("x",), [])]
    assert Document("", parts).render("human") == "one\n\nnone\n"


def test_a_verdict_of_several_lines():
    document = Document("title", [Paragraph("text")], ["FINE: a", "SIZE: b"])
    assert document.render("human") == "title\n\nFINE: a\nSIZE: b\n\ntext\n\nFINE: a\nSIZE: b\n"
    assert document.render("markdown") == "# title\n\n**FINE: a**\n\n**SIZE: b**\n\ntext\n"


def test_a_fact_without_a_name_goes_on_with_the_one_before():
    facts = Facts([("sizes", "one"), ("", "two"), ("seed", "0")])
    assert facts.render("human").splitlines() == ["sizes  one", "       two", "seed   0"]
    assert facts.render("markdown") == "- sizes: one; two\n- seed: 0"


def test_long_lines_are_wrapped_under_their_text_and_paths_are_not_broken():
    words, path = "word " * 40, "/a-long-path" * 12
    for part in (Points([words], "note: "), Paragraph(words, indent="      "), Heading(words, indent="      ")):
        first, *others = part.render("human").splitlines()
        assert len(first) <= LINE and others and all(line.startswith("      word") for line in others)
        assert len(part.render("markdown").splitlines()) == 1
    assert path in Points([path]).render("human")
    assert Paragraph(words).render("human") == words


def test_columns_that_are_empty_or_spared_are_left_out():
    table = Table(("#", "a", "b", "c"), [(0, "x", "", "usual"), (1, "y", "", "usual")], spared=("c",))
    assert table.render("human").splitlines() == ["#  a", "-  -", "0  x", "1  y"]
    assert table.render("markdown").split("\n")[0].split() == ["|", "#", "|", "a", "|", "c", "|"]


def test_a_table_that_fits_is_no_wider_than_a_line():
    rows = [("a" * 20, "word " * 40), ("b", "short")]
    assert max(map(len, Table(("x", "y"), rows, fits=True).render("human").splitlines())) <= LINE
    assert max(map(len, Table(("x", "y"), rows).render("human").splitlines())) > LINE


def test_json_is_strict_and_can_be_stored():
    text = dump_json({"numbers": (math.nan, math.inf, -math.inf, 0.5), "name": "×\udcff"})
    text.encode("utf-8")
    assert json.loads(text) == {"numbers": ["NaN", "Infinity", "-Infinity", 0.5], "name": "×\udcff"}
    assert dump_json("×", ascii_only=True) == '"\\u00d7"\n'


def test_one_and_several():
    assert [format_count(count, "slot") for count in (0, 1, 2)] == ["0 slots", "1 slot", "2 slots"]
