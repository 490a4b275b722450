"""What a bulk run and `nexus add` take for a file, and what they call it."""

import os
from pathlib import Path

import pytest

from deployments.listing import label, list_all
from nexus.errors import InvalidRequest, NotFound
from nexus.types import check_source

HOME = Path("/nowhere/nexus")


def test_only_files_are_listed_and_none_that_hide(tmp_path: Path) -> None:
    for name in ("b.md", "a.md", ".hidden.md", "deep/c.md", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "pipe")  # which would be read for ever
    (tmp_path / "dangling.md").symlink_to(tmp_path / "nowhere")
    roots, listed = list_all([str(tmp_path), str(tmp_path / "a.md")], HOME)
    assert [one.source for one in listed] == [str(tmp_path / name) for name in ("a.md", "b.md", "deep/c.md")]
    assert roots == [f"{tmp_path}/", str(tmp_path / "a.md")]
    assert all(one.url == f"file://{one.source}" and one.size == 1 for one in listed)


def test_nothing_of_the_home_is_listed_by_whatever_name(tmp_path: Path) -> None:
    """It holds the secret that tokens are signed with."""
    home = tmp_path / "nexus"
    home.mkdir()
    (home / "token-secret").write_text("secret")
    (tmp_path / "note.md").write_text("x")
    (tmp_path / "link").symlink_to(home / "token-secret")
    _, listed = list_all([str(tmp_path)], home)
    assert [one.source for one in listed] == [str(tmp_path / "note.md")]
    for source in (home, home / "token-secret", tmp_path / "link"):
        with pytest.raises(NotFound, match="no files"):
            list_all([str(source)], home)


def test_a_name_that_is_no_text_is_written_out_and_still_opened(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9\n.md", "wb") as file:
        file.write(b"x")
    _, (listed,) = list_all([str(tmp_path)], HOME)
    assert (
        listed.source == f"{tmp_path}/caf\\udce9\\n.md" == label(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.md"))
    )
    check_source(listed.source)
    assert Path(listed.url.removeprefix("file://")).read_bytes() == b"x"


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file or folder"):
        list_all([str(tmp_path / "nowhere")], HOME)
    with pytest.raises(NotFound, match="no files"):
        list_all([str(tmp_path)], HOME)
    with pytest.raises(InvalidRequest, match="Protocol not known"):
        list_all(["nonsense://x"], HOME)
