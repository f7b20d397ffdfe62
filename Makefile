# What is done with this project from a shell: `make help` lists it. GNU make 3.81 (macOS) or later.
# Settings may be given here, too: `make run LOG_LEVEL=DEBUG`. PYTHON=... chooses the interpreter for .venv.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test bench soak fuzz docs lock audit clean compiler browser tesseract test-clients test-docker

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
# Written when an installation has succeeded, so that a failed one is tried again.
INSTALLED := $(VENV)/.requirements-installed
INSTALLED_FOR_TESTS := $(VENV)/.requirements-dev-installed
# Written when the measures' machine code is in Numba's cache, so that no start of the server waits for the compiler.
COMPILED := $(VENV)/.measures-compiled
# What benchmarks compare with: the server that llama-cpp-python brings, whose requirements are not ours.
PEER_VENV := .venv-peer
PEER_INSTALLED := $(PEER_VENV)/.installed
AUDIT_VENV := .venv-audit
AUDITOR := pip-audit==2.10.1
# Each is explained in docs/security.md. What else is found is a failure.
EXPLAINED_FINDINGS := CVE-2025-69872 CVE-2025-50817
# Client libraries that are tried against the server; what they need is not ours either.
CLIENTS_VENV := .venv-clients
CLIENTS_INSTALLED := $(CLIENTS_VENV)/.installed
CLIENTS_NODE := $(CLIENTS_VENV)/node
CLIENTS_NODE_INSTALLED := $(CLIENTS_NODE)/.installed

# The versions are pinned and tested with 3.11, so that one is looked for first.
PYTHON_CANDIDATES := python3.11 python3.12 python3.13 python3 python3.14
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check --no-input
PIP_COMPILE := $(VENV_PYTHON) -m piptools compile --quiet --strip-extras --allow-unsafe --generate-hashes \
	--annotation-style=line \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options
LOCK_OPTIONS :=
PYTEST_OPTIONS :=
# Every folder of tests is in one of the two.
TESTS_WITH_SERVERS := tests/integration tests/e2e tests/clients
TESTS_WITHOUT_SERVERS := tests/unit tests/api tests/contracts tests/fuzz tests/golden
# Run a second time, on the newest SQLite instead of Python's, where there is a wheel of it.
TESTS_OF_SQLITE := tests/unit/test_full_text.py tests/unit/test_store.py tests/unit/test_collections.py \
	tests/unit/test_migrations.py tests/unit/test_write_queue.py tests/unit/test_erasure.py \
	tests/integration/test_upgrade.py tests/api/test_collections_and_deletions.py

help:
	@echo 'make run          make the environment, install what is needed, serve in the foreground'
	@echo 'make test         every check and every test'
	@echo 'make test-clients try many client libraries against a live server, in an environment of their own (needs npm)'
	@echo 'make bench        measure this machine (CRANFIELD=DIRECTORY of that collection also measures retrieval)'
	@echo 'make soak         half an hour of mixed load: nothing may fail, grow or slow down'
	@echo 'make fuzz         ten minutes of requests that nobody means, then readers on any input'
	@echo 'make docs         remake the tables of README.md, .env and docs/openapi.json from the code'
	@echo 'make lock         remake requirements.txt and requirements-dev.txt from their .in files'
	@echo '                  (LOCK_OPTIONS=--upgrade also takes newer versions of what they need)'
	@echo 'make audit        ask the public list of vulnerabilities about the requirements (network)'
	@echo 'make test-docker  run the steps of the Dockerfile in a clean Debian root (root, debootstrap, 15 minutes)'
	@echo 'make clean        remove the environment and caches; database, models and logs stay'

run: $(INSTALLED) $(COMPILED)
	@exec $(VENV_PYTHON) llama_embeddings_server.py

test: $(INSTALLED_FOR_TESTS) browser tesseract
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	@echo 'Two runs side by side; what needs no server comes second on the cores, and is shown at the end.'
	@nice -n 10 $(VENV_PYTHON) -m pytest $(PYTEST_OPTIONS) $(TESTS_WITHOUT_SERVERS) >$(VENV)/tests-without-servers.log 2>&1 & \
	background=$$!; \
	$(VENV_PYTHON) -m pytest $(PYTEST_OPTIONS) $(TESTS_WITH_SERVERS); with_servers=$$?; \
	wait $$background; without_servers=$$?; \
	cat $(VENV)/tests-without-servers.log; \
	[ $$with_servers = 0 ] && [ $$without_servers = 0 ]
	@if $(VENV_PYTHON) -c 'import pysqlite3' 2>/dev/null; then \
		echo 'Once more on the newest SQLite.'; \
		SQLITE_OF_TESTS=newest $(VENV_PYTHON) -m pytest $(PYTEST_OPTIONS) $(TESTS_OF_SQLITE); \
	fi

bench: $(INSTALLED_FOR_TESTS) $(PEER_INSTALLED)
	$(VENV_PYTHON) -m benchmarks.engine
	$(VENV_PYTHON) -m benchmarks.store cached request
	$(VENV_PYTHON) -m benchmarks.search
	$(if $(CRANFIELD),$(VENV_PYTHON) -m benchmarks.cranfield $(CRANFIELD))

SOAK_OPTIONS :=
soak: $(INSTALLED_FOR_TESTS)
	$(VENV_PYTHON) -m benchmarks.soak $(SOAK_OPTIONS)

FUZZ_OPTIONS :=
fuzz: $(INSTALLED_FOR_TESTS)
	$(VENV_PYTHON) -m tests.fuzz $(FUZZ_OPTIONS)

docs: $(INSTALLED)
	$(VENV_PYTHON) docs/remake_tables.py

test-clients: $(INSTALLED_FOR_TESTS) $(CLIENTS_INSTALLED) $(CLIENTS_NODE_INSTALLED)
	CLIENTS_PYTHON=$(abspath $(CLIENTS_VENV)/bin/python) NODE_DIRECTORY=$(abspath $(CLIENTS_NODE)) \
		$(VENV_PYTHON) -m tests.clients.run_heavy_clients

test-docker: $(INSTALLED_FOR_TESTS)
	$(VENV_PYTHON) tests/integration/dockerfile_in_chroot.py

# The header of the made files names this command. The clients are pinned without digests: some ask for another with an
# extra, which is stripped here, and pip takes digests only where the extra stands, too.
lock: export CUSTOM_COMPILE_COMMAND := make lock
lock: $(VENV_PYTHON)
	$(PIP_INSTALL) --quiet "$$(grep '^pip-tools==' requirements-dev.in)"
	$(PIP_COMPILE) $(LOCK_OPTIONS) --output-file requirements.txt requirements.in
	$(PIP_COMPILE) $(LOCK_OPTIONS) --output-file requirements-dev.txt requirements-dev.in
	$(filter-out --generate-hashes,$(PIP_COMPILE)) $(LOCK_OPTIONS) --output-file requirements-clients.txt requirements-clients.in

# In an environment of its own, so that nothing of it gets into the server's. With --strict, a package that cannot be
# asked about is a failure: no answer is not a clean bill.
audit: $(VENV_PYTHON)
	$(VENV_PYTHON) -m venv --clear $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --disable-pip-version-check --no-input --quiet $(AUDITOR)
	for requirements in requirements.txt requirements-dev.txt; do \
		$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip $(EXPLAINED_FINDINGS:%=--ignore-vuln %) \
			--requirement "$$requirements" || exit 1; \
	done

clean:
	rm -rf $(VENV) $(PEER_VENV) $(AUDIT_VENV) $(CLIENTS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV_PYTHON): | compiler
	@found=; without_venv=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",$(PYTHON_CANDIDATES)); do \
		"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		if "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then found=$$candidate; break; fi; \
		without_venv=$$candidate; \
	done; \
	if [ -z "$$found" ] && [ -n "$$without_venv" ]; then \
		echo "$$without_venv has no venv module: install it (Debian and Ubuntu: apt install python3-venv) and start again." >&2; \
		exit 1; \
	elif [ -z "$$found" ]; then \
		echo "Python 3.11 or later is needed and was not found$(if $(PYTHON), at $(PYTHON)): install it, or name it with make PYTHON=/path/to/python3." >&2; \
		exit 1; \
	fi; \
	echo "Making $(VENV) with $$found"; \
	"$$found" -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

$(INSTALLED): requirements.txt $(VENV_PYTHON) | compiler
	@echo 'Installing requirements.txt; the first time llama.cpp is built, this takes some minutes, once.'
	$(PIP_INSTALL) --require-hashes -r requirements.txt
	@touch $@

# The server compiles what is missing, too, so a failure here is no reason not to start it.
$(COMPILED): similarity_measures.py $(INSTALLED)
	@echo 'Compiling the similarity measures; this takes some 15 seconds, once.'
	-@$(VENV_PYTHON) -c 'import similarity_measures; similarity_measures.warm_up()' && touch $@

$(INSTALLED_FOR_TESTS): requirements-dev.txt $(INSTALLED)
	$(PIP_INSTALL) --require-hashes -r requirements-dev.txt
	@touch $@

$(PEER_INSTALLED): requirements.txt $(INSTALLED)
	$(VENV_PYTHON) -m venv --clear $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --disable-pip-version-check --no-input \
		"$$(sed -n 's/^llama-cpp-python==\([^ ;]*\).*/llama-cpp-python[server]==\1/p' requirements.txt)"
	@touch $@

$(CLIENTS_INSTALLED): requirements-clients.txt $(INSTALLED)
	@echo 'Installing requirements-clients.txt: about 1 GB on disk.'
	$(VENV_PYTHON) -m venv --clear $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip install --disable-pip-version-check --no-input -r requirements-clients.txt
	@touch $@

$(CLIENTS_NODE_INSTALLED): tests/clients/package.json tests/clients/package-lock.json $(CLIENTS_INSTALLED)
	@command -v node >/dev/null && command -v npm >/dev/null || { \
		echo 'node and npm are needed for the Node client: install both (Debian: apt install nodejs npm) and start again.' >&2; \
		exit 1; \
	}
	mkdir -p $(CLIENTS_NODE)
	cp tests/clients/package.json tests/clients/package-lock.json $(CLIENTS_NODE)
	cd $(CLIENTS_NODE) && npm ci --no-audit --no-fund
	@touch $@

# Only llama-cpp-python is compiled; where its pinned version is installed, no compiler is needed.
compiler:
	@version=$$(sed -n 's/^llama-cpp-python==\([^ ;]*\).*/\1/p' requirements.txt 2>/dev/null); \
	ls -d $(VENV)/lib/python3.*/site-packages/llama_cpp_python-"$$version".dist-info >/dev/null 2>&1 && exit 0; \
	for compiler in $${CXX:-c++} g++ clang++; do \
		"$$compiler" --version >/dev/null 2>&1 && exit 0; \
	done; \
	echo 'A C++ compiler is needed to build llama.cpp and was not found: install one (Debian and Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) and start again.' >&2; \
	exit 1

# Swagger UI is tested in a real browser.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0; \
	administrator=; \
	[ "$$(id -u)" = 0 ] || administrator='sudo -n'; \
	if ! command -v apt-get >/dev/null || ! $$administrator true 2>/dev/null; then \
		echo 'The tests need chromium and chromedriver: install both (Debian: apt install chromium chromium-driver) and start again.' >&2; \
		exit 1; \
	fi; \
	echo 'Installing chromium and chromium-driver for the tests'; \
	$$administrator apt-get update --quiet && \
	$$administrator env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends chromium chromium-driver

# OCR is tested on a real scan.
tesseract:
	@command -v tesseract >/dev/null && tesseract --list-langs 2>/dev/null | grep -qx eng && exit 0; \
	administrator=; \
	[ "$$(id -u)" = 0 ] || administrator='sudo -n'; \
	if ! command -v apt-get >/dev/null || ! $$administrator true 2>/dev/null; then \
		echo 'The tests need tesseract with English: install it (Debian: apt install tesseract-ocr) and start again.' >&2; \
		exit 1; \
	fi; \
	echo 'Installing tesseract-ocr for the tests'; \
	$$administrator apt-get update --quiet && \
	$$administrator env DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends tesseract-ocr
