"""Estimators of gradients of expectations: score function, pathwise, Gumbel-softmax and others.

Start reading at `README.md`, which compares them, or at `base.py`, which defines their interface.
"""

from levin.estimators.base import Draws, Estimator, attach_score, magic_box
from levin.estimators.binary import ARM, ARMS, DisARM
from levin.estimators.control_variates import LAX, REBAR, RELAX
from levin.estimators.graph import StochasticGraph
from levin.estimators.measure_valued import MeasureValued
from levin.estimators.pathwise import (
    DecoupledStraightThrough,
    GumbelRao,
    GumbelSoftmax,
    ReinMax,
    Reparameterized,
    StraightThrough,
)
from levin.estimators.score import Dice, Exact, LeaveOneOut, MovingAverage, OptimalConstant, ScoreFunction, SelfCritical
from levin.estimators.subsets import SumAndSample, UnorderedSet, WithoutReplacement

__all__ = [
    "ARM",
    "ARMS",
    "LAX",
    "REBAR",
    "RELAX",
    "DecoupledStraightThrough",
    "Dice",
    "DisARM",
    "Draws",
    "Estimator",
    "Exact",
    "GumbelRao",
    "GumbelSoftmax",
    "LeaveOneOut",
    "MeasureValued",
    "MovingAverage",
    "OptimalConstant",
    "ReinMax",
    "Reparameterized",
    "ScoreFunction",
    "SelfCritical",
    "StochasticGraph",
    "StraightThrough",
    "SumAndSample",
    "UnorderedSet",
    "WithoutReplacement",
    "attach_score",
    "magic_box",
]
