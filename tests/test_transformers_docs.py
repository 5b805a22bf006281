"""``docs/transformers.md``: its table is that of the models the tests hold to eager attention.

Its code is run by ``test_docs_code.py``.
"""

from __future__ import annotations

from pathlib import Path

from transformers_models import table

PAGE = Path(__file__).parents[1].joinpath("docs", "transformers.md").read_text()


def test_the_table_is_of_what_is_tested() -> None:
    assert table() in PAGE, "docs/transformers.md: put in what `python tests/transformers_models.py` prints"
