"""The pieces of a rescue: names, decisions, waiting, journal, tables, a process for each repository."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.waiting import until

from kcv2diffusers.errors import Error
from kcv2diffusers.hub.client import Unreachable
from kcv2diffusers.json_text import write_json
from kcv2diffusers.rescue import child, keep, manifest, patience, table
from kcv2diffusers.rescue.decide import decide
from kcv2diffusers.rescue.manifest import Manifest
from kcv2diffusers.rescue.one import FAILED, POSTPONED, PUBLISHED, SKIPPED, Order, Result
from kcv2diffusers.rescue.repositories import companion_of, in_file, is_id, targets
from kcv2diffusers.system import children
from kcv2diffusers.system.staging import staging

SETTINGS = {"repositories": "x", "to": "y"}


def test_ids() -> None:
    assert all(map(is_id, ("a/b", "keras-io/sd_1.5", "A1/b-c.d", "a/" + "b" * 94)))
    paths = ("a", "a/b/c", "a/", "/b", "a/../b", "a/..", ".a/b", "-a/b", "a/-b", "a\\b/c")
    names = ("a--b/c", "a/b.git", "a/b.", "a/b ", "a/b\n", "ä/b", "a/" + "b" * 95, "a/<b>", "a/b\0", "")
    assert not any(map(is_id, paths + names))


def test_targets_of_equal_names() -> None:
    found = targets(["a/dog", "b/Dog", "a/cat", "../x"], "org")
    assert found == {"a/dog": "org/a-dog", "b/Dog": "org/b-Dog", "a/cat": "org/cat"}
    assert companion_of("a/dog-text-encoder", {"a/dog"}) == "a/dog"
    assert companion_of("a/dog-text-encoder", {"b/dog"}) is None and companion_of("a/dog", {"a/dog"}) is None


def test_a_file_of_ids(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(
        "\ufeffb/two\r\n# b/no\n\n hf://a/one/ \nhttps://huggingface.co/c/three/tree/main\nb/two\n"
    )
    assert in_file(file) == ["a/one", "b/two", "c/three"]
    for text, words in (
        ("a/b\n../../etc\n", "line 2: ../../etc is not the id"),
        ("a/b\x1b[2J", r"line 1: a/b\x1b[2J is not"),
        ("# nothing\n", "no repository is in it"),
        ("a/b\n" * (1 << 19), "more than 1 MB"),
    ):
        file.write_text(text)
        with pytest.raises(Error) as refused:
            in_file(file)
        assert words in str(refused.value) and len(str(refused.value).splitlines()) == 2
    with pytest.raises(Error, match="cannot be read"):
        in_file(tmp_path / "none")


def test_decisions() -> None:
    """What the two hundred repositories of test_rescue_run.py do not have."""
    three, text = {f"unet_{n}.h5": 10 for n in range(3)}, {"text_encoder.h5": 5}
    assert "give one by name: hf://a/b/unet_0.h5" in decide("a/b", three).reason
    found = decide("a/b", {"unet.h5": 10, **text, "x.png": 99, "tf_model.h5": 7})
    assert (found.path, found.bytes, found.text_encoder, found.reason) == ("", 15, True, "")
    alone = decide("a/b", {"unet.h5": 10, "tf_model.h5": 7})
    assert (alone.path, alone.bytes, alone.text_encoder) == ("unet.h5", 10, False)
    assert decide("a/b", {"m.safetensors": 9}).path == "m.safetensors"
    hostile = decide("a/b", {"\x1b[2J<b>": 1}).reason
    assert "\x1b" not in hostile and hostile.startswith("no weights among its 1 files")


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub's Retry-After is obeyed; without one waits double; an absurd one is not waited for."""
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    answers: list[float | None] = []

    def ask() -> str:
        if answers:
            raise Unreachable("a/b", "busy", "Try again.", answers.pop(0))
        return "done"

    answers[:] = [7.0, None, None]
    assert patience.patiently(ask) == "done"
    assert 7 <= waits[0] < 9 and 4 <= waits[1] <= 5 and 8 <= waits[2] <= 10
    waits.clear()
    answers[:] = [0.0] * patience.TRIES
    with pytest.raises(Unreachable):
        patience.patiently(ask)
    assert waits == [0.0] * (patience.TRIES - 1)
    waits.clear()
    answers[:] = [86_400.0]
    with pytest.raises(Unreachable):
        patience.patiently(ask)
    assert waits == []


def written(path: Path) -> bytes:
    """The journal of a run of four repositories."""
    journal = Manifest(path, SETTINGS)
    journal.note_listing(["a/1", "a/2", "a/3", "a/ü\udc80"])
    for name, outcome in (("a/1", PUBLISHED), ("a/2", POSTPONED), ("a/2", FAILED), ("a/3", SKIPPED)):
        journal.start(name)
        journal.note(Result(repository=name, outcome=outcome, reason="ü", parts={"unet": "x"}))
    journal.again("a/3")
    journal.close()
    return path.read_bytes()


def test_a_journal_that_is_torn_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "work" / "rescue.jsonl"
    synced: list[int] = []
    monkeypatch.setattr(manifest.os, "fsync", synced.append)
    data = written(path)
    assert len(synced) == data.count(b"\n")  # each line is on the disk before the next
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        journal = Manifest(path, SETTINGS)
        whole = data[:end].rpartition(b"\n")[0].split(b"\n") if b"\n" in data[:end] else []
        ends = {json.loads(line)["id"] for line in whole if b'"ended"' in line}
        ends -= {json.loads(line)["id"] for line in whole if b'"again"' in line}
        assert set(journal.ended) == ends
        assert journal.listed == (["a/1", "a/2", "a/3", "a/ü\udc80"] if len(whole) > 1 else None)
        journal.note(Result(repository="b/5", outcome=SKIPPED))
        journal.close()
        journal = Manifest(path, SETTINGS)  # what is written after a cut is on a line of its own
        assert journal.ended["b/5"].outcome == SKIPPED
        journal.close()


def test_a_journal_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "rescue.jsonl"
    data = written(path)
    with pytest.raises(Error, match="of a run with another to"):
        Manifest(path, SETTINGS | {"to": "z"})
    assert path.read_bytes() == data
    for text in ('{"rescue": 2}\n', "[]\n", "hello\n", data.decode() + '{"x": 1}\n', data.decode() + "[\n"):
        path.write_text(text)
        with pytest.raises(Error, match="is not of a journal"):
            Manifest(path, SETTINGS)
    path.write_bytes(data)
    journal = Manifest(path, SETTINGS)
    with pytest.raises(AssertionError):  # each repository ends once
        journal.note(Result(repository="a/1", outcome=SKIPPED))
    journal.close()


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=HYPERLINK(1)",
    "\x1b[2Ja\nb\r\tc",
    "x\u202ey",
    "\udc80",
    "@sum",
)


def test_tables_of_hostile_names(tmp_path: Path) -> None:
    results = [
        *(Result(repository=n, outcome=SKIPPED, reason=n, where=n, license=n) for n in HOSTILE),
        Result(repository="a/b", outcome=PUBLISHED, commit="0" * 40, read=1_500_000, seconds=2.0,
               parts={"unet": HOSTILE[0]}, where="org/b"),
        Result(repository="a/c", outcome=POSTPONED, reason="later"),
    ]  # fmt: skip
    table.write_tables(tmp_path, results, HOSTILE[0])
    page = Page((tmp_path / "rescue.html").read_text(encoding="utf-8"))
    names = {tag for tag, _ in page.tags}
    assert names <= {"html", "head", "meta", "title", "style", "body", "h1", "p", "table", "thead", "tbody",
                     "tr", "th", "td", "a"}  # fmt: skip
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["https://huggingface.co/a/b"]
    assert not any(name.startswith("on") or name == "src" for _, attrs in page.tags for name in attrs)
    assert sum(tag == "tr" for tag, _ in page.tags) == len(results) + 1
    assert HOSTILE[0] in page.texts and "\\u202e" in "".join(page.texts)
    rows = list(
        csv.DictReader(io.StringIO((tmp_path / "rescue.csv").read_text(encoding="utf-8"), newline=""))
    )
    assert len(rows) == len(results)
    for row in rows:
        assert not any(value.startswith(("=", "@", "+", "-")) for value in row.values()), row
        assert all(value.isprintable() for value in row.values())
    assert rows[2]["repository"] == "'=HYPERLINK(1)" and rows[-2]["read_mb"] == "1.5"
    lines = table.as_text(results).split("\n")
    assert len(lines) == len(results) + 1 and all(line.isprintable() for line in lines)
    assert lines[-1] == "9 repositories: 1 published, 7 skipped, 1 postponed"


ORDER = Order(repository="a/b", work="x", folder="x")


def child_of(monkeypatch: pytest.MonkeyPatch, code: str) -> list[subprocess.Popen[bytes]]:
    """Let the next children run `code` instead; returns the list of them."""
    started = []

    def start(module: str, **pipes: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", code], **pipes))
        return started[-1]

    monkeypatch.setattr(children, "start_module", start)
    return started


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 11)", "its process ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended by SIGKILL"),
        ("raise MemoryError('no\\x1b[2J hf_secretToken00')", "ended with 1: MemoryError: no\\x1b[2J <token>"),
        ("print('not a result')", "its process ended with 0"),
        ("print('[1]' * 10**6)", "its process ended with 0"),
        ("print('{\"repository\": 1}')", "its process ended with 0"),
    ],
)
def test_a_process_that_dies(monkeypatch: pytest.MonkeyPatch, code: str, reason: str) -> None:
    child_of(monkeypatch, code)
    result = child.in_child(ORDER, 60)
    assert (result.repository, result.outcome) == ("a/b", FAILED) and reason in result.reason


def test_a_process_that_does_not_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is ended with what it has started."""
    mark = tmp_path / "grandchild"
    code = f"""
import subprocess, sys, time, pathlib
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(mark)!r}).write_text(str(child.pid))
time.sleep(600)
"""
    started = child_of(monkeypatch, code)
    result = child.in_child(ORDER, 3)
    assert result.outcome == FAILED and result.reason == "not done within 0.05 minutes"
    assert started[0].returncode == -9
    grandchild = int(until(lambda: mark.exists() and mark.read_text()))
    until(lambda: not alive(grandchild))


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Verdict:
    """What a verification leaves for the card."""

    def to_dict(self) -> dict[str, Any]:
        return {}


def test_two_attempts_that_end_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On two computers of a cluster: the second finds the folder of the first, and leaves it as it is."""
    monkeypatch.setattr(keep, "_finish", lambda out, name, license: None)
    data = {"tool": "x", "parts": {}, "bases": [], "origins": [], "dtypes": {}}
    source, place = keep.Source("a/b", "0" * 40, "mit"), tmp_path / "a--b"
    for attempt in ("first", "second"):
        out = tmp_path / attempt
        write_json(out / "conversion.json", data | {"dtypes": {"unet": attempt}})
        kept = keep.put(out, source, place, Verdict(), license=None, private=False)  # type: ignore[arg-type]
        assert kept.reason == ""
        assert json.loads((place / "conversion.json").read_text())["dtypes"] == {"unet": "first"}
    other = keep.Source("a/b", "1" * 40)
    kept = keep.put(out, other, place, Verdict(), license=None, private=False)  # type: ignore[arg-type]
    assert "was not made of this commit" in kept.reason


def test_folders_of_attempts(tmp_path: Path) -> None:
    """Each has its own; that of a process that was killed is removed by the next attempt."""
    code = """
import os, pathlib, sys
from kcv2diffusers.system.staging import staging
with staging(pathlib.Path(sys.argv[1]), "a--b"):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    [left] = tmp_path.iterdir()
    with staging(tmp_path, "a--b") as one, staging(tmp_path, "a--b") as other:
        assert not left.exists() and one != other
        assert sorted(tmp_path.iterdir()) == sorted([one, other])
    assert not list(tmp_path.iterdir())
