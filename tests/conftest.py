import gc
import os
import signal
import tempfile
import warnings
from pathlib import Path

import pytest
import torch

import fast_composing

# Processes started by tests must find the toy envs and algorithms as well.
PLACES = (Path(__file__).parent, Path(__file__).parent / "support")
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, PLACES), *filter(None, [os.environ.get("PYTHONPATH")])])
# Runs that tests begin are not recorded in the user's home (levin.runs.trust).
STATE = tempfile.TemporaryDirectory(prefix="levin-test-state-")  # removed when the tests end
os.environ["XDG_STATE_HOME"] = STATE.name
# No test may send data to the server of a logger.
os.environ["WANDB_MODE"] = "offline"
# Tests may run in a SLURM job, which they must not requeue, or under nohup, and in a checkout of another user.
for name in [name for name in os.environ if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]:
    del os.environ[name]
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # what they start would inherit that, but not a handler
    signal.signal(signal.SIGHUP, lambda *_: None)
os.environ |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
warnings.filterwarnings("ignore", message=".*out of date.*")
# No test cuts the power, so no file must reach the disk. Tests that count the calls wrap this function.
os.fsync = lambda _: None
fast_composing.parse_once()

# Tests of `make test-quick`: mathematics, networks, spaces, configs, envs and rollouts, without whole runs.
QUICK = (
    *("core", "data", "bench", "scripts/test_proof.py"),
    *("collectors/test_collectors.py", "collectors/test_reported_numbers.py"),
    *("config/test_config.py", "envs/test_envs.py", "envs/test_ids.py", "runs/test_checkpoint.py"),
    *("estimators/test_estimators.py", "estimators/test_graph.py"),
    *("estimators/test_other_distributions.py", "algorithms/test_on_policy.py", "algorithms/test_dreamer_v3.py"),
    *("algorithms/test_dreamer_v3_world_model.py", "algorithms/test_dreamer_v3_numbers.py"),
    *("test_algorithm_pages.py", "test_lecture.py"),
)
QUICK_CHECKS = (  # of tests/checks.py, for every row
    *("optimizers_step_and_parameters_move", "targets_follow_their_source", "losses_equal_the_oracle"),
    *("truncation_bootstraps_and_termination_does_not", "yaml_and_signature_agree"),
)

# Tests of `make test-long`: half of the time of all. CI runs them too; `make test` leaves them out.
LONG = (
    *("collectors/test_torchrl.py", "commands/test_start.py", "commands/test_tune.py", "estimators/test_unbiased.py"),
    *("deploy/test_export.py", "results/test_reproduce.py", "runs/test_damage.py", "training/test_data_parallel.py"),
    *("training/test_hogwild.py", "training/test_interruption.py", "tuning/test_study.py"),
    *("scripts/test_new.py", "test_notebook.py", "test_results_explorer.py", "test_toy.py"),
)
LONGEST = (*LONG, "test_documentation.py", "algorithms/test_algorithms.py")
LONG_FUNCTIONS = {
    "algorithms/test_action_masks.py": (
        "test_the_best_allowed_action_is_learned",
        "test_a_resumed_run_with_masks_is_identical",
        "test_compiled_losses_with_masks_are_the_same",
        "test_masks_are_obeyed_in_mixed_precision",
        "test_other_collectors_obey_masks",
    ),
    "algorithms/test_dreamer.py": ("test_every_hyper_parameter_has_an_effect",),
    "algorithms/test_dreamer_v3_replay.py": ("test_actions_rewards_and_observations_are_aligned",),
    "algorithms/test_off_policy.py": (
        "test_estimators_of_the_actor_are_compiled_once_and_captured",
        "test_every_hyper_parameter_has_an_effect",
    ),
    "algorithms/test_on_policy.py": ("test_variants_are_compiled_once_as_well",),
    "algorithms/test_replay_options.py": (
        "test_a_resumed_run_is_identical",
        "test_losses_are_compiled_once_and_captured",
    ),
    "algorithms/test_world_models.py": (
        "test_a_run_resumed_in_any_stage_is_identical",
        "test_every_hyper_parameter_has_an_effect",
    ),
    "collectors/test_batched.py": (
        "test_a_compiled_step_gives_the_same_rollout",
        "test_the_step_of_an_algorithm_can_be_compiled",
    ),
    "collectors/test_batched_docs.py": ("test_the_documented_env_learns",),
    "commands/test_fork.py": (
        "test_a_fork_trains_with_its_own_loss_and_merges_with_upstream",
        "test_a_new_keyword_of_a_fork_is_in_the_config_of_its_runs",
    ),
    "envs/test_atari.py": ("test_a_resumed_dqn_run_is_identical", "test_games_resume_after_a_lost_life"),
    "envs/test_batched_envs.py": ("test_compiled_steps_and_resets_are_the_same",),
    "envs/test_careless_envs.py": (
        "test_an_env_that_uses_the_global_generators_is_independent_of_evaluations",
        "test_an_env_that_uses_the_global_generators_resumes_exactly",
        "test_an_env_that_writes_into_its_action_changes_nothing",
    ),
    "envs/test_pictures.py": ("test_minigrid",),
    "results/test_report.py": (
        "test_manual_changes_to_a_result_are_detected",
        "test_report_rebuilds_missing_files",
    ),
    "runs/test_resume.py": (
        "test_a_killed_run_resumed_in_a_new_process_is_identical",
        "test_a_resumed_run_on_mujoco_is_identical",
        "test_a_run_stopped_by_a_signal_and_resumed_is_identical",
        "test_max_time_saves_the_run_and_counts_anew_after_a_resume",
    ),
    "runs/test_trust.py": ("test_ids_that_pass_another_id_on_are_not_accepted",),
    "test_architecture.py": ("test_the_drill_starts_without_pytest",),
    "training/test_guards.py": ("test_the_error_names_env_step_and_episode",),
    "training/test_loggers.py": (
        "test_a_display_that_cannot_be_opened_is_not_used",
        "test_the_video_has_a_frame_per_step_and_is_not_black",
    ),
    "training/test_train.py": (
        "test_a_replay_buffer_uses_no_more_memory_than_its_tensors",
        "test_every_sac_hyper_parameter_has_an_effect",
        "test_memory_does_not_grow",
    ),
}
LONG_CHECKS = (
    *("captured_and_eager_are_the_same", "compiled_and_eager_are_the_same", "exported_files_act_alike"),
    "learns_a_small_env",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Return the number of cores that a container may use; xdist itself counts those of the machine."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    threads = len(siblings.read_text().replace("-", ",").split(",")) if siblings.is_file() else 1  # of a core
    cores = max(1, len(os.sched_getaffinity(0)) // threads)
    quota = Path("/sys/fs/cgroup/cpu.max")
    allowed, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cores if allowed == "max" else max(1, min(cores, int(allowed) // int(period)))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items):
    for item in items:
        path = item.path.relative_to(Path(__file__).parent)
        check = getattr(item, "callspec", None) and item.callspec.params.get("check")
        check = getattr(check, "__name__", "") if path.name == "test_algorithms.py" else ""
        if check in QUICK_CHECKS or any(path.is_relative_to(each) for each in QUICK):
            item.add_marker("quick")
        names = LONG_FUNCTIONS.get(str(path), ())
        if check in LONG_CHECKS or str(path) in LONG or getattr(item, "originalname", "") in names:
            item.add_marker("long")
    # Longest files first, so that no worker is left with one of them at the end.
    items.sort(key=lambda item: str(item.path.relative_to(Path(__file__).parent)) not in LONGEST)


def pytest_collection_finish():
    # What was imported and collected stays, so the garbage collector need not visit it in each of its passes.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["extension", "stand-in"])
def trees(request, monkeypatch):
    """Run a test of prioritized replay with TorchRL's C++ trees, and with a stand-in for them."""
    import segment_trees

    if request.param == "stand-in":
        segment_trees.use(monkeypatch)
    elif not segment_trees.LOADS:
        pytest.skip(segment_trees.REASON)


@pytest.fixture
def some_trees(monkeypatch):
    """Use TorchRL's C++ trees of priorities, or a stand-in where they do not load."""
    import segment_trees

    if not segment_trees.LOADS:
        segment_trees.use(monkeypatch)


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread: results depend on the number of threads, and small networks are faster with one."""
    torch.set_num_threads(1)
