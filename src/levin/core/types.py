"""Types for `__init__` hints: number ranges and names. `levin.config.schema.check` checks YAML values against them."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear"]
OptimizerName = Literal["adam", "rmsprop", "sgd"]
Activation = Literal["relu", "tanh", "elu", "silu"]

__all__ = [
    "Activation",
    "Fraction",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OptimizerName",
    "PositiveFloat",
    "PositiveInt",
    "Schedule",
]
