"""Write assets/flags.json, all flags of the script: again after each update of TRL or transformers.

python -m assets.research.flags
"""

import argparse
import json
from importlib.metadata import version

from trl import ModelConfig

import grpo_demo
from assets.common import FLAGS
from assets.settings import Parser

KINDS = {"int": "int", "float": "float", "string_to_bool": "bool"}  # names of argparse's types


def collect() -> list[dict | list]:
    """Return the packages' versions; names and options of each flag, as in TRL's parser."""
    flags = [{package: version(package) for package in ("trl", "transformers")}]
    for action in Parser([grpo_demo.DemoConfig, ModelConfig])._actions[1:]:  # not --help
        options = {"dest": action.dest, "help": action.help, "default": action.default}
        if isinstance(action, argparse._StoreFalseAction):
            options["action"] = "store_false"
        else:
            name = getattr(action.type, "__name__", "str")
            options |= {"nargs": action.nargs, "type": KINDS.get(name, "str")}
            options |= {"const": action.const, "choices": action.choices and list(action.choices)}
        flags.append([action.option_strings, {k: v for k, v in options.items() if v is not None}])
    return json.loads(json.dumps(flags, default=str))


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(flag) for flag in collect())
    FLAGS.write_text(f"[\n{lines}\n]\n")
