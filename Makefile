# Every target makes what it needs; `make test` on a clean clone needs nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup lint test demo smollm2

setup: ## make .venv with everything that CPU needs
	@PYTHON="$(PYTHON)" bash tools/setup.sh

lint: setup ## style, types, and imports that point down only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## everything that CI runs
	@bash tools/slurm.sh
	@bash tools/test.sh

smollm2: setup ## a real pretrained model: its logits against transformers, then two REINFORCE++ steps
	test -f models/smollm2/config.json || $(BIN)/python examples/make_smollm2.py --out models/smollm2
	$(BIN)/python -m checkpoint_tools.compare models/smollm2 --logits
	$(BIN)/python -m checkpoint_tools.compare models/smollm2 --logits --pipeline 2
	$(BIN)/python -m checkpoint_tools.compare models/smollm2 --logits --tensor 3
	test ! -e runs/smollm2 || mv runs/smollm2 runs/smollm2-until-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/rpp train examples/smollm2_135m.toml

demo: setup ## warm start and REINFORCE++ on this machine's CPU, with a live SGLang server; writes runs/demo
	test ! -e runs/demo || mv runs/demo runs/demo-until-$$(date +%Y%m%d-%H%M%S)
	$(BIN)/python examples/make_demo.py --out runs/demo/start
	$(BIN)/rpp sft examples/demo_cpu.toml
	$(BIN)/rpp train examples/demo_cpu.toml
	$(BIN)/rpp report runs/demo
