# make reproduce   the environment, then the tables and figures of PROFILE (default: digits)
# make test        the environment, then every test but the slow ones, WORKERS at a time (default: 2)
# make test-slow   what needs depth
# make bench       speed, printed as ratios
# make readme      README.md from nbs/index.ipynb
# make clean       delete what was computed (runs/), not the artefacts

PYTHON  ?= python3
PROFILE ?= digits
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready

.PHONY: reproduce test test-slow bench readme notebooks clean

reproduce: $(READY)
	$(BIN)/ddkit reproduce --profile $(PROFILE)

# every process computes with one thread, so that WORKERS of them do not get into each other's way
test test-slow: export OMP_NUM_THREADS ?= 1

test: $(READY)
	$(BIN)/nbdev-test --n-workers $(WORKERS) --timing nbs
	$(BIN)/python -m pytest -q --durations 10 tests/test_engine.py  # alone: it interrupts and kills runs at certain moments
	$(BIN)/python -m pytest -q --durations 10 -n $(WORKERS) --dist loadfile --ignore tests/test_engine.py tests

test-slow: $(READY)
	for notebook in $$(grep -l '"#| slow' nbs/*.ipynb); do $(BIN)/nbdev-test --flags slow $$notebook || exit 1; done
	$(BIN)/python -m pytest -q --durations 10 -n $(WORKERS) --dist loadfile -m slow tests

bench: $(READY)
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

# after editing a notebook: export the library, strip noise, rebuild the README
notebooks: $(READY)
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean
	$(BIN)/python workflow/readme.py

readme: $(READY)
	$(BIN)/python workflow/readme.py

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf runs
