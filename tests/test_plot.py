"""The picture of curves."""

import csv
import gzip

import imageio.v3
import numpy as np
import pytest

from levin.errors import ConfigError
from levin.plot import plot, read


def test_seeds_of_one_folder_are_one_curve(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` draws")
    for seed in range(3):
        folder = tmp_path / "sac_point" / f"s{seed}"
        folder.mkdir(parents=True)
        with (folder / "metrics.csv").open("w") as file:
            writer = csv.DictWriter(file, ["env_steps", "eval/return_mean"])
            writer.writeheader()
            writer.writerows({"env_steps": x, "eval/return_mean": x + seed} for x in range(0, 1000, 100))
            writer.writerow({"env_steps": 1000})  # a row without an evaluation
    picture = imageio.v3.imread(plot(runs=f"{tmp_path}/sac_point/*", out=str(tmp_path / "plot.png")))
    assert picture.shape[:2] == (600, 1050)
    assert picture.std() > 10
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 10


def test_a_result_in_git_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` draws")
    with gzip.open(tmp_path / "curves.csv.gz", "wt") as file:
        file.write("seed,env_steps,return_mean,return_std\n0,100,1,0\n0,200,3,0\n1,100,2,0\n1,200,4,0\n")
    curves = read(tmp_path)
    assert [(steps.tolist(), returns.tolist()) for steps, returns in curves] == [
        ([100, 200], [1.0, 3.0]),
        ([100, 200], [2.0, 4.0]),
    ]
    assert plot(runs=str(tmp_path), out=str(tmp_path / "plot.png")).exists()


def test_nothing_to_draw_is_one_sentence(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` draws")
    with pytest.raises(ConfigError, match="matches no folder"):
        plot(runs=f"{tmp_path}/none/*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no run and no result"):
        plot(runs=str(tmp_path / "empty"))
