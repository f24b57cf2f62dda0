"""Configs: invalid input gives a one-line error, exit code 2 and no files; precedence of config files."""

import math
import subprocess
import sys
import warnings

import pytest
from omegaconf import OmegaConf

from levin import evaluate, plot, train
from levin.config import __main__ as print_config
from levin.config import cli
from levin.config.compose import compose
from levin.core import paths
from levin.core.errors import ConfigError
from levin.core.omega import flat_keys, to_plain
from levin.runs.folder import new_run_path
from processes import run_python

WRONG = [
    (["algo=sacc"], "algo=sacc is unknown; valid: sac"),
    (["env=halfcheeta"], "env=halfcheeta is unknown; valid: halfcheetah"),
    (["debug=smok"], "debug=smok is unknown; valid: smoke"),
    (["algo.gama=0.9"], "algo.gama is unknown; valid: algo.gamma"),
    (["+algo.gama=0.9"], "algo.gama is unknown; valid: gamma"),
    (["sed=1"], "sed is unknown; valid: seed"),
    (["eval.evry=1"], "eval.evry is unknown; valid: eval.every"),
    (["trainer.devics=1"], "trainer.devics is unknown; valid: trainer.devices"),
    (["+trainer.profilr=simple"], "trainer.profilr is unknown; valid: trainer.profiler"),
    (["algo.gamma=1.7"], "algo.gamma=1.7: input should be less than or equal to 1"),
    (["algo.gamma=-0.1"], "algo.gamma=-0.1: input should be greater than or equal to 0"),
    (["algo.gamma=high"], "algo.gamma=high: input should be a valid number"),
    (["algo.batch_size=0"], "algo.batch_size=0: input should be greater than 0"),
    (["algo.batch_size=2.5"], "algo.batch_size=2.5: input should be a valid integer"),
    (["algo.batch_size=true"], "algo.batch_size=True: input should be a valid integer"),
    (["algo.hidden_sizes=[64,-1]"], "input should be greater than 0"),
    (["algo.activation=swish"], "algo.activation=swish: input should be 'relu', 'tanh', 'elu' or 'silu'"),
    (["total_env_steps=-5"], "total_env_steps=-5: input should be greater than 0"),
    (["seed=abc"], "seed=abc: input should be a valid integer"),
    (["seed=-1"], "seed=-1: input should be greater than or equal to 0"),
    (["logger=wndb"], "input should be 'csv', 'tensorboard' or 'wandb'"),
    (["collector=ray2"], "input should be 'vector', 'batched', 'torchrl', 'torchrl-process', 'torchrl-async' or 'ray'"),
    (["env.action=squash"], "input should be 'rescale', 'clip' or 'none'"),
    (["env.num_envs=0"], "env.num_envs=0: input should be greater than 0"),
    (["trainer.precision=bf16-true"], "input should be '32-true' or 'bf16-mixed'"),
    (["+trainer.max_epochs=3"], "trainer.max_epochs has no effect here; use total_env_steps instead"),
    (["+trainer.gradient_clip_val=1"], "trainer.gradient_clip_val has no effect here"),
    (["+trainer.plugins=x"], "trainer.plugins has no effect here"),
    (["trainer.devices=2"], "env.num_envs=1 can't be divided equally among 2 ranks"),
    (["trainer.strategy=dpp"], "trainer.strategy=dpp: input should be 'auto', 'ddp' or 'hogwild'"),
    (["trainer.accelerator=foo"], "trainer.accelerator=foo: input should be 'auto', 'cpu'"),
    (["trainer.accelerator=mps"], "the Trainer or a callback can't be built"),
    (["+trainer.profiler=foo"], "the Trainer or a callback can't be built"),
    (["trainer.profilr=simple"], "trainer.profilr is unknown; valid: trainer.profiler"),
    (["env.kwargs.foo=1"], "foo"),
    (["+env.kwargs.foo=1", "env=pendulum"], "foo"),
    (["+callbacks.x={_target_:nope.Nope}"], "nope"),
    (["+callbacks.x=5"], "callbacks"),
    (["callbacks=5"], "callbacks is a section"),
    (["callbacks=null"], "callbacks is a section"),
    (["~callbacks"], "callbacks is a section"),
    (["eval=3"], "eval is a section"),
    (["checkpoint=null"], "checkpoint is a section"),
    (["trainer=null"], "trainer is a section"),
    (["algo=null"], "algo=null"),
    (["env=null"], "env=null"),
    (["algo._target_=foo.Bar"], "foo.Bar"),
    (["algo._target_=os.path.join"], "os.path.join"),
    (["env=gym"], "env.id has no value"),
    (["algo=trpo", "env=gym", "env.id=toy_envs:Image-v0"], "pixels"),
    (["env=gym", "env.id=careless_envs:Picture-v0", "+env.kwargs.shape=[40,48,64]"], "set env.channels=first or"),
    (["env=cartpole", "env.pixels=64"], "env.pixels=64 is for MuJoCo and dm_control"),
    (["env=gym", "env.id=toy_envs:Matrix-v0"], "one dimension"),
    (["env=gym", "env.id=toy_envs:Words-v0"], "observation space has a Text"),
    (["env=gym", "env.id=toy_envs:Robot-v0", "env.frame_stack=2"], "stacks a Box, not a Dict"),
    (["env=gym", "env.id=toy_envs:Buttons-v0"], "SAC acts in box action spaces"),
    (["algo=dqn", "env=gym", "env.id=toy_envs:Buttons-v0"], "DQN acts in discrete action spaces"),
    (["algo=sac_discrete", "env=gym", "env.id=toy_envs:Buttons-v0"], "set algo.critic=state_action"),
    (
        ["algo=sac_discrete", "algo.critic=state_action", "env=gym", "env.id=toy_envs:Keyboard-v0"],
        "more than 1048576: use loo",
    ),
    (["algo=sac_discrete", "env=cartpole", "algo.actor_estimator=loo", "algo.actor_draws=1"], "2 or more, got 1"),
    (["algo=sac_discrete", "env=cartpole", "algo.actor_estimator=arm"], "actor_estimator"),
    (["algo=tqc", "env=pendulum", "algo.dropped_atoms=25"], "set it below algo.num_atoms=25"),
    (["algo=actor_critic", "algo.critic=q", "env=gym", "env.id=toy_envs:Buttons-v0"], "algo.critic=q needs discrete"),
    (["algo"], "algo is not of the form key=value"),
    (
        ["env=cartpole", "env.action=none"],
        "SAC acts in box action spaces, but the action space of CartPole-v1 is discrete",
    ),
    (["env=gym", "env.id=HalfCheeta-v4"], "HalfCheetah"),
    (["env=gym", "env.id=no_such:Env-v0"], "no_such"),
    (["algo=sac,ppo"], "algo=sac,ppo has several values: to train all of them, add -m"),
    (["algo.gamma=0.9,0.99"], "algo.gamma=0.9,0.99 has several values: to train all of them, add -m"),
    (["++env.kwargs={g:9.8}", "toal_env_steps=3"], "toal_env_steps is unknown"),
    (["callbacks=null", "log_evry=3"], "log_evry is unknown"),
    (["env.kwargs={g:9.8}"], "env.kwargs={g:9.8} adds keys: put a plus before it, +env.kwargs={g:9.8}"),
    (
        ["trainer.devices=2", "env.num_envs=2", "collector=torchrl-process"],
        "each of the 2 ranks gets 1/2 of env.num_envs",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "sentence"), WRONG, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_invalid_input_gives_a_one_line_error_and_writes_nothing(overrides, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *overrides])
    with pytest.raises(SystemExit) as stop:
        train.main()
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert sentence in message
    assert message.startswith("levin: ")
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_read_enough_is_no_error():
    command = f"{sys.executable} -m levin.config algo=sac env=pendulum | head -1"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert answer.stdout.startswith("seed: 0")
    assert not answer.stderr


def test_a_run_folder_that_exists_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    monkeypatch.setattr(sys, "argv", ["train", f"run={tmp_path / 'mine'}"])
    with pytest.raises(SystemExit):
        train.main()
    assert "exists" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("place", ["/proc/levin", "/dev/null/run"])
def test_a_run_folder_that_is_not_writable_is_refused(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", f"run={place}"])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    assert "can't be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "path", ["it's (a) try", "lr=0.1,tau=[1]", "größe", "a#1", "5", 'say "yes"', "{x", "~a", "a\\b"]
)
def test_special_characters_in_a_run_folder_are_kept(path):
    assert compose(["algo=ppo", "env=cartpole", f"run=runs/{path}"]).run == f"runs/{path}"
    assert compose([f"run={path}"]).run == path
    assert compose(["run=null"]).run is None
    with pytest.raises(ConfigError, match="name another folder"):
        compose(["run=${seed}"])


@pytest.mark.parametrize("command", ["evaluate", "play", "resume"])
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["run=/nowhere"], "/nowhere"),
        ([], "run is missing"),
        (["rn=x"], "rn is unknown; valid: run"),
        (["run=x", "episodes=0"], "episodes"),
        (["nonsense"], "key=value"),
    ],
)
def test_other_commands_give_a_one_line_error(command, overrides, sentence, monkeypatch, capsys):
    module = __import__(f"levin.{command}", fromlist=["main"])
    monkeypatch.setattr(sys, "argv", [command, *overrides])
    with pytest.raises(SystemExit) as stop:
        module.main()
    message = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert sentence in message
    assert "\n" not in message


def test_invalid_input_exits_with_2_and_no_traceback(tmp_path):
    answer = run_python("-m", "levin.train", "algo=sacc", cwd=tmp_path)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


def test_whole_floats_are_accepted_as_integers():
    cfg = compose(["total_env_steps=1e5", "algo.buffer_size=1e4"])
    assert (cfg.total_env_steps, cfg.algo.buffer_size) == (100_000, 10_000)
    assert isinstance(cfg.total_env_steps, int)


def test_debug_null_is_valid():
    assert compose(["debug=null"]).name == "sac_halfcheetah"


@pytest.mark.parametrize("word", ["run=123", "run=1e5", "run=[", "run=${x}", "run={x", "run=20260101_1"])
def test_special_characters_in_a_path_reach_the_command(word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", word])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2
    assert f"{word} holds no checkpoint" in capsys.readouterr().err


def test_a_list_of_seeds_has_whole_numbers_once():
    assert cli.parse_seeds("0,2 1") == [0, 2, 1]
    for text in ("", "x", "-1", "\u00b2", "0 0", "1 01"):
        with pytest.raises(ConfigError, match=f"seeds={text} "):
            cli.parse_seeds(text)


def test_seed_0_is_valid():
    assert compose(["seed=0"]).seed == 0


def test_precedence_of_config_files():
    cfg = compose(["algo=sac", "env=pendulum"])
    assert cfg.env.id == "Pendulum-v1"
    assert cfg.name == "sac_pendulum"
    assert cfg.algo.learning_starts == 100  # tuned/sac_pendulum
    assert compose(["algo=sac"]).env.id == "HalfCheetah-v4"  # the default env of algo/sac
    assert compose(["env=pendulum", "algo.learning_starts=7"]).algo.learning_starts == 7
    assert compose(["env=pendulum", "debug=smoke"]).total_env_steps == 600


def test_a_composed_config_is_read_only():
    with pytest.raises(Exception, match="read-only"):
        compose([]).seed = 1


@pytest.mark.parametrize("name", sorted(file.stem for file in (paths.CONFIGS / "debug").glob("*.yaml")))
def test_every_debug_file_composes(name):
    compose([f"debug={name}", "env=pendulum", *(["algo=a2c"] if name == "lecture" else [])])


def test_debug_presets_change_the_config_of_their_algorithms():
    files = sorted((paths.CONFIGS / "debug_algo").glob("*.yaml"))
    assert files
    for file in files:
        debug, _, algo = file.stem.partition("_")
        with_preset, without = (compose([f"algo={algo}", *overrides]).algo for overrides in ([f"debug={debug}"], []))
        assert with_preset != without, file.name
    with pytest.raises(
        ConfigError, match="debug=overfit is not for ppo; valid algorithms: ddpg, dqn, sac, sac_discrete, td3"
    ):
        compose(["algo=ppo", "debug=overfit"])


@pytest.mark.parametrize("name", sorted(file.stem for file in (paths.CONFIGS / "debug_algo").glob("overfit_*.yaml")))
def test_overfit_makes_all_its_updates_when_the_buffer_has_all_its_transitions(name):
    cfg = compose([f"algo={name.removeprefix('overfit_')}", "debug=overfit"])
    steps = cfg.algo.steps_per_iteration * cfg.env.num_envs
    total = math.ceil(cfg.total_env_steps / steps) * steps
    assert total - steps <= cfg.algo.learning_starts < total <= cfg.algo.buffer_size
    assert cfg.algo.replay_ratio * (total - cfg.algo.learning_starts) >= 1000


@pytest.mark.parametrize("name", sorted(file.stem for file in (paths.CONFIGS / "tuned").glob("*.yaml")))
def test_every_tuned_file_names_an_algorithm_and_an_env(name):
    algo, env = next(
        (algo.stem, env.stem)
        for algo in (paths.CONFIGS / "algo").glob("*.yaml")
        for folder in ("env", "family")
        for env in (paths.CONFIGS / folder).glob("*.yaml")
        if f"{algo.stem}_{env.stem}" == name
    )
    if env == "batched":  # the family; one of its envs that has no values of its own
        env = "mountaincar_continuous_batched" if algo in ("sac", "td3") else "acrobot_batched"
    cfg = compose([f"algo={algo}", f"env={env}", *(["env.id=qbert"] if env == "atari" else [])])
    text = OmegaConf.load(paths.CONFIGS / "tuned" / f"{name}.yaml")
    for key in flat_keys(to_plain(text)):
        assert OmegaConf.select(cfg, key) == OmegaConf.select(text, key)


def test_every_config_names_its_source_and_is_in_the_table_of_sources():
    table = (paths.ROOT / "docs" / "sources.md").read_text()
    files = [*(paths.CONFIGS / "algo").glob("*.yaml"), *(paths.CONFIGS / "tuned").glob("*.yaml")]
    for file in files:
        comments = " ".join(line for line in file.read_text().splitlines() if line.startswith("#"))
        words = ("Source: ", "Values: ", "Tuned by: ")
        assert any(word in comments for word in words), f"{file} needs a comment with one of {words}"
        assert f"\n| `{file.stem}` | " in table, f"{file} needs a row in docs/sources.md"
    assert table.count("\n| `") == len(files)


def test_an_installation_without_configs_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CONFIGS", tmp_path / "lib/python3.11/configs")
    with pytest.raises(ConfigError, match="Levin was installed without its configs"):
        compose(["algo=sac"])


def test_the_values_of_a_game_are_those_of_its_family():
    """Values for CartPole would be composed otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        breakout = compose(["algo=dqn", "env=breakout"])
        assert compose(["algo=dqn", "env=atari", "env.id=breakout"]) == breakout
        assert (breakout.algo.huber, breakout.algo.hidden_sizes, breakout.eval.every) == (True, [], 500_000)
        assert compose(["algo=dqn", "env=breakout", "algo.huber=false", "eval.every=7"]).eval.every == 7
        assert compose(["algo=dqn", "env=cartpole"]).eval.every == 5000
    with pytest.warns(UserWarning, match=r"dreamer has no tuned values for atari.*tuned for atari: a2c, a3c, dqn, ppo"):
        compose(["algo=dreamer", "env=pong"])


def test_every_value_names_the_file_that_set_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["config", "env=pendulum", "algo.tau=0.01"])
    print_config.main()
    lines = capsys.readouterr().out.splitlines()
    origin = {line.split(":")[0]: line.partition("  # ")[2].partition(":")[0] for line in lines}
    assert origin["algo.tau"] == "command line"
    assert origin["algo.learning_starts"] == "configs/tuned/sac_pendulum.yaml"
    assert origin["algo.gamma"] == "configs/algo/sac.yaml"
    assert origin["env.id"] == "configs/env/pendulum.yaml"
    assert origin["env.action"] == "configs/algo/sac.yaml"
    assert origin["seed"] == "configs/train.yaml"
    assert all(origin.values())
    assert len(lines) == len(list(flat_keys(to_plain(compose(["env=pendulum"])))))


def test_suggestions_are_sorted_by_similarity():
    with pytest.raises(ConfigError, match="valid: halfcheetah, halfcheetah_v5"):
        compose(["env=halfcheeta"])


@pytest.mark.parametrize("path", ["runs/lr=0.1", "größe", "my run", "a#1(b)", "x/algo.tau=0.01/s0", "[8]"])
def test_paths_are_taken_as_typed(path):
    assert compose(["algo=sac", "env=pendulum", f"run={path}"]).run == path
    assert compose(["algo=ppo", "env=dream", f"env.run={path}"], check_values=False).env.run == path


@pytest.mark.parametrize("name", ["größe", "größe_2.0", "5"])
def test_names_are_taken_as_typed(name):
    assert compose(["algo=ppo", "env=cartpole", f"name={name}"]).name == name
    assert compose([f"wandb_project={name}"]).wandb_project == name
    assert compose(["algo=ppo", "name=x${seed}", "seed=3"]).name == "x3"


@pytest.mark.parametrize("path", ["/home/jürgen/x.png", "fig(1).png", "a=b, c.png", None])
def test_an_optional_path_of_a_command_is_taken_as_typed(path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", "runs=runs/*", f"out={path or 'null'}"])
    assert cli.command_arguments(plot.plot)["out"] == path


def test_a_value_that_needs_quotes_is_named_with_them():
    with pytest.raises(
        ConfigError, match=r"""^algo.gamma=ö\(1 is not of the form key=value; .*: "algo.gamma='ö\(1'"$"""
    ):
        compose(["algo=ppo", "env=cartpole", "algo.gamma=ö(1", "seed=3"])


def test_a_run_of_any_env_is_named_by_its_id():
    assert compose(["algo=ppo", "env=gym", "env.id=two:pair/One-v0"]).name == "ppo_two_pair_One-v0"
    assert compose(["algo=ppo", "env=cartpole"]).name == "ppo_cartpole"


def test_runs_that_begin_in_one_second_have_folders_of_their_own():
    config = compose(["algo=ppo", "env=cartpole"])
    assert len({new_run_path(config) for _ in range(20)}) == 20


@pytest.mark.parametrize("argument", ["run=~/runs/x", "runs=~", "env.run=~/runs/dreamer", "out=~/plot.png"])
def test_a_home_folder_that_the_shell_left_is_refused(argument):
    """macOS' shell does not replace ~ after an equals sign; Python would make a folder of this name."""
    with pytest.raises(ConfigError, match=r"write \$HOME instead"):
        cli.check_arguments([argument])
    cli.check_arguments(["run=runs/~x", "note=~ 5 seeds"])
