"""Types for `__init__` hints: number ranges and names. `levin.config.schema.check` checks YAML values against them."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Fraction = Annotated[float, Field(ge=0, le=1)]
Schedule = Literal["constant", "linear"]
PolicyFormat = Literal["onnx", "torch"]
OptimizerName = Literal["adam", "rmsprop", "sgd"]
Activation = Literal["relu", "tanh", "elu", "silu"]
VectorNetwork = Literal["mlp", "layer_norm", "simba", "resnet"]
PixelNetwork = Literal["nature", "impala", "small"]
# Network for vectors, CNN for pixels, or a class of the user's own: {_target_: my_module.MyTrunk, <its values>}.
Network = Literal[VectorNetwork, PixelNetwork] | dict[str, Any]

__all__ = [
    "Activation",
    "Fraction",
    "Network",
    "NonNegativeFloat",
    "NonNegativeInt",
    "OptimizerName",
    "PixelNetwork",
    "PolicyFormat",
    "PositiveFloat",
    "PositiveInt",
    "Schedule",
    "VectorNetwork",
]
