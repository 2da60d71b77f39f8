# SPDX-License-Identifier: Apache-2.0
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from models.contract.errors import DataError, HarnessError


def fail() -> None:
    raise DataError("image is corrupt", where="shard-0.tar:17", got="truncated JPEG", fix="drop it")


def test_error_shows_its_filled_fields_only() -> None:
    text = str(DataError("image is corrupt", where="shard-0.tar:17", fix="drop it"))
    assert text == "DataError: image is corrupt\n  where:    shard-0.tar:17\n  fix:      drop it"


def test_error_pickles_with_its_notes() -> None:
    error = DataError("a", where="b", expected="c", got="d", fix="e").with_note("while planning")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.fix, copy.__notes__) == (str(error), "e", ["while planning"])


def test_error_survives_a_process_pool() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
        pytest.raises(HarnessError, match="truncated JPEG"),
    ):
        pool.submit(fail).result()
