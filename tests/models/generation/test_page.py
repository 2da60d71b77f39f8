# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from models.contract.errors import DataError
from models.contract.evaluation import Evaluation, EvaluationItem
from models.datasets.sample import Sample, parse_sample
from models.datasets.scenes import iter_scenes
from models.generation.page import render_page


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    kinds = {}
    for scene in iter_scenes(120, split="val", mix={"caption": 0.4, "video": 0.4, "audio": 0.2}):
        kinds.setdefault(scene.kind, parse_sample({"__key__": scene.key, **scene.members()}))
    return list(kinds.values())


def evaluation(samples: list[Sample], answer: str) -> Evaluation:
    items = tuple(
        EvaluationItem(
            key=f"{sample.key}#1", question="What <b>is</b> it?", truth="A red bar.", answer=answer, kind="caption",
            media=tuple(medium.kind for medium in sample.media), is_exact=False, token_f1=0.5, num_new_tokens=3,
            is_finished=False,
        )
        for sample in samples
    )  # fmt: skip
    return Evaluation(
        checkpoint="/somewhere/private/site/checkpoints/tiny", checkpoint_fingerprint="0", family="qwen3_vl",
        engine="transformers", dataset="/somewhere/private/site/datasets/scenes", split="val", blank_images=False,
        max_new_tokens=8, temperature=0.0, seed=0, items=items,
    )  # fmt: skip


def test_page_stands_alone_and_shows_every_medium(samples: list[Sample]) -> None:
    columns = {"Before": evaluation(samples, "x"), "After": evaluation(samples, "A <script>")}
    html = render_page(columns, samples, title="T & T", gates=[{"status": "fail", "summary": "too few"}])
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html.count("data:image/") == 2
    assert html.count("data:audio/wav") == 1
    assert "A &lt;script&gt;" in html
    assert "What &lt;b&gt;is" in html
    assert "T &amp; T" in html
    assert "too few" in html


def test_page_names_no_folder_of_the_machine(samples: list[Sample]) -> None:
    html = render_page({"Before": evaluation(samples, "x")}, samples, title="T")
    assert "private" not in html
    assert "site/checkpoints/tiny" in html


def test_page_refuses_columns_of_different_questions(samples: list[Sample]) -> None:
    with pytest.raises(DataError, match="same questions"):
        render_page(
            {"Before": evaluation(samples, "x"), "After": evaluation(samples[:1], "x")}, samples, title="T"
        )


def test_page_says_how_many_rows_it_leaves_out(samples: list[Sample]) -> None:
    html = render_page({"Before": evaluation(samples, "x")}, samples, title="T", max_rows=1)
    assert f"The first 1 of {len(samples)} questions" in html
