"""What the tests of sparsity methods share: a model by neuron, opened on one thread, and a text to calibrate on. A module
that defines `packed` gets these for a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sparse_run import _core
from sparse_run.packed_header import PackedHeader, read_header


@pytest.fixture(scope="module")
def packed(smollm2_neurons: Path) -> Path:
    return smollm2_neurons


@pytest.fixture(scope="module")
def header(packed: Path) -> PackedHeader:
    return read_header(packed)


@pytest.fixture(scope="module")
def model(packed: Path) -> Iterator[_core.Model]:
    model = _core.Model(str(packed), 1)
    yield model
    model.close()


@pytest.fixture(scope="session")
def text(shared_dir: Path) -> str:
    return (shared_dir / "data" / "calibration" / "c4.txt").read_text("utf-8")
