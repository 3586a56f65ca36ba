"""Fixtures that several test files share: a stand-in for the official data set, of its size and with its labels."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import utils
from utils import COARSE_OF_FINE, Split, content_digest


def fake_records(pictures: int, seed: int) -> np.ndarray:
    """Records of the binary version, uint8 [pictures, 3074]: coarse label, fine label, 3,072 random pixels."""
    generator = np.random.default_rng(seed)
    records = generator.integers(0, 256, (pictures, 3074), dtype=np.uint8)
    records[:, 1] = generator.permutation(np.arange(pictures) % 100)
    records[:, 0] = np.array(COARSE_OF_FINE)[records[:, 1]]
    return records


def as_split(records: np.ndarray) -> Split:
    coarse_labels, fine_labels = torch.from_numpy(records[:, :2].astype(np.int64).T.copy())
    return Split(torch.from_numpy(records[:, 2:].reshape(-1, 3, 32, 32)), fine_labels, coarse_labels)


@pytest.fixture(scope="session")
def official_data_dir() -> Iterator[Path]:
    """A data folder with the binary version: 184 MB, so it is removed when the tests are done.

    Until then its pictures are the official ones to whoever loads them in this process.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        binary = Path(folder) / "cifar-100-binary"
        binary.mkdir()
        for seed, (part, pictures) in enumerate(utils.PICTURES.items(), start=1):
            records = fake_records(pictures, seed)
            records.tofile(binary / f"{part}.bin")
            patch.setitem(utils.CONTENT, part, content_digest(as_split(records)))
        yield Path(folder)
