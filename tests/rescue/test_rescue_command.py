"""The command rescue as a user meets it: each repository in a process, stored or published, interrupted."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.hub.hub import ALICE, BOB, READER, Hub, serving
from support.hub.wild import Wild
from support.waiting import LONG, until

import kcv2diffusers
from kcv2diffusers.rescue.patience import TRIES

pytestmark = pytest.mark.slow
SLUG = "wild/keras-dreambooth-0123456789abcdef01234567"


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Wild:
    return Wild(tmp_path_factory.mktemp("wild"))


@pytest.fixture(scope="module")
def _hub(wild: Wild, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as hub:
        wild.seed(hub)
        yield hub


@pytest.fixture
def hub(_hub: Hub, tmp_path: Path) -> Hub:
    _hub.home = tmp_path / "cache"
    _hub.fail()
    return _hub


def ids(folder: Path, *names: str) -> Path:
    file = folder / "ids.txt"
    file.write_text("# of the test\n" + "".join(f"wild/{name}\n" for name in names))
    return file


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "rescue.csv").open(newline="", encoding="utf-8") as file:
        return {row["repository"]: row for row in csv.DictReader(file)}


def test_stored(hub: Hub, wild: Wild, tmp_path: Path) -> None:
    """In a folder, with a card; a second run finds all done; --retry looks again."""
    out = tmp_path / "out"
    file = ids(tmp_path, "two-1", "unlicensed-0", "bad-page-0", "pipeline-0", "no-such-repository")
    arguments = ("rescue", "--list", file, "--to", out, "--base", wild.base)
    done = hub.run(*arguments)
    assert done.returncode == 0 and "[1/5] wild/bad-page-0: failed: unet.h5: a web page" in done.stderr
    assert "5 repositories: 2 stored, 1 skipped, 2 failed" in done.stdout
    assert sorted(p.name for p in out.iterdir()) == [
        ".rescue.lock", "rescue.csv", "rescue.html", "rescue.jsonl", "wild--two-1", "wild--unlicensed-0"
    ]  # fmt: skip
    found = rows(out)
    row = found["wild/two-1"]
    assert (row["license"], row["read_mb"]) == ("creativeml-openrail-m", "2.3")
    assert "no such repository" in found["wild/no-such-repository"]["reason"]
    pipeline = out / "wild--two-1"
    assert not (pipeline / "verification.json").exists()
    assert str(tmp_path) not in (pipeline / "conversion.json").read_text()
    assert "| verdict | passed |" in (pipeline / "README.md").read_text()
    assert "license:" not in (out / "wild--unlicensed-0" / "README.md").read_text().split("---")[1]
    sources = wild.folder / "legacy"
    verified = kcv2diffusers.verify(
        pipeline, sources / "unet.h5", sources / "text_encoder.h5", base=wild.base, level="weights"
    )
    assert verified.passed, verified.reason

    before, log = (pipeline / "conversion.json").stat(), hub.log()
    assert log and "2 stored, 1 skipped, 2 failed" in hub.does(*arguments)
    assert hub.log() == []  # all had ended
    # The journal lost, the folders not: what is there is recognised, not made again.
    (out / "rescue.jsonl").unlink()
    assert "2 stored, 1 skipped, 2 failed" in hub.does(*arguments)
    assert (pipeline / "conversion.json").stat() == before
    assert rows(out)["wild/two-1"] | {"seconds": ""} == row | {"seconds": ""}
    # A commit later it is of another state of the repository.
    hub.ask("seed", {"repo": "wild/two-1", "files": {"notes.txt": "x"}})
    hub.log()
    told = json.loads(hub.does(*arguments, "--retry", "--json"))
    assert told["complete"] and len(told["results"]) == 5
    assert not [entry for entry in hub.log() if "/wild/two-1" in entry["path"]]  # it has ended well
    (out / "rescue.jsonl").unlink()
    hub.does(*arguments)
    assert "wild--two-1 exists already, and was not made of this commit" in rows(out)["wild/two-1"]["reason"]
    other = hub.refuses(*arguments, "--dtype", "float16")
    assert "is of a run with another dtype" in other


def test_published(hub: Hub, wild: Wild, tmp_path: Path) -> None:
    """As an owner's repositories; a license for those without one; no right is an end of the run."""
    work, file = tmp_path / "work", ids(tmp_path, "unet-1", "unlicensed-1", "taken-1", "pipeline-1")
    hub.fail({"path": "/api/models/wild/pipeline-1", "status": 403})  # no reason to end the run
    arguments = ("rescue", "--list", file, "--to", "alice", "--work", work, "--base", wild.base)
    for token, words in (("", "publishing needs a login"), ("hf_wrong", "does not accept this token")):
        assert words in hub.refuses(*arguments, HF_TOKEN=token)
    assert not work.exists()
    for token in (READER, BOB):
        done = hub.run(*arguments, HF_TOKEN=token)
        assert done.returncode == 1 and "has no right to do this" in done.stderr
        assert "the same command goes on" in done.stderr
        states = [json.loads(line) for line in (work / "rescue.jsonl").read_text().splitlines()]
        assert {s["id"]: s["state"] for s in states[2:]}["wild/unet-1"] == "forbidden"
    told = json.loads(hub.does(*arguments, "--json", "--private", HF_TOKEN=ALICE))
    outcomes = {result["repository"]: result["outcome"] for result in told["results"]}
    assert outcomes == {
        "wild/unet-1": "published",
        "wild/unlicensed-1": "skipped",
        "wild/taken-1": "skipped",
        "wild/pipeline-1": "failed",
    }
    hub.fail()
    state = hub.ask("state")
    assert state["alice/unet-1"]["private"] and "alice/unlicensed-1" not in state
    hub.does(*arguments, "--license", "mit", "--retry", HF_TOKEN=ALICE)
    assert rows(work)["wild/unlicensed-1"]["license"] == "mit"
    assert rows(work)["wild/unet-1"]["license"] == "creativeml-openrail-m"
    messages = hub.ask("state")["alice/unlicensed-1"]["messages"]
    assert messages == ["initial commit", "Rescued from wild/unlicensed-1"]
    assert hub.ask("state")["alice/taken-1"]["heads"]["main"] == ["README.md"]
    assert "is where it would be published" in hub.does(
        "rescue", "--list", file, "--to", "wild", "--work", tmp_path / "same", HF_TOKEN=ALICE
    )


def test_two_licenses(hub: Hub, wild: Wild, tmp_path: Path) -> None:
    """The author's and another of the base: which applies is not for a program to say."""
    base = shutil.copytree(wild.base, tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    arguments = ("rescue", "--list", ids(tmp_path, "two-2"), "--to", "alice", "--base", base)
    arguments += ("--work", tmp_path / "work")
    told = hub.does(*arguments, HF_TOKEN=ALICE)
    assert "failed" in told and "its sources state creativeml-openrail-m, apache-2.0" in told
    assert "alice/two-2" not in hub.ask("state")
    hub.does(*arguments, "--retry", "--license", "creativeml-openrail-m", HF_TOKEN=ALICE)
    assert rows(tmp_path / "work")["wild/two-2"]["license"] == "creativeml-openrail-m"


def test_a_plan(hub: Hub, tmp_path: Path) -> None:
    """--dry-run: of an organisation, of the address of its page, of a collection; nothing is downloaded."""
    hub.log()
    told = hub.does("rescue", "wild", "--dry-run")
    lines = told.splitlines()
    assert len(lines) == 201 and lines[-1].startswith("200 repositories: ") and "\x1b" not in told
    assert any("wild/two-1" in line and "planned" in line and "(2.3 MB)" in line for line in lines)
    log = hub.log()
    assert not [entry for entry in log if "/resolve/" in entry["path"]]
    assert sum("/api/models?author=wild" in entry["path"] for entry in log) == 7  # pages
    assert not Path("rescued").exists()
    items = [["model", "wild/unet-1"], ["dataset", "wild/data"], ["model", "wild/empty-1"]]
    hub.ask("collection", {"slug": SLUG, "items": items})
    for source in (SLUG, f"https://huggingface.co/collections/{SLUG}"):
        told = json.loads(hub.does("rescue", source, "--dry-run", "--json"))
        assert [result["repository"] for result in told] == ["wild/empty-1", "wild/unet-1"]
        assert told[1]["where"] == "wild--unet-1" and told[1]["read"] > 2e6
    for source, words in (
        ("nobody", "has no models that can be seen"),
        ("wild/x-000000000000000000000000", "no such repository"),
        ("../x", "not an organisation"),
        ("https://example.com/x", "not an organisation"),
    ):
        assert words in hub.refuses("rescue", source, "--dry-run")
    for arguments, words in (
        ((), "Give an organisation, or --list FILE"),
        (("wild", "--list", "x"), "Give an organisation, or --list FILE"),
        (("wild", "--to", "a--b"), "Cannot have -- or .."),
        (("wild", "--license", "mitt"), "Did you mean mit?"),
        (("wild", "--private"), "--private is for repositories of the Hub"),
        (("wild", "--time-limit", "0"), "give minutes"),
        (("--list", tmp_path / "none"), "cannot be read"),
    ):
        assert words in hub.refuses("rescue", *arguments)


IMPATIENT = """
import kcv2diffusers.rescue.run as run
run._BETWEEN = 0
from kcv2diffusers.cli import main
main()
"""


def test_the_hub_does_not_answer(hub: Hub, tmp_path: Path) -> None:
    """Nothing has ended then; the next run begins where this one did."""
    out, path = tmp_path / "out", "/api/models/wild/empty-2"
    arguments = ["rescue", "--list", str(ids(tmp_path, "empty-2")), "--to", str(out)]
    hub.fail({"path": path, "share": 1, "statuses": [429], "retry_after": "0"})
    hub.log()
    command = [sys.executable, "-c", IMPATIENT, *arguments]
    done = subprocess.run(command, env=hub.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Not all repositories have ended" in done.stderr
    assert "rate limit is reached (429" in done.stdout and "1 postponed" in done.stdout
    assert sum(path in entry["path"] for entry in hub.log()) >= 3 * TRIES  # in each of three rounds
    hub.fail()
    assert "1 skipped" in hub.does(*arguments)
    states = [json.loads(line).get("state") for line in (out / "rescue.jsonl").read_text().splitlines()]
    assert states[2:] == [*["started", "postponed"] * 3, "started", "ended"]


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGINT, "unet-2"), (signal.SIGTERM, "unet-3"), (signal.SIGKILL, "unet-4")]
)
def test_interrupted(hub: Hub, wild: Wild, tmp_path: Path, number: signal.Signals, name: str) -> None:
    """In the middle of an upload: the process of the repository ends too, and the run goes on later."""
    work, file = tmp_path / "work", ids(tmp_path, name)
    arguments = ["rescue", "--list", str(file), "--to", "alice", "--base", str(wild.base)]
    arguments += ["--work", str(work)]
    hub.fail({"method": "POST", "path": f"/{name}/preupload/", "status": 503})
    hub.log()
    with subprocess.Popen(
        [sys.executable, "-m", "kcv2diffusers", *arguments],
        env=hub.environment(HF_TOKEN=ALICE),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until(lambda: any("/preupload/" in entry["path"] for entry in hub.log()), process)
        [child] = children(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=LONG)
    if number == signal.SIGKILL:
        assert (process.returncode, err) == (-number, "")
    else:
        assert process.returncode == 128 + number
        assert err == "kcv2diffusers: interrupted; the same command goes on.\n"
    until(lambda: not Path(f"/proc/{child}").exists())
    lines = [json.loads(line) for line in (work / "rescue.jsonl").read_text().splitlines()]
    assert [line.get("state") for line in lines[2:]] == ["started"]
    hub.fail()
    assert "1 published" in hub.does(*arguments, HF_TOKEN=ALICE)
    assert hub.ask("state")[f"alice/{name}"]["messages"][1:] == [f"Rescued from wild/{name}"]
    left = {path.name for path in work.iterdir()}
    assert left == {".rescue.lock", "rescue.csv", "rescue.html", "rescue.jsonl"}


def test_two_at_once(hub: Hub, wild: Wild, tmp_path: Path) -> None:
    """The second run in a folder waits for the first only shortly."""
    import fcntl

    out, file = tmp_path / "out", ids(tmp_path, "empty-1")
    out.mkdir()
    with (out / ".rescue.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = hub.refuses("rescue", "--list", file, "--to", out)
    assert "another rescue works there" in refused and not (out / "rescue.jsonl").exists()
