# `make` prints the help. The variables below are read from the command line only, never from the environment. Their
# values reach the commands as typed and are not expanded by the shell, except for an ARGS that contains quotes.
VARIABLES := ALGO ENV SEED SEEDS STEPS RUN RUNS ARGS EPISODES WHAT EXP NAME NOTE STORE JOBS CHECK BASE TRUST TRIALS SEEDS_PER_TRIAL RETRAIN SHOW FORMAT
$(foreach v,$(VARIABLES),$(if $(filter environment%,$(origin $(v))),$(eval override $(v) :=)))
unexport $(VARIABLES)
# make would also hand them to the make of a script or a test, in MAKEFLAGS.
MAKEOVERRIDES :=

# A variable that is misspelt on the command line would be ignored.
unknown := $(strip $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$(filter-out $(VARIABLES) PYTHON,$v))))
ifneq ($(unknown),)
$(error $(firstword $(unknown)) is unknown; valid: $(VARIABLES))
endif

PYTHON ?= python3
BIN := .venv/bin
# `python -m venv` adds pip last: without it, and if uv did not make .venv, the command was interrupted and is repeated.
complete_venv := { test -x $(BIN)/python && { test -x $(BIN)/pip || grep -qs '^uv *=' .venv/pyvenv.cfg; }; }
# `uv venv` makes a .venv without pip. Both install the versions of requirements.lock.
pip_or_uv := if test -x $(BIN)/pip; then set -- $(BIN)/python -m pip --disable-pip-version-check install; else set -- uv pip install --python $(BIN)/python; fi; "$$@" --quiet --constraint requirements.lock --editable
# One make installs at a time: the lock is held by descriptor 9 until the shell of the recipe ends.
lock_install := exec 9< Makefile; $(PYTHON) -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' 2>/dev/null || true
# A .venv that was moved or copied with its folder, or whose Python is gone, is installed again.
moved := $(shell test ! -s .venv/.core || { test -x $(BIN)/python && test "$$(cat .venv/.core)" = "$$(pwd -P)"; } || echo again)

# quote: a text as one single-quoted shell word. typed: the same for the value of a variable. Neither is expanded.
quote = '$(subst ','\'',$1)'
typed = $(call quote,$(value $1))
# ARGS holds several words. Each is quoted, unless ARGS contains quotes itself: then the shell parses it.
args = $(if $(findstring ",$(value ARGS))$(findstring ',$(value ARGS)),$(value ARGS),$(foreach word,$(value ARGS),$(call quote,$(word))))

algo := $(or $(value ALGO),sac)
# The env is ENV, or else the one that the algorithm's YAML names. The env's YAML names the extra to install.
algo_yaml := $(firstword $(wildcard configs/algo/$(algo).yaml) $(wildcard experiments/$(algo)/algo/$(algo).yaml))
quoted = $(foreach file,$1,$(call quote,$(file)))
env_name := $(or $(value ENV),$(firstword $(shell sed -n 's|.*override /env: *\([a-z0-9_]*\).*|\1|p' $(call quoted,$(algo_yaml)) /dev/null)))
# The config of a stored result (EXP) names its extra, too, and so does the script of a study.
env_yaml := $(or $(wildcard experiments/$(value EXP)/config.yaml),configs/env/$(env_name).yaml)
extra_of = $(firstword $(filter mujoco box2d dmc atari,$(shell sed -n 's|^\# needs the extra: *\([a-z0-9]*\).*|\1|p' $(call quoted,$1) 2>/dev/null)))
extra := $(call extra_of,$(env_yaml))
# Extras for the tests of all env families and for pyright.
suite := $(addprefix .venv/.,dev mujoco box2d dmc atari report tune export docs)
needs := .venv/.core $(if $(extra),.venv/.$(extra))
# A run (RUN, or one of its checkpoints) has the id or the family of its env in its config; a file in configs/env/ with the same line names its extra.
run_yaml = $(firstword $(foreach key,id family,$(shell sed -n 's|^  \($(key): .*\)|\1|p' $(call quote,$(value RUN)/config.yaml) $(call quote,$(value RUN)/../../config.yaml) 2>/dev/null | grep -lxFf - configs/env/*.yaml)))
run_extra := $(if $(value RUN),$(if $(value EXP)$(value ENV),$(extra),$(call extra_of,$(run_yaml))),$(extra))
needs_of_run := .venv/.core $(if $(run_extra),.venv/.$(run_extra))
run = $(call quote,run=$(if $(value EXP),experiments/$(value EXP),$(value RUN)))
# Without SEED and SEEDS, the seed is that of ARGS or of configs/train.yaml.
seeds = $(if $(value SEED),seed=$(call typed,SEED)) $(if $(value SEEDS),seeds=$(call typed,SEEDS))
jobs = $(if $(value JOBS),jobs=$(call typed,JOBS))
# flag: name=true if the variable is 1; another value is passed on as typed, and the command takes only true and false.
flag = $(if $(value $1),$(call quote,$2=$(if $(filter-out 1,$(value $1)),$(value $1),true)))
trust = $(call flag,TRUST,trust)
choices = $(call quote,algo=$(algo)) $(if $(value ENV),env=$(call typed,ENV)) $(if $(value STEPS),total_env_steps=$(call typed,STEPS)) $(args)
labels = $(if $(value NAME),name=$(call typed,NAME)) $(if $(value NOTE),$(call quote,note=$(value NOTE)))
in_run = $(if $(value RUN),$(call quote,run=$(value RUN)))
# NAME if it is exactly one of the studies, else empty.
study = $(and $(filter 1,$(words $(value NAME))),$(filter $(value NAME),$(studies)))
studies := $(patsubst experiments/%/run.py,%,$(wildcard experiments/*/run.py)) lab

.DEFAULT_GOAL := help
.PHONY: help setup train resume config evaluate play export plot tune compare pin reproduce report study fork docs new bench bench-setup test test-long test-quick test-slow drill proof lint format lock clean

# These commands can't use ARGS, which they would ignore.
without_args := $(filter setup docs lint format lock clean bench-setup,$(MAKECMDGOALS))
ifneq ($(and $(value ARGS),$(without_args),$(filter $(words $(MAKECMDGOALS)),$(words $(without_args)))),)
$(error make $(MAKECMDGOALS): ARGS has no effect here: leave it out)
endif

help: ## Print this help
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

##@ Use
setup: .venv/.dev ## Create .venv with the development tools; every other command installs what it needs

again:
.venv/.core: pyproject.toml requirements.lock $(moved)
	@if test -L .venv; then echo "levin: .venv is a link, and installing here would point it to this folder: remove the link" >&2; exit 2; fi
	@$(complete_venv) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { test $$? -ne 1 || echo "levin: $(PYTHON) is older than Python 3.11: type make setup PYTHON=python3.12 (any newer one)" >&2; exit 2; }
	@$(lock_install); $(complete_venv) && test $@ -nt pyproject.toml && test $@ -nt requirements.lock && test "$$(cat $@)" = "$$(pwd -P)" && exit; \
	$(complete_venv) || $(PYTHON) -m venv $$(test -x $(BIN)/python || echo --clear) .venv || { rm -f $(BIN)/python; exit 2; }; \
	echo "installing into .venv (some minutes, once)"; \
	$(pip_or_uv) . && pwd -P > $@

.venv/.%: .venv/.core
	@$(lock_install); test $@ -nt $< && exit; echo "installing the extra $*"; $(pip_or_uv) '.[$*]' && touch $@

train: $(needs) ## ALGO=sac [ENV=pendulum] [STEPS=20000] [SEEDS="0 1"] [JOBS=2] [RUN=path] [ARGS="algo.gamma=0.98"]
	$(BIN)/python -m levin.train $(choices) $(labels) $(trust) $(in_run) $(seeds) $(jobs)

resume: $(if $(value RUN),$(needs_of_run),.venv/.core) ## RUN=path or RUNS="runs/sweep_x" [JOBS=2] [STEPS=n] continues runs exactly; STEPS: new total
	$(BIN)/python -m levin.resume $(in_run) $(if $(value RUNS),runs=$(call typed,RUNS)) $(jobs) $(if $(value STEPS),total_env_steps=$(call typed,STEPS)) $(args) $(trust)

config: .venv/.core ## [ALGO=sac] [ENV=pendulum] prints every config value, the file that set it, and what it means
	@$(BIN)/python -m levin.config $(choices)

evaluate: $(needs_of_run) ## RUN=path or EXP=sac_pendulum [EPISODES=100] [SEED=1] evaluates a policy; writes evaluation.json
	$(BIN)/python -m levin.evaluate $(run) $(if $(value EPISODES),episodes=$(call typed,EPISODES)) $(if $(value SEED),seed=$(call typed,SEED)) $(args) $(trust)

play: $(needs_of_run) ## RUN=path or EXP=sac_pendulum [EPISODES=1] [SEED=1] [ARGS="steps=20000"] records videos/*.mp4
	$(BIN)/python -m levin.play $(run) $(if $(value EPISODES),episodes=$(call typed,EPISODES)) $(if $(value SEED),seed=$(call typed,SEED)) $(args) $(trust)

export: $(needs_of_run) $(if $(filter torch,$(value FORMAT)),,.venv/.export) ## RUN=path or EXP=sac_pendulum [FORMAT=torch] writes policy.onnx (or policy.pt2) and policy.md
	$(BIN)/python -m levin.export $(run) $(if $(value FORMAT),format=$(call typed,FORMAT)) $(if $(value SEED),seed=$(call typed,SEED)) $(args) $(trust)

plot: .venv/.core .venv/.report ## RUNS="runs/sac_pendulum/*" [ARGS="metric=episode/return out=x.png"] draws learning curves
	$(BIN)/python -m levin.plot runs=$(call typed,RUNS) $(args)

tune: $(needs) .venv/.report .venv/.tune ## ALGO=ppo ENV=pendulum [TRIALS=40] [SEEDS_PER_TRIAL=3] [JOBS=2] [SHOW=1] searches hyper-parameters
	$(BIN)/python -m levin.tune $(choices) $(labels) $(trust) $(in_run) $(seeds) $(jobs) $(if $(value TRIALS),trials=$(call typed,TRIALS)) $(if $(value SEEDS_PER_TRIAL),seeds_per_trial=$(call typed,SEEDS_PER_TRIAL)) $(if $(value RETRAIN),retrain=$(call typed,RETRAIN)) $(call flag,SHOW,show)

compare: .venv/.core .venv/.report ## RUNS="runs/sweep_x/*" [ARGS="metric=episode/return"] prints a table of runs, the largest first
	$(BIN)/python -m levin.compare runs=$(call typed,RUNS) $(args)

fork: .venv/.core ## ALGO=sac NAME=my_idea copies an algorithm into experiments/my_idea/
	$(BIN)/python -m levin.fork $(call quote,algo=$(algo)) name=$(call typed,NAME) $(args)

##@ Results
reproduce: $(needs) .venv/.report ## EXP=sac_pendulum [SEEDS="0 1 2"] [STEPS=n] [JOBS=n] [STORE=1] retrains and compares a result
	$(BIN)/python -m levin.reproduce exp=$(call typed,EXP) $(seeds) $(if $(value STEPS),total_env_steps=$(call typed,STEPS)) $(jobs) $(call flag,STORE,store) $(args) $(trust)

pin: $(needs) ## EXP=sac_hopper ALGO=sac ENV=hopper [STEPS=] [ARGS=] starts a new result in experiments/
	$(BIN)/python -m levin.pin exp=$(call typed,EXP) $(choices) $(trust)

report: .venv/.core .venv/.report ## [CHECK=1] rebuilds (or checks) all summaries, figures and tables from the stored curves
	$(BIN)/python -m levin.report $(call flag,CHECK,check) $(args)

study: .venv/.core .venv/.report $(addprefix .venv/.,$(if $(study),$(call extra_of,experiments/$(study)/run.py))) ## NAME=variance (batched, dreaming, estimators, lab, lecture, networks, racing, worlds) repeats a study
	@$(if $(study),,printf 'levin: NAME=%s is not a study; valid: %s\n' $(call typed,NAME) $(call quote,$(studies)) >&2; exit 2)
	$(BIN)/python -m $(if $(filter lab,$(study)),levin.lab,$(call quote,experiments.$(study).run)) $(args)

##@ Develop
test: $(suite) ## Run the tests; five to fifteen minutes on two cores
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not slow and not long' $(args)

test-long: $(suite) ## Run the tests that `make test` leaves out because they take half of the time; CI runs both
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'long and not slow' $(args)

test-quick: $(suite) ## Run the tests that need no whole runs, while you edit; under a minute
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'quick and not slow' $(args)

test-slow: $(suite) .venv/.scale ## Run the tests that train agents; each takes minutes
	$(BIN)/python -m pytest -m slow $(args)

drill: .venv/.dev .venv/.report .venv/.tune ## [ARGS="kills=50 terms=20"] kills, resumes and compares runs, on Linux; minutes
	$(BIN)/python tests/drill.py $(args)

proof: .venv/.dev ## BASE=commit [ARGS="--rows sac ppo --pairs 3"] compares numbers and speed with a commit
	$(BIN)/python scripts/proof.py --base $(call typed,BASE) $(args)

lint: $(suite) ## Run ruff, codespell and pyright, which downloads Node.js once if there is none
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

format: .venv/.dev ## Format and fix the code with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(suite) ## Build the documentation site into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/.core .venv/.mujoco ## [WHAT=ppo] compares speed with other libraries: sac td3 ddpg dqn ppo a2c trpo collect ...
	$(BIN)/python -m levin.bench what=$(call quote,$(or $(value WHAT),sac)) $(args)

bench-setup: .venv/.core ## Install the libraries of `make bench` into .venv-bench
	$(BIN)/python -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 stable-baselines3==2.9.2 sb3-contrib==2.9.0 sbx-rl==0.28.0 storchastic==0.3.7 'gymnasium[mujoco]' 'mujoco>=3.17,<3.18' ale-py opencv-python-headless

new: .venv/.dev ## NAME=my_lab makes this copy your own project; BASE=upstream/main merges a later template
	$(BIN)/python scripts/new.py $(if $(value BASE),--base $(call typed,BASE),--name $(call typed,NAME)) $(args)

lock: ## Write requirements.lock: the newest versions that pyproject.toml allows, with torch 2.13.0
	$(PYTHON) scripts/lock.py

clean: ## Remove caches; keeps runs/
	rm -rf .pytest_cache .ruff_cache build dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
