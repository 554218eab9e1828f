# Every target does all of its own set-up, in .venv/, and redoes it only when settings.ini, setup.py or constraints.txt change.
#   PYTHON=...      the Python to build .venv with (3.11 or newer)
#   TORCH_ARGS=...  more options for installing torch, such as --index-url of the wheels without CUDA
#   PIP_ARGS=...    more options for every installation
#   LAB_ARGS=...    more options for JupyterLab
#   MODEL=...       the base model of `make reproduce`: hub id or folder (default: the embedded one)
#   OUT=...         folder for what `make bench` measures
#   BENCH_ARGS=...  parameters of nbs/07_bench.ipynb, such as -p diffs 64
PYTHON ?= python3.11 python3.12 python3.13 python3 python
TORCH_ARGS ?=
PIP_ARGS ?=
LAB_ARGS ?=
MODEL ?=
OUT ?= runs/bench
BENCH_ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo figures reproduce bench soak licences audit test lab sync check readme

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --progress-bar on $(PIP_ARGS) -c constraints.txt
# Commands run with the environment's own programs first, and its own kernel rather than one in the user's home.
RUN := export PATH="$(CURDIR)/$(VENV)/bin:$$PATH" VIRTUAL_ENV="$(CURDIR)/$(VENV)" JUPYTER_PREFER_ENV_PATH=1;

# What a notebook says while it works, such as how far a training is, is shown at once; through a pipe, since opening /dev/stderr would empty a log file.
PAPERMILL := papermill -k python3 --no-progress-bar --log-level ERROR --stderr-file >(cat >&2)

# An environment does not survive its folder being moved or copied: its programs and its link to dit/ name the old place.
ifeq ($(shell test -f $(VENV)/.home && test "$$(cat $(VENV)/.home)" != "$$(pwd -P)" && echo moved),moved)
.PHONY: $(PY) $(VENV)/.installed
endif

help:
	@echo 'make demo       train fresh weight diffs, ask the DIT adapter what each one hides, draw figures/demo.png (minutes, no GPU)'
	@echo 'make figures    redraw every figure from results/ (no training)'
	@echo 'make reproduce  say how long it will take, then train and evaluate whatever nbs/configs/ names and is not there yet (stop and start it as you like)'
	@echo 'make bench      time training and asking beside what one would run instead, on this machine (about twenty-five minutes on two idle cores)'
	@echo 'make test       check that notebooks are clean and dit/ is in sync, run every notebook and every test'
	@echo 'make soak       the long tests: 20 kills in every stage, a fault at every operation on files, 2,000 diffs, a bank of 100,000 rows'
	@echo 'make licences   write results/licences.csv: the licence of every package that is installed'
	@echo 'make audit      look the pinned packages up among known vulnerabilities, where there is a network'
	@echo 'make lab        open the notebooks in JupyterLab'
	@echo 'make sync       export nbs/ to dit/ and clean the notebooks: do this before you commit'
	@echo 'make readme     build README.md from nbs/index.ipynb'
	@echo 'make check      only the check that `make sync` has nothing left to do'
	@echo 'The first of them to run also makes .venv/ and installs the pinned packages; demo, test and lab fetch two small models.'

# --- set-up ---------------------------------------------------------------------------------------------------------------

$(PY):
	@ok=; for p in $(PYTHON); do \
	  if "$$p" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then ok=$$p; break; fi; \
	done; \
	if [ -z "$$ok" ]; then \
	  echo "No Python 3.11 or newer with the venv module was found (tried: $(PYTHON)). Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "== Set-up 1/5: environment $(VENV)/ with $$("$$ok" --version) ($$ok)"; \
	"$$ok" -m venv --clear $(VENV); \
	pwd -P > $(VENV)/.home

$(VENV)/.installed: settings.ini setup.py constraints.txt | $(PY)
	@echo '== Set-up 2/5: torch'
	$(PIP) $(TORCH_ARGS) torch
	@echo '== Set-up 3/5: the other packages, and dit itself from this folder'
	$(PIP) -e '.[dev]'
	@echo '== Set-up 4/5: a Jupyter kernel of this environment, named python3'
	@$(RUN) $(PY) -m ipykernel install --sys-prefix --name python3 --display-name 'Python 3 (dit)'
	@sed -i.bak 's/"ipykernel_launcher",/"ipykernel_launcher", "--log-level=CRITICAL",/' $(VENV)/share/jupyter/kernels/python3/kernel.json && rm $(VENV)/share/jupyter/kernels/python3/kernel.json.bak # its own warnings are about how Jupyter talks to it, and would look like ours
	@touch $@

$(VENV)/.models: $(VENV)/.installed $(wildcard dit/models.py)
	@echo '== Set-up 5/5: the base model and the model that judges (fetched once, checksums verified)'
	@$(RUN) dit_fetch
	@touch $@

# --- what people run ------------------------------------------------------------------------------------------------------

demo: $(VENV)/.models
	@mkdir -p runs figures
	@echo '== Running nbs/demo.ipynb'
	@$(RUN) IN_TEST=1 $(PAPERMILL) nbs/demo.ipynb runs/demo.ipynb || { \
	  echo 'The demo stopped at an error; runs/demo.ipynb shows the cell.' >&2; exit 1; }
	@echo
	@echo 'Executed notebook: $(CURDIR)/runs/demo.ipynb'
	@echo 'Picture:           $(CURDIR)/figures/demo.png'

figures: $(VENV)/.installed
	@$(RUN) dit_figures
	@echo 'The pictures are in $(CURDIR)/figures/, the executed notebooks with their tables in $(CURDIR)/runs/.'

# A configuration is a file of parameters, in a folder named like its notebook; it is done when its executed notebook is there.
RUNS := runs/reproduce/$(subst /,--,$(or $(MODEL),SmolLM2-135M-Instruct))
reproduce: $(VENV)/.models
	@mkdir -p $(RUNS)
	@$(RUN) todo=(); for f in nbs/configs/*/*.yaml; do made="$(RUNS)/$$(basename "$$(dirname "$$f")")-$$(basename "$$f" .yaml).ipynb"; if [ ! "$$made" -nt "$$f" ]; then todo+=("$$f"); fi; done; \
	if [ $${#todo[@]} -gt 0 ]; then dit_plan "$${todo[@]}" $(if $(MODEL),--model "$(MODEL)"); fi
	@$(RUN) for f in nbs/configs/*/*.yaml; do \
	  book=$$(basename "$$(dirname "$$f")"); name="$$book-$$(basename "$$f" .yaml)"; task=$$(sed -n 's/^task: //p' "$$f"); made="$(RUNS)/$$name.ipynb"; \
	  if [ "$$made" -nt "$$f" ]; then continue; fi; \
	  case "$$book" in 03_tune) more=(-p out "$(CURDIR)/$(RUNS)/$$task");; 04_eval|05_full) more=(-p adapter "$(CURDIR)/$(RUNS)/$$task");; *) more=();; esac; \
	  echo "== $$name ($$(date +%H:%M))"; SECONDS=0; \
	  $(PAPERMILL) "nbs/$$book.ipynb" "$(RUNS)/part.ipynb" -f "$$f" -p model "$(MODEL)" $${more[@]+"$${more[@]}"} || exit 1; \
	  mv "$(RUNS)/part.ipynb" "$$made"; echo "== $$name: finished after $$SECONDS s"; \
	done

bench: $(VENV)/.models
	@mkdir -p runs
	@echo '== Running nbs/07_bench.ipynb; nothing else should run on this machine'
	@$(RUN) IN_TEST=1 $(PAPERMILL) nbs/07_bench.ipynb runs/bench.ipynb -p out "$(OUT)" $(BENCH_ARGS)
	@cat "$$(ls -t "$(OUT)"/*.txt | head -n 1)"
	@echo "The tables are in $(OUT)/, with the machine and the run's parameters as JSON; the executed notebook is runs/bench.ipynb."

test: check $(VENV)/.models
	@mkdir -p runs figures
	@echo '== Notebooks: nbdev_test'
	@$(RUN) nbdev_test --n_workers 1 --timing
	@echo '== Tests: pytest'
	@$(RUN) python -m pytest -q tests

soak: $(VENV)/.models
	@$(RUN) DIT_SOAK=1 python -m pytest -q -s tests/test_robust.py tests/soak.py

licences: $(VENV)/.installed
	@$(RUN) python tests/licences.py results/licences.csv

# In an environment of its own. pip-audit has no offline mode; --strict, since it would call a package clean that its service does not know.
audit: $(VENV)/.installed
	@mkdir -p runs; rm -f runs/audit.txt; test -x $(VENV)/audit/bin/pip-audit || { $(PY) -m venv $(VENV)/audit; $(VENV)/audit/bin/python -m pip install -q $(PIP_ARGS) pip-audit; } || true; \
	if $(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt -o runs/audit.txt 2>runs/audit.log; then echo 'None of the pinned packages has a known vulnerability.'; \
	elif [ -s runs/audit.txt ]; then cat runs/audit.txt; echo 'Raise the named versions in constraints.txt, and run make test.'; exit 1; \
	else tail -n 1 runs/audit.log; echo 'Not audited: the service that knows the vulnerabilities could not be asked about every package (no network?).'; fi

lab: $(VENV)/.models
	@$(RUN) jupyter lab $(LAB_ARGS) nbs

sync: $(VENV)/.installed
	@$(RUN) nbdev_export && nbdev_clean
	@echo 'dit/ is exported from nbs/, and the notebooks are clean.'

# The README is the index notebook, executed: its tables are computed from results/.
readme: $(VENV)/.installed
	@$(RUN) jupyter nbconvert --log-level WARN --execute --no-input --ExecutePreprocessor.kernel_name=python3 --to markdown nbs/index.ipynb --output-dir . --output README
	@sed -i.bak 's#(\.\./figures/#(figures/#' README.md && rm README.md.bak
	@echo 'README.md is built from nbs/index.ipynb.'

# Done on a copy: it works before the first commit, changes nothing, and fails again until `make sync` has been run.
check: $(VENV)/.installed
	@echo '== Check: clean notebooks, dit/ in sync'
	@set -euo pipefail; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	cp -R settings.ini nbs dit "$$tmp"; \
	$(RUN) (cd "$$tmp" && nbdev_export && nbdev_clean); \
	differ=$$( { diff -rq -x __pycache__ -x .ipynb_checkpoints nbs "$$tmp/nbs"; diff -rq -x __pycache__ dit "$$tmp/dit"; } \
	  | sed -e "s#Files \(.*\) and .* differ#\1#" -e "s#Only in $$tmp/\([^:]*\): #\1/#" -e 's#Only in \([^:]*\): #\1/#' | tr '\n' ' ' || true); \
	if [ -n "$$differ" ]; then \
	  echo "Notebooks are not clean, or dit/ is not what they export ($${differ% }): run 'make sync', look at what it changed, and commit that." >&2; exit 1; \
	fi
