# make demo: the main job on synthetic data; make test: every check. Both set themselves up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test lint check-wheel check-lean bench clean

help:
	@echo "make demo         train, export, certify, evaluate, bench and predict on synthetic data"
	@echo "make test         lint, types, import rules and the whole suite"
	@echo "make lint         ruff, mypy and the import rules alone"
	@echo "make check-wheel  build the wheel, install it in a clean environment, test it there"
	@echo "make check-lean   install what a server needs, without torch, and run the deploy side there"
	@echo "make bench        run the benchmarks behind the figures in README.md"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,all,dev,interop]'
	-$(call bindings,10,10.16.1.11)
	-$(call bindings,11,11.4.0.106)
	touch $@

# Bindings of TensorRT (1 MB each) without its libraries, beside the environment's packages: a test
# holds our code against their names. Where they can't be fetched, it is skipped and says so.
bindings = $(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/tensorrt$(1) \
	tensorrt_cu13_bindings==$(2)

demo: $(READY)
	$(BIN)/srdeploy demo --out demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests' networks are tiny: one thread each, and as many workers as there are cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup --no-loadscope-reorder

check-wheel: $(READY)
	rm -rf dist .venv-wheel
	$(BIN)/python -m build --wheel --quiet
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt "$$(ls dist/*.whl)[cpu,all,dev]"
	.venv-wheel/bin/python -P -c "import srdeploy; assert 'site-packages' in srdeploy.__file__, srdeploy.__file__"
	PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 .venv-wheel/bin/pytest -o pythonpath= -m wheel -n auto --dist loadgroup

# What a deployment machine installs. --no-compile: bytecode is written where a module is first used.
check-lean: $(READY)
	rm -rf dist-lean .venv-lean
	$(BIN)/python -m build --wheel --quiet --outdir dist-lean
	$(PYTHON) -m venv .venv-lean
	.venv-lean/bin/python -m pip install --quiet --no-compile --constraint constraints.txt \
		"$$(ls dist-lean/*.whl)[cpu,serve,bench]"
	PATH="$(CURDIR)/$(BIN):$$PATH" SRDEPLOY_LEAN="$(CURDIR)/.venv-lean/bin/srdeploy" OMP_NUM_THREADS=1 \
		$(BIN)/pytest tests/test_lean.py

# make bench CAMVID=folder MOBILENET=file.safetensors also repeats what needs data and weights.
CAMVID ?=
MOBILENET ?=
SCRIPT := $(BIN)/python benchmarks
bench: $(READY)
	mkdir -p bench
	$(SCRIPT)/power.py --out bench/power.json
	$(SCRIPT)/step_cost.py --out bench/step-cost.json
	$(SCRIPT)/step_cost.py deeplabv2-resnet50 --size 321x321 --rounds 10 --out bench/step-cost-resnet50.json
	$(SCRIPT)/verdicts.py --out bench/verdicts.json
ifneq ($(CAMVID),)
	$(SCRIPT)/camvid.py $(CAMVID) --pretrained $(MOBILENET) --runs bench/runs --deploy bench/deploy \
		--report bench/camvid --out bench/camvid.json
	$(SCRIPT)/one_convolution.py bench/deploy/camvid-baseline backbone.features.1 \
		--out bench/one-convolution.json
	$(SCRIPT)/precisions.py bench/runs/camvid-baseline --data $(CAMVID) --out bench/precisions.json
	$(SCRIPT)/serving.py bench/deploy/camvid-baseline --photos $(CAMVID)/images/test \
		--out bench/serving.json
	$(SCRIPT)/overload.py bench/deploy/camvid-baseline --photos $(CAMVID)/images/test \
		--out bench/overload.json
	$(SCRIPT)/folders.py bench/deploy/camvid-baseline --photos $(CAMVID)/images/test --count 233 \
		--rounds 3 --out bench/folders.json
	$(SCRIPT)/folder_soak.py bench/deploy/camvid-baseline --photos $(CAMVID)/images/test \
		--shrink 3 --out bench/folder-soak.json
else
	@echo "CamVid's figures were NOT repeated: give CAMVID=folder and MOBILENET=file.safetensors"
endif

clean:
	rm -rf $(VENV) .venv-wheel .venv-lean build dist dist-lean *.egg-info
