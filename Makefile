# `make` prints this help. Variables come from the command line only. None is read by the shell, but ARGS with quotes.
VARIABLES := ALGO ENV SEED SEEDS STEPS RUN RUNS ARGS EPISODES WHAT EXP NAME STORE JOBS CHECK BASE
$(foreach v,$(VARIABLES),$(if $(filter environment%,$(origin $(v))),$(eval override $(v) :=)))
unexport $(VARIABLES)

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock

# A text, and what was typed for a variable, as one word of the shell: nothing in it is expanded.
quote = '$(subst ','\'',$1)'
typed = $(call quote,$(value $1))
# ARGS are several words. Where they hold quotes of their own, the shell reads those.
args = $(if $(findstring ",$(value ARGS))$(findstring ',$(value ARGS)),$(value ARGS),$(foreach word,$(value ARGS),$(call quote,$(word))))

algo := $(or $(value ALGO),sac)
# The env that the algorithm's YAML names, unless ENV does; and the extra that the env's YAML asks for.
algo_yaml := $(wildcard configs/algo/$(algo).yaml experiments/*/algo/$(algo).yaml)
quoted = $(foreach file,$1,$(call quote,$(file)))
env_name := $(or $(value ENV),$(shell sed -n 's|.*override /env: *\([a-z0-9_]*\).*|\1|p' $(call quoted,$(algo_yaml)) /dev/null))
# A pinned config says it again.
env_yaml := $(or $(wildcard experiments/$(value EXP)/config.yaml),configs/env/$(env_name).yaml)
extra := $(shell sed -n 's|^\# needs the extra: *\([a-z0-9]*\).*|\1|p' $(call quoted,$(env_yaml)) 2>/dev/null)
# What the tests of every family and the types need.
suite := $(addprefix .venv/.,dev mujoco box2d dmc atari report)
needs := .venv/.core $(if $(extra),.venv/.$(extra))
run = $(call quote,run=$(if $(value EXP),experiments/$(value EXP),$(value RUN)))
seeds := $(or $(value SEEDS),$(value SEED),0)
comma := ,
space := $() $()
choices = $(call quote,algo=$(algo)) $(if $(value ENV),env=$(call typed,ENV)) $(if $(value STEPS),total_env_steps=$(call typed,STEPS)) $(args)
# One of them, or nothing: not a word more.
study = $(and $(filter 1,$(words $(value NAME))),$(filter $(value NAME),$(studies)))
studies := $(patsubst experiments/%/run.py,%,$(wildcard experiments/*/run.py)) lab

.DEFAULT_GOAL := help
.PHONY: help setup train resume config evaluate play plot pin reproduce report study fork bench bench-setup test test-slow drill proof lint format lock clean

help: ## Print this help
	@awk -F ':.*## ' '/^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

##@ Use
setup: .venv/.dev ## Make .venv and install what is missing; every other command does so by itself

.venv/.core: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes, once)"
	$(PIP) --editable .
	@touch $@

.venv/.%: .venv/.core
	$(PIP) --editable '.[$*]'
	@touch $@

train: $(needs) ## ALGO=sac [ENV=pendulum] [STEPS=20000] [SEEDS="0 1"] [RUN=path] [ARGS="algo.gamma=0.98"]
ifneq ($(filter -m --multirun launcher=%,$(value ARGS)),)
	$(BIN)/python -m levin.train $(choices) seed=$(call quote,$(subst $(space),$(comma),$(strip $(seeds))))
else
	@$(foreach seed,$(seeds),set -x; $(BIN)/python -m levin.train $(choices) seed=$(call quote,$(seed)) $(if $(value RUN),$(call quote,run=$(value RUN)$(if $(word 2,$(value SEEDS)),/s$(seed)))) || exit $$?;)
endif

resume: .venv/.core ## RUN=path [STEPS=n] continues a run exactly; STEPS is the new total
	$(BIN)/python -m levin.resume $(run) $(if $(value STEPS),total_env_steps=$(call typed,STEPS)) $(args)

config: .venv/.core ## [ALGO=] [ENV=] prints every value and the file that set it
	@$(BIN)/python -m levin.config $(choices)

evaluate: $(needs) ## RUN=path or EXP=sac_pendulum [EPISODES=100] [SEED=1] writes evaluation.json
	$(BIN)/python -m levin.evaluate $(run) $(if $(value EPISODES),episodes=$(call typed,EPISODES)) $(if $(value SEED),seed=$(call typed,SEED))

play: $(needs) ## RUN=path or EXP=sac_pendulum [EPISODES=1] [SEED=1] writes videos/*.mp4
	$(BIN)/python -m levin.play $(run) $(if $(value EPISODES),episodes=$(call typed,EPISODES)) $(if $(value SEED),seed=$(call typed,SEED))

plot: .venv/.core .venv/.report ## RUNS="runs/sac_pendulum/*" [ARGS="out=plot.png"] draws evaluation curves
	$(BIN)/python -m levin.plot runs=$(call typed,RUNS) $(args)

fork: .venv/.core ## ALGO=sac NAME=my_idea copies an algorithm into experiments/my_idea/
	$(BIN)/python -m levin.fork $(call quote,algo=$(algo)) name=$(call typed,NAME)

##@ Results
reproduce: $(needs) .venv/.report ## EXP=sac_pendulum [SEEDS="0 1 2"] [STEPS=n] [JOBS=n] [STORE=1] runs it anew, compares, judges
	$(BIN)/python -m levin.reproduce exp=$(call typed,EXP) $(if $(value SEEDS),seeds=$(call typed,SEEDS)) $(if $(value STEPS),total_env_steps=$(call typed,STEPS)) $(if $(value JOBS),jobs=$(call typed,JOBS)) $(if $(value STORE),store=true)

pin: $(needs) ## EXP=sac_hopper ALGO=sac ENV=hopper [STEPS=] [ARGS=] begins a new result in experiments/
	$(BIN)/python -m levin.pin exp=$(call typed,EXP) $(choices)

report: .venv/.core .venv/.report ## [CHECK=1] rebuilds every summary, picture and table from the curves
	$(BIN)/python -m levin.report $(if $(value CHECK),check=true)

study: .venv/.core .venv/.report $(if $(filter racing,$(value NAME)),.venv/.box2d) ## NAME=variance (dreaming, estimators, lab, racing, worlds) measures again, up to two hours
	@$(if $(study),,printf 'levin: NAME=%s is no study; valid: $(studies)\n' $(call typed,NAME) >&2; exit 2)
	$(BIN)/python -m $(if $(filter lab,$(study)),levin.lab $(args),experiments.$(study).run)

##@ Develop
test: $(suite) ## Tests, in minutes
	$(BIN)/python -m pytest -n auto --dist loadfile $(args)

test-slow: $(suite) .venv/.scale ## Tests that train for minutes
	$(BIN)/python -m pytest -m slow $(args)

drill: .venv/.dev ## [ARGS="kills=50 terms=20"] kills runs, resumes them and compares; minutes
	$(BIN)/python tests/drill.py $(args)

proof: .venv/.dev ## BASE=commit [ARGS="--rows sac ppo --pairs 3"] compares numbers and speed with a commit's
	$(BIN)/python scripts/proof.py --base $(call typed,BASE) $(args)

lint: $(suite) ## Ruff, codespell, pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev ## Let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/.core .venv/.mujoco ## [WHAT=ppo] speed beside the peers: sac td3 ddpg dqn ppo a2c trpo collect dreamer dream ...
	$(BIN)/python -m levin.bench what=$(call quote,$(or $(value WHAT),sac)) $(args)

bench-setup: ## Install the peers into an environment of their own
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 stable-baselines3==2.9.2 sb3-contrib==2.9.0 storchastic==0.3.7 'gymnasium[mujoco]' 'mujoco>=3.17,<3.18'

lock: ## Refresh requirements.lock: the newest versions that the ranges of pyproject.toml allow
	$(PYTHON) scripts/lock.py

clean: ## Remove caches; runs stay
	rm -rf .pytest_cache .ruff_cache build dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
