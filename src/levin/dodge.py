"""Register `levin.dodge:Dodge-v0`, the id that configs and stored results name. The env is `levin.envs.dodge`."""

from levin.envs.dodge import Dodge  # noqa: F401
