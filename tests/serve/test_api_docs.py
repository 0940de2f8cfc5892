"""docs/api.md is what the code says."""

from __future__ import annotations

from pathlib import Path

from pdray.serve.reference import api_reference

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == api_reference(), "python -m pdray.serve.reference > docs/api.md"
