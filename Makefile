# Two targets are enough to set everything up: `make serve` and `make test`. All files land in .venv.
PYTHON ?= python3
TORCH ?= auto
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install serve test unit lint wheels format types protos tools manifests figures pictures \
	verify-models verify-serving verify-scheduling verify-training verify-language \
	verify-generation verify-elastic verify-kernels verify-operations verify-gateway verify-peers \
	verify-language-peers verify-faults verify-lifecycle verify-stops verify-own-models \
	verify-own-networks verify-clients soak clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 20

install: $(VENV)/.installed ## create .venv with everything in it

$(VENV)/.installed: pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) sh scripts/install.sh
	@touch $@

serve: install ## the embedded model on 127.0.0.1:8001, its page on :8081; Ctrl-C stops both
	@exec $(BIN)/ladderstitch serve

test: install tools lint types ## everything that CI runs, from nothing
	$(BIN)/buf lint
	$(BIN)/python scripts/protos.py --check
	$(BIN)/pytest -n 2 --dist loadfile tests

unit: install ## tests within one process, in about a minute
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/system tests

lint: install ## formatting, lint, boundaries between packages, English
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_prose.py

wheels: install ## the wheels of the server and of the client, in dist/
	$(BIN)/pip wheel -q --no-deps -w dist . ./clients/python

format: install ## apply formatting and safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install ## mypy, strict
	$(BIN)/mypy

protos: install ## regenerate the committed stubs
	$(BIN)/python scripts/protos.py

tools: install ## helm, kubectl, promtool and others into .venv/tools; tests that lack one are skipped
	@VENV=$(VENV) sh scripts/tools.sh

manifests: tools ## render deploy/chart into deploy/kustomize, the dashboard, examples/serve.yaml
	$(BIN)/python scripts/chart_schema.py
	$(BIN)/python scripts/manifests.py
	$(BIN)/python scripts/dashboard.py
	$(BIN)/python scripts/example_config.py

figures: install ## draw the figures of docs/concepts.md
	$(BIN)/python scripts/concept_figures.py

pictures: install ## take the pictures of the page in the docs; needs Chromium
	$(BIN)/python scripts/page_pictures.py

verify-models: install ## every golden case, those in LADDERSTITCH_GOLDEN too; memory of 71 stitches
	$(BIN)/ladderstitch verify $(wildcard tests/golden/*.safetensors) $(wildcard $(LADDERSTITCH_GOLDEN)/*.safetensors)
	$(BIN)/pytest -q tests/vision/models tests/importers
	$(BIN)/pytest -q -s -m slow tests/importers/test_vision_anchors.py
	$(BIN)/ladderstitch-loadtest memory --out loadtest/results
	$(BIN)/ladderstitch-loadtest real-sizes --out loadtest/results

verify-serving: install ## about 12 minutes: overhead, switching, mixed budgets, families, 10,000 malformed requests
	$(BIN)/ladderstitch-loadtest overhead --out loadtest/results
	$(BIN)/ladderstitch-loadtest switching --out loadtest/results
	$(BIN)/ladderstitch-loadtest mixed --out loadtest/results
	$(BIN)/ladderstitch-loadtest families --out loadtest/results
	$(BIN)/ladderstitch-loadtest malformed --out loadtest/results

verify-scheduling: install ## about 10 minutes a line on two idle cores: policies, oracle, simulator against server, burst
	$(BIN)/ladderstitch-loadtest compare --out loadtest/results
	$(BIN)/ladderstitch-loadtest compare --family supernet --grid short --seeds 10 --out loadtest/results
	$(BIN)/ladderstitch-loadtest blocks --out loadtest/results
	$(BIN)/ladderstitch-loadtest decisions --out loadtest/results
	$(BIN)/ladderstitch-loadtest agree --out loadtest/results
	$(BIN)/ladderstitch-loadtest burst --out loadtest/results

verify-training: install ## about 5 minutes: measure the embedded model's quality again and compare
	$(BIN)/ladderstitch fetch fashion-mnist --into data/fashion-mnist
	$(BIN)/python scripts/verify_quality.py --data data/fashion-mnist

verify-language: install ## about 8 minutes: SmolLM2 and transformers; communication hidden on slow links
	$(BIN)/ladderstitch fetch smollm2
	$(BIN)/ladderstitch fetch brown --into data/brown
	$(BIN)/ladderstitch-loadtest smollm2 --text data/brown/heldout.txt --out loadtest/results
	$(BIN)/ladderstitch-loadtest overlap --out loadtest/results
	$(BIN)/ladderstitch-loadtest overlap --link tcp --out loadtest/results

verify-generation: install ## about 10 minutes: streams under token budgets, prefixes, paths, 10,000 malformed requests
	$(BIN)/ladderstitch fetch smollm2
	$(BIN)/ladderstitch fetch smollm2-ladder
	$(BIN)/ladderstitch fetch brown --into data/brown
	$(BIN)/ladderstitch-loadtest generation --text data/brown/heldout.txt --ladder-model smollm2-ladder --out loadtest/results
	$(BIN)/ladderstitch-loadtest malformed --text --out loadtest/results

verify-elastic: install ## about 10 minutes: changes of the stitch within answers, their cost, error and value; overlap
	$(BIN)/ladderstitch fetch brown --into data/brown
	$(BIN)/ladderstitch frontier elastic-text
	$(BIN)/ladderstitch-loadtest elastic --model elastic-text --text data/brown/heldout.txt --out loadtest/results
	$(BIN)/ladderstitch-loadtest overlap --front-width 1024 --latency 1ms --out loadtest/results

verify-kernels: install ## about 3 minutes: long ladders, machine code for three GPUs; check and bench if there is a GPU
	$(BIN)/pytest -q -m slow tests/system/kernels
	$(BIN)/python -m ladderstitch_kernels.compiled --target sm_80 --target sm_90 --target sm_100
	$(BIN)/python -m ladderstitch_kernels.check
	$(BIN)/python -m ladderstitch_kernels.bench --out kernels/results

verify-operations: install ## about 5 minutes: scaling and a rolling update under load
	$(BIN)/python scripts/verify_operations.py
	LADDERSTITCH_PANELS=loadtest/results/panels.png $(BIN)/pytest -q tests/system/deploy/test_monitoring.py

verify-gateway: install ## about 4 minutes: latency added by the gateway; kill -9 of replicas and gateways
	$(BIN)/ladderstitch-loadtest hop --out loadtest/results
	$(BIN)/ladderstitch-loadtest kills --no-ray --out loadtest/results
	$(BIN)/ladderstitch-loadtest kills --ray --out loadtest/results

verify-faults: install ## about 9 minutes: 100,000 mutated requests of all protocols next to 8 good callers
	$(BIN)/ladderstitch-loadtest fuzz --requests 100000 --seed 1 --out loadtest/results

verify-lifecycle: install ## about 10 minutes: 300 loads of models, a third given up; restarts of killed and hung servers
	$(BIN)/ladderstitch-loadtest loads --out loadtest/results
	$(BIN)/ladderstitch-loadtest restarts --out loadtest/results

verify-stops: install ## about 6 minutes: workers and ranks killed and stopped at random moments under load
	$(BIN)/ladderstitch-loadtest stops --out loadtest/results

verify-language-peers: install ## about 5 minutes: SmolLM2 with 4 bits behind llama.cpp and here
	$(BIN)/ladderstitch fetch smollm2
	$(BIN)/ladderstitch fetch brown --into data/brown
	$(BIN)/ladderstitch quantize smollm2 --text data/brown/heldout.txt
	$(BIN)/ladderstitch-loadtest language-peers --out loadtest/results

verify-peers: install ## about 5 minutes: one network behind NVIDIA Triton, here, and a bare echo; where the time goes
	$(BIN)/ladderstitch-loadtest peers --out loadtest/results
	$(BIN)/ladderstitch-loadtest breakdown --out loadtest/results

verify-own-models: install ## about 4 minutes: folders of transformers 4.57 and 5.23, adapters of PEFT; the first steps with own files
	$(BIN)/python scripts/verify_own_models.py --out loadtest/results
	$(BIN)/ladderstitch fetch efficientnet-lite
	$(BIN)/ladderstitch-loadtest first-steps --out loadtest/results

verify-own-networks: install ## about 6 minutes: 13 architectures of transformers, timm, torchvision exported, stitched, served
	$(BIN)/ladderstitch-loadtest own-networks --out loadtest/results

verify-clients: install ## about 8 minutes: clients of other projects, each unmodified in an environment of its own
	$(BIN)/python scripts/clients/run.py --out loadtest/results --page docs/clients.md

soak: install ## one hour of mixed load with cancels, bad input and restarted replicas
	$(BIN)/ladderstitch-loadtest soak --out loadtest/results

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
