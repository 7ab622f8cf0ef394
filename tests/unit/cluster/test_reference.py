from pathlib import Path

from cluster.reference import reference

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: python -m cluster.reference > docs/configuration.md"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
