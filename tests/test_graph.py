"""The document graph: links as they are read, edges as they are kept and walked, and what a search makes of them."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deployments import cli
from nexus import parsing
from nexus.errors import Fenced, InvalidRequest, Unprocessable
from nexus.filters import parse_filter
from nexus.hades import document_id_of, linked
from nexus.kept import unpack
from nexus.parsing import Limits, Parsers
from nexus.ports import Staged
from nexus.retrieval import GRAPH_WEIGHT, RetrievalSettings
from nexus.stores import memory, sqlite
from nexus.types import Block, Document, Parsed, Principal, SearchRequest, SearchResult, Upload
from tests.conftest import ALICE, BOB, MALLORY, Door, House, build_house, build_steps
from tests.document_stores import MODULES, STORES, edges, place
from tests.document_stores import sources as sources_of

every_store = pytest.mark.parametrize("house", [kind for kind in STORES if kind != "disk"], indirect=True)


@pytest.fixture
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """Over SQLite in memory, where a test does not ask for every store."""
    with place(getattr(request, "param", "memory"), tmp_path) as store:
        documents = store()
        house = build_house(documents, memory.open("memory:"))
        yield house
        house.retriever.close()
        documents.close()


@pytest.fixture
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The store's own, for its bounds."""
    return MODULES[request.node.callspec.params["house"]]


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
        ("http://[no address/a.md", "b.md", "b.md"),
    ],
)
def test_a_link_leads_to_the_document_of_that_source(house: House, source: str, link: str, target: str) -> None:
    assert linked(house.describe(source, ["x"]), [link]) == (document_id_of("acme", "default", target),)


def test_a_link_stays_in_its_tenant_and_collection_and_never_leads_to_itself(house: House) -> None:
    document = house.describe("x/a.md", ["x"], collection="other")
    expected = document_id_of("acme", "other", "x/b.md")
    assert linked(document, ["b.md", "a.md", "../x/b.md", "../x/a.md"]) == (expected,)


# Documents that a test connects


def describe(house: House, source: str, *links: str, **fields: object) -> Document:
    document = house.describe(source, [f"gripper {source}"], **fields)
    return replace(document, links=linked(document, links))


def put(house: House, source: str, *links: str, **fields: object) -> Document:
    """A published document of one chunk that refers to these others."""
    document = describe(house, source, *links, **fields)
    (published,) = house.hades.publish([(document, house.stage(document, [f"gripper {source}"]))])
    return published


def reach(
    house: House, *sources: str, hops: int = 3, who: Principal = ALICE, as_of: int | None = None, limit: int = 200
) -> dict[str, tuple[int, str]]:
    """What is connected to these documents, by source."""
    documents = house.hades.documents
    sequence = documents.collection("default", who.tenant).sequence if as_of is None else as_of
    seeds = [document_id_of(who.tenant, "default", source) for source in sources]
    found = documents.connected("default", who, seeds, hops, sequence, limit)
    names = sources_of(documents)
    return {names[document_id]: how for document_id, how in found.items()}


# The walk


@every_store
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_a_walk_goes_as_far_as_it_is_told(house: House, hops: int) -> None:
    for source, link in ("ab", "bc", "cd", "de"):
        put(house, source, link)
    put(house, "e")
    expected = {"b": (1, "link"), "c": (2, "link"), "d": (3, "link")}
    assert reach(house, "a", hops=hops) == {name: how for name, how in expected.items() if how[0] <= hops}


@every_store
def test_a_link_is_walked_in_both_directions(house: House) -> None:
    put(house, "a", "b")
    put(house, "b")
    put(house, "c", "b")
    assert reach(house, "b", hops=1) == {"a": (1, "link"), "c": (1, "link")}
    assert reach(house, "a", hops=2) == {"b": (1, "link"), "c": (2, "link")}


@every_store
def test_a_cycle_ends_and_its_seeds_are_left_out(house: House) -> None:
    for source, link in ("ab", "bc", "ca"):
        put(house, source, link)
    assert reach(house, "a") == {"b": (1, "link"), "c": (1, "link")}
    assert reach(house, "a", "b") == {"c": (1, "link")}


@every_store
def test_the_fewest_hops_count_and_a_link_before_a_shared_value(house: House) -> None:
    put(house, "a", "b", "c", metadata={"robot_id": "HX-3"})
    put(house, "b", "c")
    put(house, "c", metadata={"robot_id": "HX-3"})
    put(house, "d", metadata={"robot_id": "HX-3"})
    assert list(reach(house, "a", hops=3).items())[-1] == ("d", (1, "shared"))
    assert reach(house, "a", hops=3) == {"b": (1, "link"), "c": (1, "link"), "d": (1, "shared")}


@every_store
@pytest.mark.parametrize(("links", "hops"), [("ab", 1), ("a", 2), ("b", 1), ("b", 3)])
def test_of_several_ways_of_one_length_a_link_counts(house: House, links: str, hops: int) -> None:
    put(house, "a", "b", metadata={"robot_id": "HX-3"})
    put(house, "b", metadata={"robot_id": "HX-3"})
    put(house, "c", *links, metadata={"robot_id": "HX-3"})
    assert reach(house, "a", "b", hops=hops) == {"c": (1, "link")}


@every_store
def test_the_nearest_are_kept_where_not_all_may_be(house: House) -> None:
    put(house, "a", "b")
    put(house, "b", *"cdefgh")
    for source in "cdefgh":
        put(house, source)
    found = reach(house, "a", hops=2, limit=3)
    assert len(found) == 3 and found["b"] == (1, "link")


@every_store
@pytest.mark.parametrize(
    ("ours", "theirs", "connected"),
    [
        ("HX-3", "HX-3", True), ("HX-3", "HX-4", False), (7, 7, True), (True, True, False), (["x"], ["x"], False),
        (1.5, 1.5, False), (None, None, False), ("", "", False), ("x" * 1025, "x" * 1025, False),
        ("\ud800", "\ud800", False), ("a\0b", "a\0b", False),
    ],
)  # fmt: skip
def test_an_equal_value_of_metadata_connects(house: House, ours: object, theirs: object, connected: bool) -> None:
    put(house, "a", metadata={"robot_id": ours, "year": 2025})
    put(house, "b", metadata={"robot_id": theirs, "year": 2025})
    assert reach(house, "a") == ({"b": (1, "shared")} if connected else {})


def test_which_fields_connect_is_a_setting(tmp_path: Path) -> None:
    documents = sqlite.open("sqlite:", home=tmp_path, shared_metadata=("site", "year", "site"))
    house = build_house(documents, memory.open("memory:"))
    put(house, "a", metadata={"site": "north", "year": 2025, "robot_id": "HX-3"})
    put(house, "b", metadata={"site": "north", "robot_id": "HX-4"})
    put(house, "c", metadata={"year": 2025})
    put(house, "d", metadata={"robot_id": "HX-3"})
    assert reach(house, "a") == {"b": (1, "shared"), "c": (1, "shared")}
    house.retriever.close()
    documents.close()


@every_store
def test_a_hub_is_not_followed_to_all_it_connects(
    house: House, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAN_OUT", 3)
    for n in range(20):
        put(house, f"{n}", "hub", metadata={"robot_id": "HX-3"})
    put(house, "hub", *map(str, range(20)))
    assert len(reach(house, "hub", hops=1)) <= 2 * 3  # what it refers to, and what refers to it
    put(house, "x", metadata={"robot_id": "HX-3"})
    assert len(reach(house, "x", hops=1)) == 3
    monkeypatch.setattr(module, "LOOKED_AT", 2)
    assert len(reach(house, "x", hops=1)) <= 2


@every_store
def test_neither_other_tenants_nor_a_document_itself_take_its_neighbours_places(
    house: House, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(20):
        put(house, f"{n}", who=MALLORY, metadata={"robot_id": "HX-3"})
        put(house, f"{n}", collection="other", metadata={"robot_id": "HX-3"})
    put(house, "a", metadata={"robot_id": "HX-3"})
    put(house, "b", metadata={"robot_id": "HX-3"})
    monkeypatch.setattr(module, "LOOKED_AT", 2)
    monkeypatch.setattr(module, "FAN_OUT", 1)
    assert (reach(house, "a"), reach(house, "b")) == ({"b": (1, "shared")}, {"a": (1, "shared")})


@every_store
def test_links_that_lead_nowhere_take_no_places(
    house: House, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FAN_OUT", 1)
    put(house, "a", *(f"nowhere {n}" for n in range(9)), "b")
    put(house, "b")
    assert reach(house, "a") == {"b": (1, "link")}


@pytest.mark.timeout(60)
def test_a_hub_of_thousands_is_walked_in_a_moment(house: House) -> None:
    document = put(house, "a", metadata={"robot_id": "HX-3"})
    with house.hades.documents._transaction() as db:
        for table in ("versions", "spans", "edges"):
            columns = [name for _, name, *_ in db.execute(f"PRAGMA table_info({table})") if name != "document_id"]
            many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 5000)"
            db.execute(
                f"{many} INSERT INTO {table} (document_id, {', '.join(columns)})"
                f" SELECT printf('%032x', n), {', '.join(columns)} FROM n JOIN {table} WHERE document_id = ?",
                (document.document_id,),
            )
    assert len(reach(house, "a", hops=3)) <= 2 * sqlite.FAN_OUT


# What may not be seen is neither found nor walked through


@every_store
def test_a_document_that_is_not_there_is_not_found_until_it_comes(house: House) -> None:
    put(house, "a", "b")
    assert reach(house, "a") == {}
    put(house, "b")
    assert reach(house, "a") == {"b": (1, "link")}


@every_store
def test_a_deleted_document_is_neither_found_nor_walked_through_but_in_the_past(house: House) -> None:
    put(house, "a", "b")
    between = put(house, "b", "c")
    put(house, "c")
    house.hades.delete([between.document_id], ALICE)
    assert reach(house, "a") == {}
    assert reach(house, "a", as_of=3) == {"b": (1, "link"), "c": (2, "link")}


@every_store
def test_before_its_publication_a_document_is_neither_found_nor_walked_through(house: House) -> None:
    put(house, "a", "b", metadata={"robot_id": "HX-3"})
    put(house, "c", metadata={"robot_id": "KM-6"})
    put(house, "b", "c", metadata={"robot_id": "HX-3"})
    assert reach(house, "a", as_of=2) == {}
    assert reach(house, "a", as_of=3) == {"b": (1, "link"), "c": (2, "link")}
    assert reach(house, "b", as_of=2) == {}  # nor does a walk begin at one


@every_store
def test_a_staged_version_is_neither_found_nor_walked_through(house: House) -> None:
    put(house, "a", "b")
    put(house, "c")
    staged = describe(house, "b", "c")
    house.stage(staged, ["gripper b"])
    assert reach(house, "a") == {}
    assert ("link", document_id_of("acme", "default", "c")) in edges(house.hades.documents)


@every_store
def test_what_another_may_read_is_neither_found_nor_walked_through(house: House) -> None:
    put(house, "a", "b", metadata={"robot_id": "HX-3"})
    put(house, "b", "c", readers=frozenset({"alice"}), metadata={"robot_id": "HX-3"})
    put(house, "c")
    assert reach(house, "a") == {"b": (1, "link"), "c": (2, "link")}
    assert reach(house, "a", who=BOB) == {}
    assert reach(house, "c", who=BOB) == {}
    assert reach(house, "b", who=BOB) == {}


@every_store
def test_another_tenants_documents_are_never_met(house: House) -> None:
    ours = put(house, "a", metadata={"robot_id": "HX-3"})
    theirs = put(house, "x", who=MALLORY, metadata={"robot_id": "HX-3"})
    spy = replace(describe(house, "spy", who=MALLORY), links=(ours.document_id,))
    house.hades.publish([(spy, house.stage(spy, ["gripper spy"]))])
    assert reach(house, "a") == {}
    assert reach(house, "x", "spy", who=MALLORY) == {}
    documents = house.hades.documents
    assert documents.connected("default", ALICE, [theirs.document_id, spy.document_id], 3, 3, 200) == {}


@every_store
def test_another_collections_documents_are_never_met(house: House) -> None:
    put(house, "a", metadata={"robot_id": "HX-3"})
    put(house, "b", metadata={"robot_id": "HX-3"}, collection="other")
    assert reach(house, "a", as_of=1) == {}


@every_store
def test_vectors_are_those_of_visible_versions_and_each_document_gets_its_share(house: House) -> None:
    long = house.put("long", *(f"gripper {n}" for n in range(9)))
    note = house.put("note", "gripper note")
    house.put("note", "gripper note of today")
    secret = house.put("secret", "gripper", readers=frozenset({"alice"}))
    ids = [long.document_id, note.document_id, secret.document_id]
    found = house.hades.documents.vectors_of("default", BOB, ids, 2, 9)
    assert [document_id for document_id, _ in found.values()] == [long.document_id] * 3 + [note.document_id]
    (note_chunk,) = [i for i, (document_id, _) in found.items() if document_id == note.document_id]
    assert house.hades.documents.chunk_ids_of(note.document_id, note.version) == [note_chunk]
    assert found[note_chunk][1] == pytest.approx(house.embedder.embed(["gripper note"])[0])
    assert len(house.hades.documents.vectors_of("default", ALICE, ids, 4, 2)) == 2


# Edges belong to a version


@every_store
def test_staging_again_replaces_the_edges(house: House) -> None:
    document = describe(house, "a", "b", "c", metadata={"robot_id": "HX-3"})
    house.stage(document, ["gripper a"])
    again = replace(document, links=linked(document, ["c", "d"]), metadata={"robot_id": "HX-4"})
    house.stage(again, ["gripper a"])
    targets = {("link", document_id_of("acme", "default", source)) for source in "cd"}
    assert edges(house.hades.documents) == targets | {("shared", "robot_id=HX-4")}


@every_store
def test_a_new_version_has_its_own_edges_and_the_old_one_keeps_its(house: House) -> None:
    for source in "bc":
        put(house, source)
    for text, link in (("one", "b"), ("two", "c")):
        document = house.describe("a", [text])
        document = replace(document, links=linked(document, [link]))
        house.hades.publish([(document, house.stage(document, [text]))])
    assert (reach(house, "a", as_of=3), reach(house, "a")) == ({"b": (1, "link")}, {"c": (1, "link")})


@every_store
def test_new_metadata_of_the_same_content_move_the_shared_edges_alone(house: House) -> None:
    put(house, "a", "b", metadata={"robot_id": "HX-3"})
    put(house, "b")
    put(house, "c", metadata={"robot_id": "HX-4"})
    house.hades.is_unchanged(house.describe("a", ["gripper a"], metadata={"robot_id": "HX-4"}), ALICE)
    assert reach(house, "a") == {"b": (1, "link"), "c": (1, "shared")}
    staged = describe(house, "d", metadata={"robot_id": "HX-3"})
    epoch = house.stage(staged, ["gripper d"])
    house.hades.publish([(replace(staged, metadata={"robot_id": "HX-4"}), epoch)])
    assert reach(house, "c", hops=1) == {"a": (1, "shared"), "d": (1, "shared")}


@every_store
def test_a_fenced_maker_changes_no_edges(house: House) -> None:
    document = describe(house, "a", "b", metadata={"robot_id": "HX-3"})
    epoch = house.stage(document, ["gripper a"])
    before = edges(house.hades.documents)
    house.hades.begin(document)
    late = replace(document, links=(), metadata={})
    for move in (
        lambda: house.hades.documents.stage([Staged(late, epoch, [], [], house.embedder.embed([]))]),
        lambda: house.hades.publish([(late, epoch)]),
    ):
        with pytest.raises(Fenced):
            move()
    assert edges(house.hades.documents) == before


@every_store
def test_what_is_vacuumed_takes_its_edges_along(house: House) -> None:
    document = put(house, "a", "b", metadata={"robot_id": "HX-3"})
    house.hades.delete([document.document_id], ALICE)
    assert edges(house.hades.documents)
    house.hades.vacuum(keep_closed_seconds=-1, keep_staged_seconds=-1)
    assert edges(house.hades.documents) == set()


def test_a_store_of_before_the_graph_gets_its_edges_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "MIGRATIONS", sqlite.MIGRATIONS[:1])
    sqlite.open("sqlite:", home=tmp_path).close()
    monkeypatch.undo()
    store = sqlite.open("sqlite:", home=tmp_path)
    assert store.connected("default", ALICE, ["x"], 1, 0, 10) == {}
    store.close()


def test_ingestion_connects_what_it_reads(house: House) -> None:
    steps = build_steps(house)
    for source, text in (("m/a.md", "see [b](b.rst)"), ("m/b.rst", "gripper :doc:`/m/c`"), ("m/c.rst", "the end")):
        receipt = steps.ingest(Upload(source, text.encode()), ALICE)
    assert reach(house, "m/a.md") == {"m/b.rst": (1, "link"), "m/c.rst": (2, "link")}
    assert unpack(house.hades.documents.kept(receipt.document_id, receipt.version) or b"") == Parsed(
        "c", "", (Block("text", "the end", first_line=1, last_line=1),)
    )


# What a search makes of it

WORDS = {"embedding_weight": 0.0, "text_weight": 1.0}  # names only chunks that share a word with the query


def put_text(house: House, source: str, text: str, *links: str, **fields: object) -> Document:
    document = house.describe(source, [text], **fields)
    document = replace(document, links=linked(document, links))
    (published,) = house.hades.publish([(document, house.stage(document, [text]))])
    return published


def search(house: House, query: str, who: Principal = ALICE, **fields: object) -> SearchResult:
    return house.retriever.search(SearchRequest(query, explain=True, **fields), who)


def sources(result: SearchResult) -> list[str]:
    return [hit.source for hit in result.hits]


def test_a_connected_document_is_found_though_no_route_names_it(house: House) -> None:
    put_text(house, "a", "the gripper closes", "b")
    put_text(house, "b", "tighten every bolt")
    put_text(house, "c", "unconnected prose")
    result = search(house, "gripper", **WORDS)
    assert sources(result) == ["a", "b"]
    assert set(result.hits[1].routes) == {"graph"} and result.hits[1].routes["graph"].rank == 1
    assert (result.hits[1].cosine, result.hits[1].score) == (0.0, pytest.approx(GRAPH_WEIGHT * 0.5))
    assert sources(search(house, "gripper", graph="off", **WORDS)) == ["a"]
    assert "graph" in result.seconds


def test_a_connected_chunk_has_its_exact_cosine_and_a_part_of_the_best_score(house: House) -> None:
    put_text(house, "a", "gripper torque value", "b")
    put_text(house, "b", "tighten every bolt", "c")
    put_text(house, "c", "and the lamp")
    house.retriever.settings = RetrievalSettings(candidates=1)
    result = search(house, "gripper torque value", k=1, graph="on", hops=2)
    best, *others = result.explain["candidates"]
    query, near, far = house.embedder.embed(["gripper torque value", "tighten every bolt", "and the lamp"])
    assert set(best["routes"]) == {"dense", "text"} and best["score"] == result.hits[0].score
    for other, vector, decay in zip(
        sorted(others, key=lambda c: c["routes"]["graph"]["rank"]), (near, far), (0.5, 0.25), strict=True
    ):
        cosine = float(query @ vector)
        assert (other["cosine"], set(other["routes"])) == (pytest.approx(cosine, abs=1e-5), {"graph"})
        assert other["routes"]["graph"]["score"] == pytest.approx(best["score"] * decay)
        assert other["score"] == pytest.approx(0.7 * cosine + GRAPH_WEIGHT * best["score"] * decay, abs=1e-5)


@pytest.mark.parametrize("fusion", ["max", "rrf"])
def test_a_chunk_that_a_route_named_gains_by_being_connected(
    house: House, monkeypatch: pytest.MonkeyPatch, fusion: str
) -> None:
    monkeypatch.setattr("nexus.retrieval.GRAPH_SEEDS", 1)
    put_text(house, "a", "gripper torque value", "b")
    put_text(house, "b", "gripper and lamp")
    put_text(house, "c", "gripper and wheel")
    before, after = (
        {hit.source: hit for hit in search(house, "gripper torque value", graph=graph, fusion=fusion).hits}
        for graph in ("off", "on")
    )
    assert after["b"].score - before["b"].score == pytest.approx(GRAPH_WEIGHT * 0.5 * before["a"].score)
    assert after["b"].routes == {**before["b"].routes, "graph": after["b"].routes["graph"]}
    assert (after["a"], after["c"]) == (before["a"], before["c"])


def test_reciprocal_ranks_take_what_only_the_graph_named_by_its_cosine(house: House) -> None:
    house.retriever.settings = RetrievalSettings(candidates=1)
    put_text(house, "a", "gripper torque value", *"bcdefg")
    for source in "bcdefg":
        put_text(house, source, f"tighten bolt {source}")
    best, *others = search(house, "gripper torque value", k=1, graph="on", fusion="rrf").explain["candidates"]
    assert [c["score"] for c in others] == pytest.approx([GRAPH_WEIGHT * 0.5 * best["score"]] * 6)
    cosines = [c["cosine"] for c in others]
    assert len(set(cosines)) > 1 and cosines == sorted(cosines, reverse=True)
    assert [c["routes"]["graph"]["rank"] for c in others] == [1, 2, 3, 4, 5, 6]


def test_all_chunks_of_a_connected_document_are_asked(house: House) -> None:
    document = house.describe("a", ["gripper"])
    document = replace(document, links=linked(document, ["b"]))
    house.hades.publish([(document, house.stage(document, ["gripper"]))])
    house.put("b", "one lamp", "two wheels", "three bolts")
    texts = [hit.text for hit in search(house, "gripper", graph="on", **WORDS).hits]
    assert texts[0] == "gripper" and sorted(texts[1:]) == ["one lamp", "three bolts", "two wheels"]


def test_without_edges_everything_is_as_it_was(house: House) -> None:
    for n in range(5):
        put(house, f"{n}")
    off, on, auto = (search(house, "gripper", graph=graph) for graph in ("off", "on", "auto"))
    assert on.hits == off.hits == auto.hits
    assert on.explain["candidates"] == off.explain["candidates"]
    assert on.explain["graph"]["expanded"] and on.explain["graph"]["reached"] == []


@pytest.mark.parametrize(
    ("fields", "weak_below", "expanded", "why"),
    [
        ({"graph": "off"}, 0.4, False, "switched off"),
        ({"graph": "on", "k": 1}, 0.4, True, "asked for"),
        ({"k": 1}, 0.4, False, "strong enough"),
        ({"k": 2}, 0.4, False, "strong enough"),
        ({"k": 3}, 0.4, True, "only 2 of 3"),
        ({"k": 1}, 1.1, True, "best cosine is 1.00, below 1.1"),
        ({"k": 1, **WORDS}, 1.1, False, "strong enough"),
        ({"filters": parse_filter({"robot_id": "none"})}, 0.4, False, "nothing was found"),
        ({"as_of": 0, "graph": "on"}, 0.4, False, "nothing was found"),
    ],
)
def test_when_the_graph_is_walked(
    house: House, monkeypatch: pytest.MonkeyPatch, fields: dict, weak_below: float, expanded: bool, why: str
) -> None:
    monkeypatch.setattr("nexus.retrieval.WEAK_COSINE", weak_below)
    put_text(house, "a", "gripper", "b")
    put_text(house, "b", "gripper lamp")
    result = search(house, "gripper", **fields)
    graph = result.explain["graph"]
    assert (graph["expanded"], "graph" in result.seconds) == (expanded, expanded)
    assert why in graph["why"]


def test_explain_tells_what_the_graph_did(house: House) -> None:
    a = put_text(house, "a", "the gripper closes", "b", metadata={"robot_id": "HX-3"})
    b = put_text(house, "b", "tighten every bolt", "c")
    c = put_text(house, "c", "and the lamp")
    d = put_text(house, "d", "some prose", metadata={"robot_id": "HX-3"})
    graph = search(house, "gripper", graph="on", hops=2, **WORDS).explain["graph"]
    assert graph == {
        "mode": "on",
        "expanded": True,
        "why": "it was asked for",
        "hops": 2,
        "seeds": [a.document_id],
        "reached": [
            {"document_id": b.document_id, "hops": 1, "edge": "link"},
            {"document_id": d.document_id, "hops": 1, "edge": "shared"},
            {"document_id": c.document_id, "hops": 2, "edge": "link"},
        ],
    }


@pytest.mark.parametrize("wide", [False, True])
def test_a_filter_holds_for_what_the_graph_adds(house: House, monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    if wide:
        monkeypatch.setattr("nexus.retrieval.FILTERED_DOCUMENTS", 1)
    put_text(house, "a", "the gripper closes", "b", "c", metadata={"keep": True})
    put_text(house, "b", "tighten every bolt", metadata={"keep": True})
    put_text(house, "c", "and the lamp", metadata={"keep": False})
    result = search(house, "gripper", filters=parse_filter({"keep": True}), graph="on", **WORDS)
    assert sources(result) == ["a", "b"]
    assert len(result.explain["graph"]["reached"]) == 1


def test_a_search_never_shows_what_may_not_be_seen(house: House) -> None:
    put_text(house, "a", "the gripper closes", "b", "c", "d", metadata={"robot_id": "HX-3"})
    put_text(house, "b", "for alice alone", readers=frozenset({"alice"}))
    deleted = put_text(house, "c", "gone for good")
    house.hades.delete([deleted.document_id], ALICE)
    put_text(house, "x", "of a stranger", who=MALLORY, metadata={"robot_id": "HX-3"})
    put_text(house, "d", "came late")
    on = {"graph": "on", "hops": 3, **WORDS}
    assert set(sources(search(house, "gripper", **on))) == {"a", "b", "d"}
    assert set(sources(search(house, "gripper", BOB, **on))) == {"a", "d"}
    assert set(sources(search(house, "gripper", as_of=3, **on))) == {"a", "b", "c"}
    assert set(sources(search(house, "gripper", as_of=4, **on))) == {"a", "b"}
    assert len(search(house, "gripper", BOB, **on).explain["graph"]["reached"]) == 1


def test_the_authority_has_the_last_word_on_what_the_graph_adds(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    put_text(house, "a", "the gripper closes")
    secret = put_text(house, "b", "for alice alone", readers=frozenset({"alice"}))
    documents = house.hades.documents
    (chunk,) = documents.chunk_ids_of(secret.document_id, secret.version)
    monkeypatch.setattr(documents, "connected", lambda *_: {secret.document_id: (1, "link")})
    monkeypatch.setattr(
        documents, "vectors_of", lambda *_: {chunk: (secret.document_id, house.embedder.embed(["x"])[0])}
    )
    assert sources(search(house, "gripper", graph="on", **WORDS)) == ["a", "b"]
    result = search(house, "gripper", BOB, graph="on", **WORDS)
    assert sources(result) == ["a"]
    assert chunk not in [c["chunk_id"] for c in result.explain["candidates"]]


@pytest.mark.parametrize("hops", [0, 4, -1])
def test_hops_that_cannot_be_meant_are_refused(house: House, hops: int) -> None:
    put(house, "a")
    with pytest.raises(InvalidRequest, match="1 to 3") as caught:
        search(house, "gripper", hops=hops)
    assert caught.value.pointer == "/hops"


# Through the doors


def test_a_search_over_http_walks_the_graph_as_it_is_told(door: Door) -> None:
    headers = door.headers("acme")
    put_text(door.house, "a", "the gripper closes", "b")
    put_text(door.house, "b", "tighten every bolt", "c")
    put_text(door.house, "c", "and the lamp")
    words = {"hybrid": {"embedding_weight": 0, "text_weight": 1}, "explain": True, "query": "gripper"}

    def ask(**fields: object) -> list[str]:
        body = door.client.post("/rag/search", json=words | fields, headers=headers).json()
        return [f"{hit['source']} {','.join(hit['routes'])}" for hit in body["hits"]]

    assert ask(graph="off") == ["a text"]
    assert ask() == ["a text", "b graph"]
    assert ask(graph="on", hops=2) == ["a text", "b graph", "c graph"]
    for fields, pointer in (({"hops": 4}, "/hops"), ({"hops": 0}, "/hops"), ({"graph": "perhaps"}, "/graph")):
        answer = door.client.post("/rag/search", json=words | fields, headers=headers)
        assert answer.status_code == 422 and pointer in answer.text


def test_the_command_line_says_what_the_graph_did(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    put_text(door.house, "a", "the gripper closes", "b")
    put_text(door.house, "b", "tighten every bolt")
    headers = door.headers("acme")

    class Client:
        def __enter__(self) -> "Client":
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, method: str, path: str, **arguments: object) -> tuple[int, object]:
            answer = door.client.request(method, path, headers=headers, **arguments)
            return answer.status_code, answer.json()

    monkeypatch.setattr(cli.http, "Client", Client)

    def lines(*options: str) -> str:
        result = CliRunner().invoke(cli.app, ["search", "gripper", "--explain", *options])
        assert result.exit_code == 0, result.output
        return result.output

    monkeypatch.setattr("nexus.retrieval.GRAPH_SEEDS", 1)
    assert "graph: walked; it was asked for; 2 hop(s) from 1 document(s) reached {'link': 1}" in lines(
        "--graph", "on", "--hops", "2"
    )
    assert "graph: walked; only 2 of 5 were found without it" in lines()
    assert "graph: not walked; it is switched off" in lines("--graph", "off")
    for wrong in (["--hops", "4"], ["--graph", "perhaps"]):
        assert CliRunner().invoke(cli.app, ["search", "gripper", *wrong]).exit_code == 2
