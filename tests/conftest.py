"""Fixtures that several test files share: a stand-in for the official data set, of its size and with its labels."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from utils import COARSE_OF_FINE


def fake_records(pictures: int, seed: int) -> np.ndarray:
    """Records of the binary version, uint8 [pictures, 3074]: coarse label, fine label, 3,072 random pixels."""
    generator = np.random.default_rng(seed)
    records = generator.integers(0, 256, (pictures, 3074), dtype=np.uint8)
    records[:, 1] = generator.permutation(np.arange(pictures) % 100)
    records[:, 0] = np.array(COARSE_OF_FINE)[records[:, 1]]
    return records


@pytest.fixture(scope="session")
def official_data_dir() -> Iterator[Path]:
    """A data folder with the binary version: 184 MB, so it is removed when the tests are done."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "cifar-100-binary"
        binary.mkdir()
        fake_records(50_000, seed=1).tofile(binary / "train.bin")
        fake_records(10_000, seed=2).tofile(binary / "test.bin")
        yield Path(folder)
