"""Studies: what a trial's value is, pruning, failures, and that a continued study is the same."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="the extra `tune`")
pytest.importorskip("rliable", reason="the extra `report` computes the intervals")

import optuna
from omegaconf import OmegaConf
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from levin.config.compose import compose
from levin.core.errors import ConfigError, FolderError, LockedError, NotFiniteError, RunError
from levin.scheduler.resources import Resources
from levin.scheduler.scheduler import Scheduler
from levin.scheduler.table import Table
from levin.tuning.pictures import draw_history, importance_table, trials_table
from levin.tuning.sampler import TrialSampler
from levin.tuning.study import best_trials, load_study, open_study, with_values
from levin.tuning.trials import Trials, trial_folder
from processes import run_python, start_python

SPACE = {"algo.gamma": FloatDistribution(0.1, 0.9), "algo.tau": FloatDistribution(0.1, 0.9)}
WORDS = ("env=pendulum", "trainer.threads=1", "total_env_steps=400", "eval.every=100")
BASE = compose([*WORDS])


@pytest.fixture(scope="module", autouse=True)
def _quick_polls():
    """Look at the processes every 10 ms, since runs take milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("levin.scheduler.scheduler", "levin.tuning.trials"):
            patch.setattr(f"{module}.SECONDS", 0.01)
        yield


def configs(values):
    return [with_values(BASE, values, seed) for seed in (0, 1)]


def score(config, env_steps):
    """Return of an evaluation: grows in time to a value that the config decides, the same in any process."""
    return env_steps * (1 - abs(config.algo.gamma - 0.5)) + config.algo.tau + config.seed


def learn(run):
    """Write the metrics of a run."""
    config = OmegaConf.load(run / "config.yaml")
    rows = [f"{step},{score(config, step)},0" for step in (100, 200, 300, 400)]
    (run / "metrics.csv").write_text("\n".join(["env_steps,eval/return_mean,eval/return_std", *rows, ""]))
    (run / "provenance.json").write_text(
        '{"git_sha": "", "git_dirty": false, "versions": {}, "env_steps": 400, "wall_seconds": 1.0, "resumed": []}'
    )


def work(folder, function=learn, number=12, at_once=1):
    """Make the trials of the study in a folder; return the study and whether it has come to its end."""
    study, _ = open_study(folder, list(WORDS), SPACE, 2)
    with Table({}, folder) as table, Scheduler(function, Resources(at_once, 1)) as scheduler:
        trials = Trials(
            study=study,
            folder=folder,
            space=SPACE,
            make_configs=configs,
            number=number,
            scheduler=scheduler,
            table=table,
        )
        return study, trials.run()


def outcome(study):
    return [(each.number, each.state, each.value, each.params, each.intermediate_values) for each in study.trials]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted study."""
    study, ended = work(tmp_path_factory.mktemp("straight") / "study")
    assert ended
    return study


def test_a_trial_is_the_iqm_of_its_seeds_and_the_best_are_found(straight, tmp_path):
    assert [trial.number for trial in straight.trials] == [*range(12)]
    complete = [trial for trial in straight.trials if trial.state == TrialState.COMPLETE]
    for trial in complete:
        last = [score(config, 400) for config in configs(trial.params)]
        assert trial.value == pytest.approx(sum(last) / 2)
        assert trial.last_step == 10  # seed 1 counts from 6 on: four evaluations, and two for those at both ends
        assert trial.intermediate_values[4] == score(configs(trial.params)[0], 400)
        assert trial.intermediate_values[10] == pytest.approx(trial.value)
    assert best_trials(straight, 3)[0].value == straight.best_value


def test_a_trial_below_the_median_is_pruned_at_its_first_such_evaluation(straight):
    pruned = [trial for trial in straight.trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in pruned:
        before = [each for each in straight.trials[: trial.number] if each.state == TrialState.COMPLETE]
        assert len(before) >= 5
        for step, value in trial.intermediate_values.items():
            others = sorted(each.intermediate_values[step] for each in before)
            median = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
            assert (value < median) == (step == trial.last_step)


@pytest.mark.parametrize("ended", [False, True])
def test_a_study_that_was_stopped_goes_on_with_the_same_trials(ended, straight, tmp_path):
    """Stop one study five times: before a run has begun, or after it has ended and before the study knows."""
    parent, folder = os.getpid(), tmp_path / "study"
    numbers = [trial.number for trial in straight.trials if trial.state == TrialState.COMPLETE]
    places = [(numbers[0], "s0"), (numbers[2], "s1"), (numbers[-2], "s1"), (numbers[-1], "s0"), (numbers[-1], "s1")]
    runs = [folder / "trials" / f"{number:04d}" / seed for number, seed in places]

    def stop_once(run):
        if ended:
            learn(run)
        if run in runs and not (run / "stopped").exists():
            (run / "stopped").touch()
            os.kill(parent, signal.SIGTERM)
            time.sleep(60)
        learn(run)

    for number, _ in places:
        study, complete = work(folder, stop_once)
        assert not complete
        assert len(study.trials) == number + 1
        assert outcome(study)[:-1] == outcome(straight)[:number]
    study, complete = work(folder)
    assert complete
    assert outcome(study) == outcome(straight)
    assert (folder / "trials.csv").read_text().count("\n") == 13


def test_parameters_do_not_depend_on_what_was_drawn_before():
    """As in a study whose command was killed between two parameters."""
    study = optuna.create_study(sampler=TrialSampler(3), direction="maximize")
    for number in range(14):
        first = study.ask()
        values = [first.suggest_float(key, 0, 1) for key in ("a", "b")]
        again = optuna.trial.Trial(study, first._trial_id)
        assert [again.suggest_float(key, 0, 1) for key in ("a", "b")] == values
        study.tell(first, values[0])
        other = optuna.create_study(sampler=TrialSampler(3), direction="maximize")
        other.add_trials(study.trials[:number])
        trial = other.ask()
        assert [trial.suggest_float(key, 0, 1) for key in ("a", "b")] == values
    assert len({trial.params["a"] for trial in study.trials}) == 14
    assert TrialSampler(4).sample_independent(study, study.trials[0], "a", FloatDistribution(0, 1)) not in {
        trial.params["a"] for trial in study.trials
    }


def test_values_that_give_nan_or_a_config_that_is_not_valid_fail_a_trial_only(tmp_path):
    def fail(run):
        config = OmegaConf.load(run / "config.yaml")
        if config.algo.gamma > 0.7:
            raise NotFiniteError("not finite after 3 updates: train/loss")
        if config.algo.gamma < 0.3:
            raise ConfigError("algo.batch_size does not divide the rollout")
        learn(run)

    study, ended = work(tmp_path / "study", fail, number=8, at_once=2)
    assert ended
    for trial in study.trials:
        assert (trial.state == TrialState.FAIL) == (not 0.3 <= trial.params["algo.gamma"] <= 0.7)
    assert {trial.state for trial in study.trials} == {TrialState.FAIL, TrialState.COMPLETE}


def test_a_run_that_ends_without_an_evaluation_fails_its_trial_only(tmp_path):
    """A user's callback may stop hopeless runs early."""

    def stop_early(run):
        learn(run)
        if OmegaConf.load(run / "config.yaml").algo.gamma > 0.5:
            (run / "metrics.csv").write_text("env_steps,eval/return_mean,eval/return_std\n")

    study, ended = work(tmp_path / "study", stop_early, number=6, at_once=2)
    assert ended
    for trial in study.trials:
        assert (trial.state == TrialState.FAIL) == (trial.params["algo.gamma"] > 0.5)
    assert {trial.state for trial in study.trials} == {TrialState.FAIL, TrialState.COMPLETE}


@pytest.mark.parametrize("error", [FolderError("run=x can't be written: No space left on device"), LockedError("y")])
def test_a_folder_that_fails_does_not_fail_its_trial(error, tmp_path):
    def fail(_):
        raise error

    with pytest.raises(RunError, match="the same command continues the search"):
        work(tmp_path / "study", fail, number=3)
    assert [trial.state for trial in load_study(tmp_path / "study").trials] == [TrialState.RUNNING]


def test_another_failure_ends_the_command_and_the_trial_is_continued(tmp_path):
    folder = tmp_path / "study"

    def fail_once(run):
        if not (folder / ".failed").exists():
            (folder / ".failed").touch()
            raise RunError("run can't be written: No space left on device")
        learn(run)

    with pytest.raises(RunError, match=r"trial 0: .* failed: run can't be written: No space left on device"):
        work(folder, fail_once, number=3)
    study, ended = work(folder, fail_once, number=3)
    assert ended
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 3


def test_a_trial_that_fails_twice_does_not_block_the_study(tmp_path):
    def fail(run):
        if run.parent.name == "0000":
            raise RunError("out of memory")
        learn(run)

    with pytest.raises(RunError, match=r"trial 0: .* failed: out of memory"):
        work(tmp_path / "study", fail, number=3)
    study, ended = work(tmp_path / "study", fail, number=3)
    assert ended
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


def test_a_machine_that_cannot_train_does_not_use_up_the_trials(tmp_path):
    def fail(_):
        raise ConfigError("No supported gpu backend found!")

    with pytest.raises(RunError, match=r"trial 1: .* No supported gpu backend found! .*; the same command"):
        work(tmp_path / "study", fail, number=4)
    assert [trial.state for trial in load_study(tmp_path / "study").trials] == [TrialState.FAIL, TrialState.RUNNING]
    study, ended = work(tmp_path / "study", number=4)
    assert ended
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, *[TrialState.COMPLETE] * 3]


def test_the_pruner_is_asked_once_per_evaluation_and_once_when_a_trial_is_reopened(tmp_path, monkeypatch):
    asked, parent, folder = [], os.getpid(), tmp_path / "study"
    should_prune = optuna.Trial.should_prune

    def ask(trial):
        asked.append(trial.number)
        return should_prune(trial)

    def learn_and_stop(run):
        learn(run)
        time.sleep(0.4)  # some turns of the study
        if run.name == "s1":
            os.kill(parent, signal.SIGTERM)
            time.sleep(60)

    monkeypatch.setattr(optuna.Trial, "should_prune", ask)
    assert not work(folder, learn_and_stop, number=1)[1]
    assert asked == [0] * 8  # four evaluations of each seed
    assert work(folder, number=1)[1]
    assert asked == [0] * 9


def test_a_trial_of_another_command_is_not_waited_for(tmp_path, monkeypatch):
    folder = tmp_path / "study"
    study, _ = open_study(folder, list(WORDS), SPACE, 2)
    lock = trial_folder(folder, study.ask().number) / ".lock"
    script = "from levin.runs.folder import lock_file, Path\n"
    script += f"with lock_file(Path({str(lock)!r}), ''):\n    print('ready', flush=True); input()"
    other = start_python("-c", script, stdin=subprocess.PIPE)
    assert "ready" in other.stdout.readline()
    waits = []
    with Scheduler(learn, Resources(1, 1)) as scheduler, monkeypatch.context() as patch:
        patch.setattr(time, "sleep", waits.append)
        trials = Trials(
            study=study,
            folder=folder,
            space=SPACE,
            make_configs=configs,
            number=1,
            scheduler=scheduler,
            table=Table({}, folder),
        )
        assert trials._continue_trial() is None
    assert not waits
    other.communicate("\n")
    assert trials._continue_trial().trial.number == 0


def test_a_run_that_is_killed_is_started_again(tmp_path):
    def die_once(run):
        if not (run / "died").exists():
            (run / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        learn(run)

    study, ended = work(tmp_path / "study", die_once, number=2)
    assert ended
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2


def test_two_commands_share_a_study(tmp_path):
    folder = tmp_path / "study"
    other = os.fork()
    if not other:
        try:
            os._exit(0 if work(folder, lambda run: (time.sleep(0.05), learn(run)))[1] else 1)
        finally:
            os._exit(2)
    study, ended = work(folder, lambda run: (time.sleep(0.05), learn(run)))
    assert ended
    assert os.waitpid(other, 0)[1] == 0
    assert [trial.number for trial in study.trials] == [*range(12)]
    assert {trial.state for trial in study.trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert len(list(folder.glob("trials/*/s*/config.yaml"))) == 24


def test_a_line_that_a_full_disk_cut_off_is_removed_from_the_journal(tmp_path):
    study, _ = work(tmp_path / "study", number=1)
    with (tmp_path / "study" / "study.log").open("a") as journal:
        journal.write('{"op_code":4,"worker')
    study, ended = work(tmp_path / "study", number=2)
    assert ended
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert len(load_study(tmp_path / "study").trials) == 2


def test_a_lock_that_a_killed_command_has_left_in_the_journal_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work(Path("study"), number=1)
    kill = "import os; from levin.tuning import study;"
    kill += "study._open_journal(study.Path('study/study.log'))._backend._lock.acquire(); os.kill(os.getpid(), 9)"
    assert run_python("-c", kill, cwd=tmp_path).returncode == -signal.SIGKILL
    study, ended = work(Path("study"), number=2)
    assert ended
    assert len(study.trials) == 2


def test_a_study_of_runs_that_stop_before_their_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.max_time=00:00:00:01 stops runs before their end"):
        open_study(tmp_path / "study", [*WORDS, "+trainer.max_time=00:00:00:01"], SPACE, 2)
    assert not list(tmp_path.iterdir())


def test_another_study_in_the_same_folder_is_refused(straight, tmp_path):
    folder = tmp_path / "study"
    open_study(folder, list(WORDS), SPACE, 2)
    open_study(folder, list(WORDS)[::-1], SPACE, 2)
    other_space = {**SPACE, "algo.tau": FloatDistribution(0, 1)}
    for space, seeds, sentence in ((other_space, 2, "search space"), (SPACE, 3, "number of seeds")):
        with pytest.raises(ConfigError, match=f"holds a search with another {sentence}.*; it was started by"):
            open_study(folder, list(WORDS), space, seeds)
    with pytest.raises(ConfigError, match="holds a search with another config"):
        open_study(folder, [*WORDS, "algo.batch_size=8"], SPACE, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="exists already, and is not a search"):
        open_study(tmp_path / "mine", list(WORDS), SPACE, 2)
    with pytest.raises(ConfigError, match="holds no search"):
        load_study(tmp_path / "mine")


def test_a_study_is_shown_as_tables_and_a_picture(straight, tmp_path):
    table = trials_table(straight)
    assert table.startswith("12 trials: ")
    best = straight.best_trial
    assert table.splitlines()[2].split()[0] == str(best.number)
    lines = importance_table(straight).splitlines()
    assert lines[1].split()[0] == "algo.gamma"
    assert draw_history(straight, tmp_path).stat().st_size > 10_000
    empty = optuna.create_study(direction="maximize")
    assert "needs two complete trials" in importance_table(empty)
    assert draw_history(empty, tmp_path).exists()
