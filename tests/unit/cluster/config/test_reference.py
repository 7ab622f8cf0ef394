from pathlib import Path

from cluster.config.reference import reference

PAGE = Path(__file__).parents[4] / "docs" / "configuration.md"


def test_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: make docs"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []
