"""Register `levin.racing:Racing-v3`, the id that configs and stored results name. The env is `levin.envs.racing`."""

from levin.envs.racing import Racing  # noqa: F401
