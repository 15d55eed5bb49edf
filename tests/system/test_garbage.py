"""Garbage is collected in training, where the objects that were there before are not visited."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from kcv2diffusers.system.garbage import SELDOM, collect_new_only


class Node:
    """An object in a cycle."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_created_within_is_collected() -> None:
    Node()  # is collected before
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(ZeroDivisionError), collect_new_only():
        assert gc.get_freeze_count() > frozen and gc.get_threshold()[0] < before[0]
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None
        1 / 0  # noqa: B018
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)


def test_garbage_of_before_does_not_stay() -> None:
    old = weakref.ref(Node())
    with collect_new_only():
        assert old() is None


def test_the_commands_collect_seldom_and_the_library_leaves_it_to_its_user(tmp_path: Path) -> None:
    code = """
import gc, runpy, sys
usual = gc.get_threshold()
import kcv2diffusers
kcv2diffusers.inspect("tiny")
assert gc.get_threshold() == usual
sys.argv = ["kcv2diffusers", "inspect", "tiny"]
try:
    runpy.run_module("kcv2diffusers", run_name="__main__")
finally:
    print(gc.get_threshold())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(SELDOM), done.stderr
