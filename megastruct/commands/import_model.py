"""Make a Hugging Face model the first weights of a run: megastruct-import FOLDER CONFIG.yaml [section.key=value ...].

The run folder of the config must be new. Afterwards the usual command trains: ./launch.sh CONFIG.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megastruct.config.load import load_config
from megastruct.config.schema import Config
from megastruct.console import command
from megastruct.data import Tokenizer, open_tokenizer
from megastruct.data.options import tokenizer_options_of
from megastruct.data.tokens.manifest import load_manifest
from megastruct.errors import user_errors_exit
from megastruct.huggingface.first_checkpoint import check_new, write_first_checkpoint
from megastruct.huggingface.first_weights import check_source, first_weights
from megastruct.huggingface.source import open_source, read_pieces
from megastruct.paths import option_path
from megastruct.run.run_folder import RunFolder


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Write the run folder with its first checkpoint. A user's mistake exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=option_path, help="a model of transformers: config.json and safetensors")
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--ignore-tokenizer", action="store_true", help="do not compare the run's tokenizer with the folder's"
    )
    args = parser.parse_args(argv)
    with user_errors_exit():
        config = load_config(args.config, args.overrides)
        run = RunFolder(config)
        check_new(run)
        source, tokenizer = open_source(args.folder), _tokenizer(config)
        check_source(source, config, None if args.ignore_tokenizer else tokenizer)
        if not args.ignore_tokenizer and read_pieces(source.folder) is None:
            print(
                f"{args.folder} has no tokenizer.json: whether its ids are those of the run is not known",
                file=sys.stderr,
            )
        weights = first_weights(source, config)
        write_first_checkpoint(run, weights, tokenizer, str(args.folder.absolute()))
    for projection in [*weights.projections, weights.overall()] if weights.projections else []:
        print(f"{projection.name}: relative error {projection.relative_error:.6f}")
    count = sum(tensor.numel() for tensor in weights.tensors.values())
    print(f"{run.path}: {count:,} first weights from {args.folder} ({source.stock.architecture})")


def _tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that the run will have: the config's, or that of its token shards."""
    if config.data.tokenizer:
        return open_tokenizer(
            Path(config.data.tokenizer).expanduser(), "data.tokenizer", tokenizer_options_of(config.data)
        )
    folder = Path(config.data.sources[0][0]).expanduser()
    return open_tokenizer(folder / load_manifest(folder).settings.tokenizer.file)
