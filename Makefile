# `make` prints this help. Variables come from the command line only.
VARIABLES := ALGO ENV SEED SEEDS STEPS RUN RUNS ARGS EPISODES WHAT EXP NAME STORE JOBS CHECK BASE
$(foreach v,$(VARIABLES),$(if $(filter environment%,$(origin $(v))),$(eval override $(v) :=)))

PYTHON ?= python3
algo := $(or $(ALGO),sac)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint requirements.lock
# The env that the algorithm's YAML names, unless ENV does; and the extra that the env's YAML asks for.
algo_yaml := $(wildcard configs/algo/$(algo).yaml experiments/*/algo/$(algo).yaml)
env_name := $(or $(ENV),$(shell sed -n 's|.*override /env: *||p' $(algo_yaml) /dev/null))
# A pinned config says it again.
extra := $(shell sed -n 's/^\# needs the extra: *//p' $(or $(wildcard experiments/$(EXP)/config.yaml),configs/env/$(env_name).yaml) 2>/dev/null)
# What the tests of every family and the types need.
suite := $(addprefix .venv/.,dev mujoco box2d dmc atari report)
needs := .venv/.core $(if $(extra),.venv/.$(extra))
run = run=$(if $(EXP),experiments/$(EXP),$(RUN))
comma := ,
space := $() $()
choices := algo=$(algo) $(if $(ENV),env=$(ENV)) $(if $(STEPS),total_env_steps=$(STEPS)) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup train resume config evaluate play plot pin reproduce report variance lab estimators dreaming worlds racing fork bench bench-setup test test-slow drill proof lint format lock clean

help: ## Print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.dev ## Make .venv and install what is missing

.venv/.core: pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (some minutes, once)"
	$(PIP) --editable .
	@touch $@

.venv/.%: .venv/.core
	$(PIP) --editable '.[$*]'
	@touch $@

train: $(needs) ## ALGO=sac [ENV=pendulum] [SEED=0] [SEEDS="0 1"] [STEPS=20000] [RUN=path] [ARGS="algo.gamma=0.98"] or [ARGS="-m algo.tau=.005,.01"]
ifneq ($(filter -m --multirun launcher=%,$(ARGS)),)
	$(BIN)/python -m levin.train $(choices) seed=$(subst $(space),$(comma),$(strip $(or $(SEEDS),$(SEED),0)))
else
	@$(foreach seed,$(or $(SEEDS),$(SEED),0),set -x; $(BIN)/python -m levin.train $(choices) seed=$(seed) $(if $(RUN),run=$(RUN)$(if $(word 2,$(SEEDS)),/s$(seed))) || exit $$?;)
endif

resume: .venv/.core ## RUN=path [STEPS=n] continues a run exactly; STEPS is the new total
	$(BIN)/python -m levin.resume run=$(RUN) $(if $(STEPS),total_env_steps=$(STEPS)) $(ARGS)

config: .venv/.core ## [ALGO=] [ENV=] prints every value and the file that set it
	@$(BIN)/python -m levin.config $(choices)

evaluate: $(needs) ## RUN=path or EXP=sac_pendulum [EPISODES=100] [SEED=1] writes evaluation.json
	$(BIN)/python -m levin.evaluate $(run) $(if $(EPISODES),episodes=$(EPISODES)) $(if $(SEED),seed=$(SEED))

play: $(needs) ## RUN=path or EXP=sac_pendulum [EPISODES=1] [SEED=1] writes videos/*.mp4
	$(BIN)/python -m levin.play $(run) $(if $(EPISODES),episodes=$(EPISODES)) $(if $(SEED),seed=$(SEED))

plot: .venv/.core .venv/.report ## RUNS="runs/sac_pendulum/*" [ARGS="out=plot.png"] draws evaluation curves
	$(BIN)/python -m levin.plot "runs=$(RUNS)" $(ARGS)

reproduce: $(needs) .venv/.report ## EXP=sac_pendulum [SEEDS="0 1 2"] [STEPS=n] [JOBS=n] [STORE=1] runs it anew, compares, judges
	$(BIN)/python -m levin.reproduce exp=$(EXP) $(if $(SEEDS),seeds="$(SEEDS)") $(if $(STEPS),total_env_steps=$(STEPS)) $(if $(JOBS),jobs=$(JOBS)) $(if $(STORE),store=true)

fork: .venv/.core ## ALGO=sac NAME=my_idea copies an algorithm into experiments/my_idea/
	$(BIN)/python -m levin.fork algo=$(algo) name=$(NAME)

pin: $(needs) ## EXP=sac_hopper ALGO=sac ENV=hopper [STEPS=] [ARGS=] begins a new result in experiments/
	$(BIN)/python -m levin.pin exp=$(EXP) $(choices)

variance: .venv/.core .venv/.report ## Measures the variance of the policy gradient's forms again, half an hour
	$(BIN)/python -m experiments.variance.run

lab: .venv/.core .venv/.report ## [ARGS="out=runs/lab rows=20000"] Measures gradient estimators on known gradients, minutes
	$(BIN)/python -m levin.lab $(ARGS)

estimators: .venv/.core .venv/.report ## The lab, an autoencoder and two algorithms with other estimators again, half an hour
	$(BIN)/python -m experiments.estimators.run

dreaming: .venv/.core .venv/.report ## Dreamer with and without its dream's gradient and a memory, beside SAC, again, an hour
	$(BIN)/python -m experiments.dreaming.run

worlds: .venv/.core .venv/.report ## World Models in the dodge game, and PPO and SAC in dreams, again, an hour
	$(BIN)/python -m experiments.worlds.run

racing: .venv/.core .venv/.box2d .venv/.report ## World Models in CarRacing, with M trained and untrained, again, two hours
	$(BIN)/python -m experiments.racing.run

report: .venv/.core .venv/.report ## [CHECK=1] rebuilds every summary, picture and table from the curves
	$(BIN)/python -m levin.report $(if $(CHECK),check=true)

bench: .venv/.core .venv/.mujoco ## [WHAT=sac|td3|ddpg|dqn|ppo|a2c|trpo|collect|memory|checkpoint|estimators|dreamer|dream] speed beside the peers, interleaved
	$(BIN)/python -m levin.bench what=$(or $(WHAT),sac) $(ARGS)

bench-setup: ## Install the peers into an environment of their own
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 stable-baselines3==2.9.2 sb3-contrib==2.9.0 storchastic==0.3.7 'gymnasium[mujoco]' 'mujoco>=3.17,<3.18'

test: $(suite) ## Tests, in minutes
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(suite) .venv/.scale ## Tests that train for minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

drill: .venv/.dev ## [ARGS="kills=50 terms=20"] kills runs, resumes them and compares; minutes
	$(BIN)/python tests/drill.py $(ARGS)

proof: .venv/.dev ## BASE=commit [ARGS="--rows sac ppo --pairs 3"] compares every row's numbers and speed with a commit's
	$(BIN)/python scripts/proof.py --base $(BASE) $(ARGS)

lint: $(suite) ## Ruff, codespell, pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/.dev ## Let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: ## Refresh requirements.lock: the newest versions that the ranges of pyproject.toml allow
	$(PYTHON) scripts/lock.py

clean: ## Remove caches; runs stay
	rm -rf .pytest_cache .ruff_cache build dist
	find src tests -name __pycache__ -prune -exec rm -rf {} +
