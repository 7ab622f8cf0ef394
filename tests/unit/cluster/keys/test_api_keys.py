from cluster.keys.api_keys import is_key_hash, key_hash, new_key, without_keys


def test_keys_are_new_each_time_and_long() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("ds-") and len(key) == 3 + 43 for key in keys)  # 256 bits in base64


def test_hash_is_sha256_in_hex() -> None:
    assert key_hash("abc") == "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert is_key_hash(key_hash(new_key()))
    assert key_hash("a\udcffb") != key_hash("ab")  # header bytes that are no UTF-8


def test_what_is_no_hash() -> None:
    good = key_hash("x")
    for text in (good[:-1], good + "0", good.upper(), good.replace("sha256", "sha512"), "", good + "\n"):
        assert not is_key_hash(text)


def test_messages_lose_keys_and_hashes() -> None:
    key = new_key()
    assert without_keys(f"a {key} b {key_hash(key)} c {key_hash(key)[7:].upper()} d") == (
        "a (not shown) b sha256:(not shown) c (not shown) d"
    )
    assert without_keys("line 3: tenants[0].name: ds-team") == "line 3: tenants[0].name: ds-team"
