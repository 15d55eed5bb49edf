"""Commands as child processes: their end, their limits, their environment; visitors apart from each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.checkpoints import ROOT
from support.waiting import until

from kcv2diffusers import Error
from kcv2diffusers.app.folders import Root, Session, Settings, rooted
from kcv2diffusers.app.jobs import Job, environment

# A stand-in for a command: it says that it runs, and cleans up on SIGTERM.
STAND_IN = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path("half").unlink()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path("half").write_text("x")
print("at work", file=sys.stderr, flush=True)
time.sleep(600)
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for modules that stand for commands."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "stand_in.py").write_text(STAND_IN)
    (folder / "fills_the_disk.py").write_text("open('big', 'wb').write(bytes(3 << 20))")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return folder


def session_of(root: Root, key: str = "one") -> Session:
    return root.session(key)


def running(session: Session, folder: Path) -> Job:
    job = session.run([], folder, module="stand_in")
    until(lambda: "at work" in job.lines())
    return job


def test_a_command_and_its_result(tmp_path: Path) -> None:
    with rooted(tmp_path, Settings()) as root:
        session = session_of(root)
        folder = session.place("x")
        job = session.run(["inspect", "tiny://", "--json"], folder)
        assert job.command == "kcv2diffusers inspect tiny:// --json"
        for _ in job.follow():
            pass
        assert len(job.result()) == 4
        job = session.run(["inspect", "hf://nobody/nothing"], folder)
        list(job.follow())
        with pytest.raises(Error, match="nobody/nothing"):
            job.result()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_command_cleans_up(tmp_path: Path, modules: Path) -> None:
    with rooted(tmp_path / "work", Settings()) as root:
        session = session_of(root)
        job = running(session, folder := session.place("x"))
        with pytest.raises(Error, match="runs for you already"):
            session.run([], folder, module="stand_in")
        session.stop()
        list(job.follow())
        with pytest.raises(Error, match="Stopped"):
            job.result()
        assert job.code == 143 and not (folder / "half").exists()


def test_stop_is_for_its_tab(tmp_path: Path, modules: Path) -> None:
    with rooted(tmp_path / "work", Settings()) as root:
        session, folder = session_of(root), tmp_path
        with root.line.join(session, "train") as turn, session.working(turn):
            job = running(session, folder)
            with root.line.join(session, "lora") as waiting:
                session.stop("lora")
                assert waiting.stopped and not turn.stopped and not job.stopped
            session.stop("train")
            list(job.follow())
            assert turn.stopped and job.code == 143
            with pytest.raises(Error, match="Stopped"):
                session.run([], folder, module="stand_in")
        running(session, folder)


def test_a_page_that_is_left_ends_its_command(tmp_path: Path, modules: Path) -> None:
    with rooted(tmp_path / "work", Settings()) as root:
        session = session_of(root)
        job = running(session, session.place("x"))
        handed = Path(session.hand_out(session.folder / "x" / "half"))
        with root.line.join(session, "x"), root.line.join(root.session("other"), "x") as next_one:
            root.close("one")
            assert list(root.line.wait(next_one)) == [], "its turn has come"
        assert job.code == 143 and not session.folder.exists() and not handed.exists()
        with pytest.raises(Error, match="closed"):
            session.run([], tmp_path, module="stand_in")


def test_a_generator_that_is_left_ends_its_command(tmp_path: Path, modules: Path) -> None:
    with rooted(tmp_path / "work", Settings()) as root:
        session = session_of(root)
        job = running(session, session.place("x"))
        following = job.follow()
        next(following)
        following.close()
        assert job.code == 143


def test_limits(tmp_path: Path, modules: Path) -> None:
    with rooted(tmp_path / "work", Settings(seconds=0.1, most_bytes=1 << 20)) as root:
        session = session_of(root)
        job = session.run([], session.place("x"), module="stand_in")
        list(job.follow())
        with pytest.raises(Error, match="time limit"):
            job.result()
    with rooted(tmp_path / "work", Settings(most_bytes=1 << 20)) as root:
        session = session_of(root)
        job = session.run([], session.place("x"), module="fills_the_disk")
        list(job.follow())
        assert job.code == 1 and "File too large" in job.reason()
        big = tmp_path / "big.h5"
        big.write_bytes(b"")
        os.truncate(big, 3 << 20)
        with pytest.raises(Error, match="larger"):
            session.take([str(big)], session.place("y"))


def test_a_killed_server_leaves_nothing(tmp_path: Path, modules: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from kcv2diffusers.app.folders import Settings, rooted
with rooted(Path({str(tmp_path / "work")!r}), Settings()) as root:
    session = root.session("one")
    job = session.run([], session.place("x"), module="stand_in")
    while "at work" not in job.lines():
        time.sleep(0.01)
    print(job._process.pid, session.folder, flush=True)
    time.sleep(600)
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    number, folder = server.stdout.readline().split()
    server.send_signal(signal.SIGKILL)
    server.wait()
    until(lambda: not _alive(int(number)))
    assert not (Path(folder) / "x" / "half").exists(), "the command ended and cleaned up"
    assert Path(folder).exists()
    with rooted(tmp_path / "work", Settings()) as root:
        assert [*(tmp_path / "work").iterdir()] == [root.folder]


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_folder_of_a_living_server_stays(tmp_path: Path) -> None:
    with rooted(tmp_path, Settings()) as one, rooted(tmp_path, Settings()) as other:
        assert one.folder.exists() and other.folder.exists() and one.folder != other.folder


def test_visitors_are_apart(tmp_path: Path) -> None:
    with rooted(tmp_path, Settings()) as root:
        one, other = root.session("one"), root.session("other")
        assert root.session("one") is one
        upload = root.cache / "a.h5"
        upload.write_text("x")
        assert one.take([str(upload), str(upload)], one.place("in")) == ["a.h5", "a (2).h5"]
        link = root.cache / "link.h5"
        link.symlink_to("/etc/hostname")
        with pytest.raises(Error, match="Only files"):
            one.take([str(link)], one.place("in"))
        one.take([str(upload)], one.place("in"))
        handed = Path(one.hand_out(one.folder / "in" / "a.h5"))
        assert handed.read_text() == "x" and root.cache in handed.parents
        assert not {one.folder, one.handed} & {other.folder, other.handed, *other.folder.parents}
        assert one.folder.stat().st_mode & 0o777 in (0o700, 0o755)
        root.close("other")
        assert handed.exists() and one.folder.exists() and not other.folder.exists()
        theirs = root.session("theirs", "their browser")
        file = f"/gradio_api/file={theirs.hand_out(one.folder / 'in' / 'a.h5')}"
        assert [root.may_read(file, browser) for browser in ("their browser", "another", None)] == [
            True, False, False,
        ]  # fmt: skip
        assert not root.may_read(file.upper(), "another")
        assert root.may_read(f"/gradio_api/file={handed}", "any"), "its browser keeps no cookies"
        for key in (None, ""):
            with pytest.raises(Error, match="no session"):
                root.session(key)


def test_uploads_go_with_their_visitors(tmp_path: Path) -> None:
    with rooted(tmp_path / "work", Settings()) as root:
        for name in ("shared", "alone", "anew"):
            (root.cache / name).mkdir()
        shared, alone, anew = (root.cache / name / "a.h5" for name in ("shared", "alone", "anew"))
        for path in (shared, alone, anew, outside := tmp_path / "b.h5"):
            path.write_text("x")
        one, other = root.session("one"), root.session("other")
        one.take([*map(str, (shared, alone, anew, outside))], one.place("in"))
        other.take([str(shared)], other.place("in"))
        (tmp_path / "again").write_text("x")
        (tmp_path / "again").rename(anew)
        root.close("one")
        assert not alone.parent.exists() and shared.exists() and anew.exists() and outside.exists()
        root.close("other")
        assert not shared.parent.exists()
        with pytest.raises(Error, match="Give the files again"):
            root.session("one").take([str(shared)], tmp_path / "x")


def test_a_silent_page_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rooted(tmp_path, Settings(seconds=60)) as root:
        old = root.session("old")
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 60 + 3601)
        with root.line.join(old, "x"):
            root.session("new")
            assert old.folder.exists(), "its work waits or runs"
        now += 61
        root.session("new")
        assert not old.folder.exists()


def test_tokens_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ofTheServer")
    monkeypatch.setenv("OAUTH_CLIENT_SECRET", "secret")
    mine = environment(local=True, token=None, home=tmp_path)
    assert mine["HF_TOKEN"] == "hf_ofTheServer" and "HF_TOKEN_PATH" not in mine
    theirs = environment(local=False, token=None, home=tmp_path)
    assert "HF_TOKEN" not in theirs and "OAUTH_CLIENT_SECRET" not in theirs
    assert theirs["HF_TOKEN_PATH"] == os.devnull
    theirs = environment(local=False, token="hf_visitor", home=tmp_path)
    assert theirs["HF_TOKEN"] == "hf_visitor" and theirs["HF_HUB_CACHE"] == str(tmp_path / "hub")


def test_no_token_is_shown(tmp_path: Path, modules: Path) -> None:
    (modules / "tells.py").write_text(
        "import os, sys; print('token', os.environ['HF_TOKEN'], file=sys.stderr)"
    )
    with rooted(tmp_path / "work", Settings()) as root:
        session = session_of(root)
        job = session.run([], session.place("x"), token="sesame-123", module="tells")
        list(job.follow())
        assert job.lines() == ["token <token>"] and "sesame" not in job.last_lines()
