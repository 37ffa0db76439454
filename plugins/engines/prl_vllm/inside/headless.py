"""`python -m prl_vllm.inside.headless ARGUMENTS`: engine cores of one more node of an engine, no API server.

What `vllm serve --headless` does, by vLLM's own command. The console script itself asks for the metadata of a
distribution that the CPU build does not have by that name.
"""

from __future__ import annotations

import sys


def main(words: list[str]) -> None:
    from vllm.entrypoints.cli import serve

    command = serve.ServeSubcommand()
    parser = serve.FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(required=True))
    command.cmd(parser.parse_args([command.name, "--headless", *words]))


if __name__ == "__main__":  # vLLM starts its cores by spawning, which imports this module again
    main(sys.argv[1:])
