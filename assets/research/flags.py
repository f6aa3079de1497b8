"""Write assets/flags.json, all flags of the script: again after each update of TRL or transformers.

python -m assets.research.flags
"""

import argparse
import json
from typing import get_type_hints

from trl import ModelConfig, TrlParser

import grpo_demo
from assets.settings import FLAGS, NOT_EMPTY

KINDS = {"int": "int", "float": "float", "string_to_bool": "bool"}  # names of argparse's types


def collect() -> list[list]:
    """Return each flag's names, what it takes beside one value, and its options of argparse."""
    configs, flags = [grpo_demo.DemoConfig, ModelConfig], []
    hints = {name: str(x) for config in configs for name, x in get_type_hints(config).items()}
    for action in TrlParser(configs)._actions[1:]:  # not --help
        options = {"dest": action.dest, "help": action.help, "default": action.default}
        if isinstance(action, argparse._StoreFalseAction):
            options["action"] = "store_false"
        else:
            name = getattr(action.type, "__name__", "str")
            options |= {"nargs": action.nargs, "type": KINDS.get(name, "str")}
            options |= {"const": action.const, "choices": action.choices and list(action.choices)}
        takes = [kind for kind in ("None", "list", "dict") if kind in hints[action.dest]]
        if action.dest in NOT_EMPTY.split():
            takes = []
        options = {key: value for key, value in options.items() if value is not None}
        flags.append([action.option_strings, takes, options])
    return json.loads(json.dumps(flags, default=str))


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(flag) for flag in collect())
    FLAGS.write_text(f"[\n{lines}\n]\n")
