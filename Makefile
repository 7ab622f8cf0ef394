# `make serve` and `make test` work from a fresh clone with Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= examples/local.yaml

.PHONY: help serve test chaos simulate lint env docs engine-args rules dashboards observe protos chart clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: $(READY) ## build the environment from the lock files

$(READY): lock/cpu.txt lock/test.txt lock/torch-cpu.txt pyproject.toml
	@echo "[env] building $(VENV) from lock/ (a few minutes, once)" >&2
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11, or set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r lock/torch-cpu.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -r lock/cpu.txt -r lock/test.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

serve: $(READY) ## serve $(CONFIG) on this machine until Ctrl-C
	@exec $(BIN)/deepsplit up $(CONFIG)

lint: $(READY) ## ruff, mypy, import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## lint and every test
	$(BIN)/python -m pytest

chaos: $(READY) ## faults of all kinds under streams, TIMES of each; fails if one request does
	$(BIN)/python -m benchmarks.failover --times $(or $(TIMES),10) --check

simulate: $(READY) ## the expert plane on a virtual clock and network: SEEDS of them, from FROM on
	$(BIN)/python -m tests.simulation --seeds $(or $(SEEDS),1000) --from $(or $(FROM),0)

docs: $(READY) ## regenerate docs/configuration.md and docs/metrics.md
	$(BIN)/python -m cluster.config.reference > docs/configuration.md
	$(BIN)/python -m monitoring.catalogue > docs/metrics.md

engine-args: $(READY) ## regenerate the list of vLLM's arguments after a change of its version
	$(BIN)/python -m deployments.attention.engine_argument_list

rules: $(READY) ## regenerate the alerting rules; RUNBOOKS=URL of docs/runbooks where you serve it
	$(BIN)/python -m monitoring.alerts $(if $(RUNBOOKS),--runbooks $(RUNBOOKS)) > monitoring/rules/deepsplit.yaml

dashboards: $(READY) ## regenerate the dashboards; RUNBOOKS as above
	$(BIN)/python -m monitoring.boards monitoring/dashboards $(if $(RUNBOOKS),--runbooks $(RUNBOOKS))

observe: $(READY) ## Prometheus on the running cluster; OBSERVE_KEY_FILE, OBSERVE_CA_FILE, OBSERVE_PORT if needed
	@exec $(BIN)/python -m monitoring.observe $(if $(OBSERVE_KEY_FILE),--key-file $(OBSERVE_KEY_FILE)) \
		$(if $(OBSERVE_CA_FILE),--ca-file $(OBSERVE_CA_FILE)) $(if $(OBSERVE_PORT),--port $(OBSERVE_PORT))

protos: $(READY) ## regenerate the gRPC stubs from deployments/protos
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		$$(find deployments/protos -name '*.proto')

chart: $(READY) ## regenerate the chart's schema, README and copies, check it, package it into dist/
	$(BIN)/python helm/generate.py
	$(BIN)/helm lint --strict helm/deepsplit
	$(BIN)/helm package helm/deepsplit --destination dist

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
