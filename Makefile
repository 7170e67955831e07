# `make` lists what there is. Everything runs in .venv, under the versions of requirements.lock.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# A network of its own, where that is allowed: Ray listens on the machine's address whatever it is told.
ifeq ($(shell unshare -n true 2>/dev/null && echo yes),yes)
ALONE := unshare -n sh -c 'ip link set lo up && exec "$$@"' alone
endif
COMPOSE ?= docker compose
# Python compiles what is imported when it is, and keeps that: torch has thousands of modules that nobody imports.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --progress-bar on -c requirements.lock

.PHONY: help run test test-long test-clients test-studio test-containers up down wheel chart bench lint format protos typescript studio lock clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: .venv/.run ## Serve on this machine, with two example tenants
	@$(BIN)/backpack run

test: .venv/.dev ## Run the tests but for the slow ones, types and style included
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile

test-long: .venv/.dev ## The slow ones too
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-clients: .venv/.dev .venv-clients/.installed ## Other people's clients of HTTP (1.3 GB in .venv-clients): lm-eval, LangChain, LiteLLM, Node
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/http/test_other_clients.py

test-studio: .venv/.dev studio ## The studio in headless Chromium (needs npm and chromium)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/http/test_studio.py tests/http/test_studio_in_chromium.py

up: ## Everything in containers, with docker compose: images, secrets in var/secrets, PostgreSQL, Prometheus, Grafana
	$(COMPOSE) --profile setup build
	@mkdir -p var/secrets
	$(COMPOSE) run --rm --user "$$(id -u):$$(id -g)" secrets
	$(COMPOSE) up --detach --wait || { echo "What a part says of it: $(COMPOSE) logs --tail 20 PART"; exit 1; }
	@echo "gateway $$($(COMPOSE) port gateway 8470), interventions $$($(COMPOSE) port interventions 8471), secrets in var/secrets;" \
		"Grafana http://$$($(COMPOSE) port grafana 3000), as admin with the password in var/secrets/grafana_password"
	@echo "A first tenant, with the backpack that \`pip install .\` brings:" \
		"BACKPACK_ADMIN_KEY=\$$(cat var/secrets/backpack_admin_key) backpack tenant create harbour"

down: ## Stop the containers; their volumes and secrets stay
	$(COMPOSE) down

test-containers: .venv/.dev ## Build the images, bring the compose stack up, use it, kill its parts (needs docker)
	$(BIN)/pytest -s tests/deploy/test_containers.py tests/deploy/test_chart_containers.py

wheel: .venv/bin/python ## Build a wheel into dist/, to install elsewhere
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

chart: .venv/.dev ## Package the Helm chart into dist/, with the table of its values
	$(BIN)/python deploy/chart.py
	$(BIN)/helm package deploy/helm --destination dist

bench: .venv/.dev ## Measure, side by side; results go to tests/bench/results
	$(BIN)/python -m tests.bench.engine
	$(BIN)/python -m tests.bench.decode_step
	$(BIN)/python -m tests.bench.gateway
	$(BIN)/python -m tests.bench.sync
	$(BIN)/python -m tests.bench.interventions
	$(BIN)/python -m tests.bench.compare
	$(BIN)/python -m tests.bench.find
	$(BIN)/python -m tests.bench.over_http
	RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(ALONE) $(BIN)/python -m tests.bench.tax
	RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(ALONE) $(BIN)/python -m tests.bench.tax small

vllm: .venv-vllm/.installed ## Install vLLM into .venv-vllm (2.2 GB), a peer that `make bench` then measures too

llama: .venv-llama/.installed ## Compile llama.cpp into .venv-llama (some minutes), another peer of `make bench`

lint: .venv/.dev ## Style, types and the arrows between packages
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: .venv/.dev ## Format the code
	$(BIN)/ruff check --fix-only . ; $(BIN)/ruff format .

protos: .venv/.dev ## Generate code from the .proto files
	$(BIN)/python -m backpack_proto.generate

studio: ## Build the studio into the package (needs npm)
	cd services/studio && npm ci --no-audit --no-fund && npm run build

typescript: .venv/.dev ## Generate and build the TypeScript client of the .proto files (needs npm)
	cd protos/typescript && npm ci --no-audit --no-fund && PYTHON=$(CURDIR)/$(BIN)/python npm run build

lock: .venv/.dev ## Write requirements.lock anew from what is installed in .venv
	@echo "# The versions that the tests ran with. \`make\` installs under these constraints; \`make lock\` writes them anew." > requirements.lock
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' >> requirements.lock

clean: ## Remove the environments and what running has left behind
	rm -rf .venv .venv-clients .venv-llama .venv-vllm var .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Python's venv is missing: apt install python3-venv"; exit 1; }

# They want other versions of packages than we do. Without npm, the test of OpenAI's client for Node is skipped.
.venv-clients/.installed: tests/http/clients-requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --disable-pip-version-check --progress-bar on -r $<
	! command -v npm > /dev/null || npm install --no-audit --no-fund --prefix .venv-clients/node openai@7.59.0
	@touch $@

# Its torch is another one than ours may be. --no-deps: pip can't be told to leave out the parts that we don't use.
.venv-vllm/.installed: tests/bench/vllm-requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --progress-bar on --no-deps -r $<
	@touch $@

.venv-llama/.installed: tests/bench/llama-requirements.txt
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS=-DGGML_NATIVE=ON .venv-llama/bin/python -m pip install --disable-pip-version-check --progress-bar on --no-deps -r $<
	@touch $@

.venv/.run: .venv/bin/python pyproject.toml requirements.lock
	$(PIP) -e '.[engine]'
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) -e '.[dev]'
	@test -x $(BIN)/helm3 || $(BIN)/python tests/deploy/helm.py $(BIN)/helm || echo "no helm: its tests will be skipped"
	@touch $@
