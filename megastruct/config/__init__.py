"""Ground floor: what a run is. Frozen values without I/O, read from YAML by `load_config`."""

from megastruct.config.load import load_config
from megastruct.config.schema import Config

__all__ = ["Config", "load_config"]
