from deployments.attention.engine_argument_list import PATH, listing


def test_the_list_is_that_of_the_installed_vllm() -> None:
    assert PATH.read_text(encoding="utf-8") == listing(), "vLLM's arguments have changed; run: make engine-args"
