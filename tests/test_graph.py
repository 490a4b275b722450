"""Hyperlinks of documents: what a reader finds, what its caller believes, and which documents they lead to."""

import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus import parsing
from nexus.errors import Unprocessable
from nexus.hades import document_id_of, linked
from nexus.parsing import Limits, Parsers
from tests.conftest import House


@pytest.fixture(scope="module")
def parsers() -> Iterator[Parsers]:
    with Parsers(Limits()) as parsers:
        yield parsers


# Links in a document


@pytest.mark.parametrize(
    ("name", "text", "links"),
    [
        ("a.md", "[one](b.md) and [two](../c.md#part) and [one again](b.md?x=1)", ["b.md", "../c.md"]),
        ("a.md", "[web](https://example.com/d.html?q=1#x), <http://e.example>, ![image](p.png)",
         ["https://example.com/d.html", "http://e.example"]),
        ("a.md", "[m](mailto:a@b.c) [j](javascript:x) [d](data:text/plain,x) [f](ftp://h/x) [h](#here) [q](?q)", []),
        ("a.md", "| a | b |\n|---|---|\n| [x](in-table.md) | 1 |\n\n[ref][r]\n\n[r]: by-reference.md",
         ["in-table.md", "by-reference.md"]),
        ("a.html", '<nav><a href="menu.html">m</a></nav><p><a href="b.html#x">b</a> <a name="n">n</a>', ["b.html"]),
        ("a.html", '<pre><a href="in-pre.html">x</a></pre><a href=" JavaScript:x">j</a><a href="//h/p">p</a>',
         ["in-pre.html"]),
        ("a.html", '<p><a href="http://[x">bad</a> <a href="\n ok.html \n">fine</a>', ["ok.html"]),
        ("a.rst", "`x <b.html>`_ and `w <https://e.org/y?z#t>`__ and other_\n\n.. _other: c.html\n.. _unused: d.html\n",
         ["b.html", "https://e.org/y", "c.html", "d.html"]),
        ("a.rst", "Title\n=====\n\n:doc:`Say <../B/c>`, :doc:`/Top/d`, :doc:`!not` :ref:`x <y>`, a@b.org, Title_\n",
         ["../B/c.rst", "/Top/d.rst"]),
        ("a.rest", ".. note:: see :doc:`b`\n\n.. list-table::\n\n   * - :doc:`c`\n     - 1\n", ["b.rest", "c.rest"]),
        ("a.txt", "see b.md and https://example.com", []),
    ],
)  # fmt: skip
def test_links_of_a_document(parsers: Parsers, name: str, text: str, links: list[str]) -> None:
    assert list(parsers.parse(name, text.encode()).links) == links


def test_links_are_bounded(parsers: Parsers) -> None:
    text = "\n".join([f"[long]({'x' * 1025})", f"[fits]({'y' * 1024})", *(f"[n]({n}.md)" for n in range(1100))])
    links = parsers.parse("a.md", text.encode()).links
    assert len(links) == 1000 and links[:2] == ("y" * 1024, "0.md")


@given(st.text() | st.text("ahtps:/?#[]@. \t\n%;", max_size=12))
def test_any_reference_is_kept_as_it_is_believed_or_not_at_all(reference: str) -> None:
    draft = parsing._Draft("a.md", Limits())
    draft.link(reference)
    answer = {"title": "", "metadata": {}, "blocks": [], "links": list(draft.links)}
    assert parsing._parsed(json.dumps(answer).encode(), "text/plain").links == tuple(draft.links)


@pytest.mark.parametrize(
    "links",
    [
        None, "a.md", {"a.md": 1}, [1], [None], [["a.md"]], [""], ["a.md", "a.md"], ["a.md#x"], ["a.md?x"],
        ["mailto:a@b.c"], ["javascript:x"], ["file:///etc/passwd"], ["//host/p"], ["a\nb.md"], [" a.md"],
        ["\ud800"], ["http://[x"], ["x" * 1025], [f"{n}.md" for n in range(1001)],
    ],
)  # fmt: skip
def test_a_worker_that_says_nonsense_about_links_is_not_believed(links: object) -> None:
    answer = {"title": "", "metadata": {}, "blocks": [["text", "x", 0, None, None, None, False]]}
    assert parsing._parsed(json.dumps(answer | {"links": ["a.md"]}).encode(), "text/plain").links == ("a.md",)
    for hostile in (answer | {"links": links}, answer):
        with pytest.raises(Unprocessable, match="nonsense"):
            parsing._parsed(json.dumps(hostile).encode(), "text/plain")


@pytest.mark.parametrize(
    ("source", "link", "target"),
    [
        ("manuals/a.md", "b.md", "manuals/b.md"),
        ("manuals/a.md", "./x/../b.md", "manuals/b.md"),
        ("manuals/a.md", "../b.md", "b.md"),
        ("manuals/a.md", "/top/b.md", "top/b.md"),
        ("manuals/a.md", "my%20file.md", "manuals/my file.md"),
        ("manuals/a.md", "https://example.com/b", "https://example.com/b"),
        ("/srv/manuals/a.md", "../b.md", "/srv/b.md"),
        ("/srv/manuals/a.md", "/b.md", "/b.md"),
        ("a.md", "b.md", "b.md"),
        ("https://example.com/x/a.html", "../b.html", "https://example.com/b.html"),
        ("https://example.com/x/a.html", "/b%20c.html", "https://example.com/b%20c.html"),
        ("https://example.com/x/a.html", "http://other.example/", "http://other.example/"),
    ],
)
def test_a_link_leads_to_the_document_of_that_source(house: House, source: str, link: str, target: str) -> None:
    assert linked(house.describe(source, ["x"]), [link]) == (document_id_of("acme", "default", target),)


def test_a_link_stays_in_its_tenant_and_collection_and_never_leads_to_itself(house: House) -> None:
    document = house.describe("x/a.md", ["x"], collection="other")
    expected = document_id_of("acme", "other", "x/b.md")
    assert linked(document, ["b.md", "a.md", "../x/b.md", "../x/a.md"]) == (expected,)
