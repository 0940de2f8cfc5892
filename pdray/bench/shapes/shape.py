"""An arrangement of workers, as it is written on a command line: 2P2D, 4C, "4C --max-num-batched-tokens 2048"."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any, NamedTuple, NoReturn

from pdray.errors import ConfigError
from pdray.options import add_config_arguments, config_from_values, config_values, options_of

DISAGGREGATED = re.compile(r"([1-9]\d*)P([1-9]\d*)D")
COLOCATED = re.compile(r"([1-9]\d*)C")


class Shape(NamedTuple):
    """Attributes:
    name: as it was given.
    config: fields of Config.
    num_routers: see `pdray serve --num-routers`.
    """

    name: str
    config: dict[str, Any]
    num_routers: int

    @property
    def num_workers(self) -> int:
        prefill = self.config["num_prefill_workers"] if self.config["mode"] == "disaggregated" else 0
        return int(prefill + self.config["num_decode_workers"])

    def serve_options(self) -> list[str]:
        """Of `pdray serve`."""
        model = [self.config["model"]] if "model" in self.config else []
        fields = {name: value for name, value in self.config.items() if name != "model"}
        return [*model, *options_of(fields), f"--num-routers={self.num_routers}"]


def parse_shape(text: str, common: dict[str, Any]) -> Shape:
    """A word and options of `pdray serve`: xPyD is x prefill and y decode workers, xC is x that do both.

    Args:
        common: fields of Config for every shape; a shape's own come over them.

    Raises:
        ConfigError: another word, an option that is none, or a value that Config refuses.
    """
    try:
        word, *options = shlex.split(text) or [""]
    except ValueError as error:
        raise ConfigError(f"shape {text!r} cannot be read: {error}") from None
    workers: dict[str, Any]
    if match := DISAGGREGATED.fullmatch(word):
        prefill, decode = map(int, match.groups())
        workers = {"mode": "disaggregated", "num_prefill_workers": prefill, "num_decode_workers": decode}
    elif match := COLOCATED.fullmatch(word):
        workers = {"mode": "colocated", "num_decode_workers": int(match[1])}
    else:
        raise ConfigError(f"shape {text!r} must begin with xPyD, as 2P2D, or with xC, as 4C")
    parser = _Options(text)
    parser.add_argument("--num-routers", type=int, default=1)
    add_config_arguments(parser)
    args = parser.parse_args(options)
    if args.num_routers < 1:
        raise ConfigError(f"shape {text!r}: --num-routers {args.num_routers} must be at least 1")
    own = config_values(args)
    if twice := sorted({"mode", "num_prefill_workers", "num_decode_workers"} & (own.keys() | common.keys())):
        raise ConfigError(f"shape {text!r} says by itself what {', '.join(twice)} is; leave it out of the options")
    config = common | own | workers
    if "api_key" in config:
        raise ConfigError(
            f"shape {text!r}: --api-key would be in the results; set $PDRAY_API_KEY, for server and clients"
        )
    try:
        config_from_values(config)
    except ConfigError as error:
        raise ConfigError(f"shape {text!r}: {error}") from None
    return Shape(text, config, args.num_routers)


class _Options(argparse.ArgumentParser):
    """Raises instead of ending the process."""

    def __init__(self, shape: str) -> None:
        super().__init__(prog="pdray serve", add_help=False, allow_abbrev=False)
        self._shape = shape

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"shape {self._shape!r}: {message}; its options are those of `pdray serve`")
