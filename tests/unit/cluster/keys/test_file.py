"""The keys file: every problem with its line and fix, and never a key in a message."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from cluster.keys.api_keys import key_hash
from cluster.keys.file import load_keys

A, B = key_hash("a"), key_hash("b")


def write(folder: Path, text: str) -> Path:
    path = folder / "keys.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_keys(write(folder, text))
    return str(caught.value).splitlines()[1:]


def test_reads_a_file(tmp_path: Path) -> None:
    text = f"""\
tenants:
  - name: search
    keys: [{A}, {B}]
    weight: 2
    classes: [system, batch]
    requests_per_minute: 600
    tokens_per_minute: 200000
    max_streams: 8
    models: [demo]
  - name: closed
    keys: []
"""
    search, closed = load_keys(write(tmp_path, text)).tenants
    assert search.keys == (A, B)
    assert (search.weight, search.requests_per_minute, search.tokens_per_minute) == (2.0, 600, 200000)
    assert (search.max_streams, search.models, search.default()) == (8, ("demo",), "system")
    assert (closed.keys, closed.classes, closed.default()) == ((), ("interactive", "batch"), "interactive")


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = f"""\
tenants:
  - name: search engine
    keys: [{A}]
    weigth: 2
  - keys: [{B}]
    max_streams: 0
    requests_per_minute: "600"
  - name: c
    keys: {A}
    classes: [urgent]
tenant: 3
"""
    assert problems(tmp_path, text) == [
        "  line 2: tenants[0].name: must be 1 to 63 letters, digits, `.`, `_` or `-`, for use in metrics",
        "  line 4: tenants[0].weigth: unknown key; did you mean tenants[0].weight?",
        "  line 5: tenants[1].name: missing; it must be set",
        "  line 6: tenants[1].max_streams: must be at least 1, but is 0",
        "  line 7: tenants[1].requests_per_minute: must be a whole number, but is '600'",
        "  line 9: tenants[2].keys: must be a list, such as [a, b]",
        "  line 10: tenants[2].classes[0]: must be one of system, interactive or batch, but is 'urgent'",
        "  line 11: tenant: unknown key; did you mean tenants?",
    ]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("keys: [ds-abc]", "keys[0]: is a key: put its hash here instead, and give out a new key"),
        ("keys: [hunter2]", "keys[0]: must be `sha256:` and 64 lower-case hex digits, as `deepsplit key new` prints"),
        (f"keys: ['{A[:-1]}']", "keys[0]: must be `sha256:` and 64 lower-case hex digits"),
        (f"keys: ['{A.upper()}']", "keys[0]: must be `sha256:` and 64 lower-case hex digits"),
        ("keys: [7]", "keys[0]: must be text"),
        (f"keys: ['{A}', '{A}']", "keys[1]: the same key is also t's: a key stands for one tenant"),
        ("keys: [], default_class: system", "default_class: system is not among the tenant's classes: add it there"),
        ("keys: [], classes: []", "classes: must list at least one"),
        ("keys: [], models: []", "models: must list at least one"),
        ("keys: [], weight: 0", "weight: must be above 0.0, but is 0"),
        ("keys: [], weight: .inf", "weight: must be a finite number, but is inf"),
        ("keys: [], tokens_per_minute: true", "tokens_per_minute: must be a whole number, but is True"),
    ],
)
def test_wording(tmp_path: Path, entry: str, expected: str) -> None:
    (problem,) = problems(tmp_path, f"tenants:\n  - {{name: t, {entry}}}\n")
    assert problem.startswith(f"  line 2: tenants[0].{expected}")


def test_names_and_keys_belong_to_one_tenant(tmp_path: Path) -> None:
    assert problems(tmp_path, f"tenants:\n  - {{name: t, keys: [{A}]}}\n  - {{name: t, keys: [{B}]}}\n") == [
        "  line 3: tenants[1].name: 't' is also the name of tenants[0]: put all keys under one entry"
    ]
    assert problems(tmp_path, f"tenants:\n  - {{name: t, keys: [{A}]}}\n  - name: u\n    keys:\n      - {A}\n") == [
        "  line 5: tenants[1].keys[0]: the same key is also t's: a key stands for one tenant, and is listed once"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"is empty: it needs at least\n  tenants:\n    - name:"),
        ("tenants:\n", r"line 1: tenants: must be a list"),
        ("tenants: []\n", r"line 1: tenants: must list at least one tenant"),
        ("- name: a\n", r":1: expected sections such as `tenants:`, found a list"),
        ("tenants: [\n", r":2:1: not valid YAML"),
    ],
)
def test_not_a_keys_file(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_keys(write(tmp_path, text))


def test_file_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the keys file .*nope.yaml: No such file"):
        load_keys(tmp_path / "nope.yaml")


SECRET = "ds-S3cretS3cretS3cretS3cretS3cretS3cretS3cretS3c"


@pytest.mark.parametrize(
    "text",
    [
        f"tenants:\n  - name: t\n    keys: {SECRET}\n",
        f"tenants:\n  - name: t\n    keys: [{SECRET}]\n",
        f"tenants:\n  - name: t\n    keys: [{{{SECRET}: x}}]\n",
        f"tenants:\n  - name: {SECRET}\n    keys: []\n",
        f"tenants:\n  - {SECRET}: t\n",
        f"tenants: {SECRET}\n",
        f"{SECRET}: t\n",
        f"{SECRET}\n",
        f"tenants:\n  - name: t\n    keys: [*{SECRET}]\n",
        f"tenants:\n  - name: t\n    keys: [!{SECRET} x]\n",
        f"tenants: [{{name: t, keys: [], {SECRET}: 1, {SECRET}: 2}}]\n",
        f"tenants:\n  - name: t\n    keys: [{key_hash(SECRET)}, {key_hash(SECRET)}]\n",
        f"tenants:\n  - name: t\n    keys: []\n    weight: {key_hash(SECRET)}\n",
        "tenants:\n  - name: t\n    keys: [hunter2hunter2, 'tab\there']\n    weight: 0\n",
    ],
)
def test_no_message_or_traceback_shows_a_key_or_a_hash(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_keys(write(tmp_path, text))
    shown = "".join(traceback.format_exception(caught.value)) + str(caught.value)
    for secret in (SECRET, key_hash(SECRET)[7:], "hunter2"):
        assert secret not in shown
