"""Ground floor: the config of a run, as frozen values without I/O. `load_config` reads it from YAML."""

from megastruct.config.load import load_config
from megastruct.config.schema import Config

__all__ = ["Config", "load_config"]
