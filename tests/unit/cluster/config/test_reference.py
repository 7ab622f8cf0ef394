from pathlib import Path

from cluster.config.reference import reference

PAGE = Path(__file__).parents[4] / "docs" / "configuration.md"


def test_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), "run: make docs"


def test_every_key_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert [row for row in rows if row.endswith("|  |")] == []


def row(key: str) -> list[str]:
    """The cells of a key's row: type, default and meaning."""
    (line,) = (line for line in reference().splitlines() if line.startswith(f"| `{key}` |"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_section_inside_a_section_has_a_row_and_its_keys_are_required_with_it_only() -> None:
    assert row("attention.autoscaling")[:2] == ["section", "not set"]
    assert row("attention.autoscaling")[2].startswith("Let the load set the number of replicas")
    assert row("attention.autoscaling.max_replicas")[1] == "required with the section"
    assert row("experts.pools")[:2] == ["list of sections", "`[]`"]
    assert row("experts.pools[].name")[1] == "required with the section"
    assert row("internal_tls.key_file")[1] == "required with the section"
    assert row("admission.batch")[1] == "as below"
    assert row("admission.batch.ttft_s")[1] == "`60.0`"
    required = [line for line in reference().splitlines() if "**required**" in line]
    assert [line.split("`")[1] for line in required] == ["model.path"]
