"""Fixtures of the Hub's tests (`pytest_plugins`): a Hub to each module, a HF_HOME to each test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub.hub import Hub, serving

HEADS = {"unet": {"attention_head_dim": 2}, "text_encoder": {"num_attention_heads": 2}}


@pytest.fixture(scope="module")
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(_hub: Hub, tmp_path: Path) -> Hub:
    """The Hub, empty, no request failing, with an empty cache on our side."""
    _hub.home = tmp_path / "cache"
    _hub.empty()
    return _hub


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kcv2diffusers.json that the small models need."""
    folder = tmp_path_factory.mktemp("heads")
    (folder / "kcv2diffusers.json").write_text(json.dumps(HEADS))
    return folder
