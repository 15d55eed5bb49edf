"""A rescue on a Ray cluster of several nodes on this machine, one of which is killed in mid-run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub.hub import ALICE, Hub
from support.hub.wild import Repository, Wild
from support.ray_clusters import COMPUTER, ray_cluster
from support.waiting import LONG

pytestmark = pytest.mark.slow
pytest_plugins = ["support.hub.fixtures"]
NODES = 3  # with one CPU each
# Some of the two hundred: what is published, and what ends early for each kind of reason.
NAMES = (
    "four-1", "new-1", "unet-1", "unet-2", "two-1", "deep", "pair-1", "pair-1-text-encoder", "single-1",
    "bad-page-0", "bad-nan-0", "bad-cut-5-0", "epochs-0", "escape-0", "pipeline-0", "unlicensed-0", "taken-0",
)  # fmt: skip


@pytest.fixture
def wild(tmp_path: Path) -> Wild:
    (tmp_path / "files").mkdir()
    return Wild(tmp_path / "files")


@pytest.fixture
def cluster(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running cluster; its processes have the environment of a command against the fake Hub."""
    for name, value in hub.environment(HF_TOKEN=ALICE, RAY_USAGE_STATS_ENABLED="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with ray_cluster() as cluster:
        for _ in range(NODES - 1):
            cluster.add_node(**COMPUTER)
        cluster.wait_for_nodes(LONG)
        yield cluster


def test_a_node_is_killed(hub: Hub, wild: Wild, cluster: Any, tmp_path: Path) -> None:
    chosen = {each.id: each for each in wild.repositories if each.name in NAMES}
    assert len(chosen) == len(NAMES)
    wild.seed(hub)
    hub.fail({"sleep": 1})  # uploads take long enough to be caught in the middle
    ids, work = tmp_path / "ids.txt", tmp_path / "work"
    ids.write_text("\n".join(chosen))
    command = [sys.executable, "-m", "kcv2diffusers", "rescue", "--list", str(ids), "--to", "alice",
               "--base", str(wild.base), "--work", str(work), "--ray", cluster.address, "--json"]  # fmt: skip
    with subprocess.Popen(
        command,
        env=hub.environment(HF_TOKEN=ALICE),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        victim = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        while len(states(work)["ended"]) < 3 or len(states(work)["running"]) < NODES:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        cluster.remove_node(victim, allow_graceful=False)
        out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0 and ALICE not in out + err, err
    results = {result["repository"]: result for result in json.loads(out)["results"]}
    assert results.keys() == chosen.keys()
    for each in chosen.values():
        check(hub, each, results[each.id])
    ended = Counter(states(work)["ended"])
    assert ended.keys() == chosen.keys() and set(ended.values()) == {1}


def states(work: Path) -> dict[str, list[str]]:
    """The repositories that have ended, and those that have begun since and not ended."""
    path = work / "rescue.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    ended = [line["id"] for line in told if line.get("state") == "ended"]
    started = [line["id"] for line in told if line.get("state") == "started"]
    return {"ended": ended, "running": [name for name in started if name not in ended]}


def check(hub: Hub, each: Repository, result: dict[str, Any]) -> None:
    assert result["outcome"] == each.outcome and each.reason in result["reason"], result
    if each.outcome == "published":
        messages = hub.ask("state")[f"alice/{each.name}"]["messages"]
        assert messages == ["initial commit", f"Rescued from {each.id}"]


def test_no_cluster(hub: Hub, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs Ray (pip install 'kcv2diffusers[ray]')")
    (tmp_path / "ids").write_text("a/b")
    arguments = ("rescue", "--list", tmp_path / "ids", "--to", tmp_path / "out", "--ray", "auto")
    refused = hub.refuses(*arguments, RAY_ADDRESS="", RAY_TMPDIR=str(tmp_path / "none"))
    assert "no Ray cluster can be reached" in refused and len(refused.splitlines()) == 2
