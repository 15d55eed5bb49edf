"""Two hundred repositories rescued from a Hub that fails, by a process that is killed again and again."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from support.checkpoints import Checkpoints, cached
from support.hub.fixtures import HEADS
from support.hub.hub import ALICE, BOB, Hub, serving
from support.hub.wild import COUNT, OWNER, PARTS, TOKENIZER_WORDS, WEIGHTS, Wild
from support.waiting import LONG

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).parents[1] / "support" / "hub" / "rescue_driver.py"
KILLS = 6
# A tenth of all requests fail; and of a few commits, which are made, the answer is lost.
FAILING: tuple[dict[str, Any], ...] = (
    {"method": "POST", "path": "/commit/", "share": 0.1, "late": True, "status": 502},
    {"method": "*", "share": 0.1, "statuses": [429, 429, 500, 503], "retry_after": "1"},
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def wild(hub: Hub, checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Wild:
    folder = tmp_path_factory.mktemp("wild")
    wanted = ["--parts", "text_encoder", "--versions", "1", "--vocabulary", str(TOKENIZER_WORDS)]
    text = cached("sprint", "make_checkpoints.py", *wanted, "--containers", "saved_model")
    sources = {"unet": checkpoints("sprint", "unet"), "text_encoder": text / "text_encoder-sd1-float32"}
    models = {}
    for part, source in sources.items():
        models[part] = Path(shutil.copytree(source / "saved_model", folder / f"saved-{part}"))
        (models[part] / "kcv2diffusers.json").write_text(json.dumps(HEADS))
    (folder / "files").mkdir()
    wild = Wild(folder / "files", models)
    for owner in ("alice", "bob"):
        wild.seed(hub, owner)
    return wild


def start(hub: Hub, wild: Wild, owner: str, work: Path) -> subprocess.Popen[str]:
    token = {"alice": ALICE, "bob": BOB}[owner]
    command = [sys.executable, str(DRIVER), OWNER, owner, str(work), str(wild.base)]
    return subprocess.Popen(
        command,
        env=hub.environment(HF_TOKEN=token),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def calm(hub: Hub, wild: Wild, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run that nothing disturbed; it published as bob."""
    work = tmp_path_factory.mktemp("calm")
    out, err = start(hub, wild, "bob", work).communicate(timeout=LONG)
    assert "published" in out and not err, err
    return work


def lines(work: Path) -> list[dict[str, Any]]:
    path = work / "rescue.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines()]


def ended(work: Path) -> dict[str, dict[str, Any]]:
    """The result of each repository; every one has ended once."""
    found = [line["result"] for line in lines(work) if line.get("state") == "ended"]
    counts = Counter(result["repository"] for result in found)
    assert set(counts.values()) <= {1}, counts
    return {result["repository"]: result for result in found}


def test_each_repository_ends_as_it_must(hub: Hub, wild: Wild, calm: Path) -> None:
    results = ended(calm)
    assert results.keys() == {each.id for each in wild.repositories} and len(results) == COUNT
    for each in wild.repositories:
        result = results[each.id]
        assert result["outcome"] == each.outcome and each.reason in result["reason"], result
        assert bool(result["reason"]) == (each.outcome != "published")
        assert str(calm) not in result["reason"] and "models--" not in result["reason"], result
    assert {p.name for p in calm.iterdir()} == {"rescue.jsonl", "rescue.csv", "rescue.html", ".rescue.lock"}
    with (calm / "rescue.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows] == [result["outcome"] for _, result in sorted(results.items())]


def content(hub: Hub, repository: str, name: str) -> bytes:
    with urllib.request.urlopen(f"{hub.url}/{repository}/resolve/main/{name}") as answer:
        return bytes(answer.read())


def test_the_weights_are_the_authors(hub: Hub, wild: Wild, calm: Path) -> None:
    """Every tensor of a part that a repository holds is its own, every other the base's."""
    results = ended(calm)
    sources = {
        folder: {name: load((folder / file).read_bytes()) for name, file in WEIGHTS.items()}
        for folder in (wild.pipeline, wild.base)
    }
    for each in wild.repositories:
        if each.outcome != "published" or each.id == "wild/corgi":
            continue
        target = results[each.id]["where"]
        assert target == f"bob/{each.name}"
        for name, file in WEIGHTS.items():
            found = load(content(hub, target, file))
            wanted = sources[wild.pipeline if name in each.own else wild.base][name]
            assert found.keys() == wanted.keys(), (each.id, name)
            for tensor, value in found.items():
                assert np.array_equal(value, wanted[tensor].reshape(value.shape)), (each.id, tensor)
    parts = {part: results["wild/corgi"]["parts"][part] for part in PARTS[:2]}
    assert parts == {"unet": "SavedModel", "text_encoder": "wild/corgi-text-encoder"}
    card = content(hub, "bob/unet-1", "README.md").decode()
    assert "license: creativeml-openrail-m" in card and "[wild](https://huggingface.co/wild)" in card
    commit = results["wild/unet-1"]["commit"]
    assert f"https://huggingface.co/wild/unet-1/tree/{commit}" in card and "<script" not in card


def size(folder: Path) -> int:
    """Bytes in a folder, from which files may be removed meanwhile."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(root, name).lstat().st_size
    return total


def test_killed_at_any_moment(hub: Hub, wild: Wild, calm: Path, tmp_path: Path) -> None:
    """The result is that of a run that nothing disturbed; each pipeline was published by one commit."""
    chance, work = random.Random(time.time_ns()), tmp_path / "work"
    hub.fail(*FAILING)
    hub.log()
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            largest[0] = max(largest[0], size(work))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        moments = sorted(chance.sample(range(COUNT - 20), KILLS))
        for moment in moments:
            process = start(hub, wild, "alice", work)
            while len(ended(work)) < moment and process.poll() is None:
                time.sleep(0.05)
            time.sleep(chance.random() * 2)
            process.kill()
            process.communicate()
        runs = 0
        while (process := start(hub, wild, "alice", work)).wait(LONG):  # 1: the Hub broke some off
            runs += 1
            assert process.returncode == 1 and runs < 5, process.communicate()
            process.communicate()
        process.communicate()
    finally:
        stop.set()
        watcher.join()
        hub.fail()
    seen = hub.log()
    assert sum(entry["path"].startswith("/api/models?author") for entry in seen) >= COUNT // 30

    mine, others = ended(work), ended(calm)
    for result in (*mine.values(), *others.values()):
        result.pop("seconds")
        result["where"] = result["where"].partition("/")[2]
        result["reason"] = result["reason"].replace("bob/", "alice/")
    assert mine == others
    state = hub.ask("state")
    for name, result in mine.items():
        if result["outcome"] == "published":
            one, other = (state[f"{owner}/{result['where']}"] for owner in ("alice", "bob"))
            assert one["messages"] == other["messages"] == ["initial commit", f"Rescued from {name}"]
            for repository in (one, other):
                repository["oids"].pop("README.md")  # it names the repository
            assert one["oids"] == other["oids"]
    for number, files in enumerate((["README.md"], ["README.md"], ["conversion.json"])):  # of somebody else
        assert state[f"alice/taken-{number}"]["heads"]["main"] == files
    # One repository at a time: its files, the pipeline, and the journal.
    every = sum(result["read"] + result["written"] for result in mine.values())
    most = max(result["read"] + result["written"] for result in mine.values())
    assert most / 2 < largest[0] < 1.5 * most + (4 << 20) < every / 2
    assert {p.name for p in work.iterdir()} == {"rescue.jsonl", "rescue.csv", "rescue.html", ".rescue.lock"}
