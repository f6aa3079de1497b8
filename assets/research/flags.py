"""Write assets/flags.json, all flags of the script: again after each update of TRL or transformers.

python -m assets.research.flags
"""

import argparse
import json
from enum import EnumType
from typing import get_type_hints

from trl import ModelConfig, TrlParser

import grpo_demo
from assets.settings import FLAGS, RANGES

KINDS = {  # argparse's types; those that only Python can write are no flags
    "str": "str",
    "int": "int",
    "float": "float",
    "string_to_bool": "bool",
    "<lambda>": "str",  # a choice
    "DebugOption": "str",
    "dict": "str",
}


def collect() -> list[list]:
    """Return each flag's names, what it takes beside one value, and its options of argparse."""
    configs, flags = [grpo_demo.DemoConfig, ModelConfig], []
    hints = {name: str(x) for config in configs for name, x in get_type_hints(config).items()}
    for action in TrlParser(configs)._actions[1:]:  # not --help
        options = {"dest": action.dest, "help": action.help, "default": action.default}
        if isinstance(action, argparse._StoreFalseAction):
            options["action"] = "store_false"
        elif action.type.__name__ not in KINDS:
            continue
        else:
            options |= {"nargs": action.nargs, "type": KINDS[action.type.__name__]}
            if options["type"] == "bool":  # --bf16 alone is yes, as for all others
                options["nargs"] = "?"
            choices = action.choices or (isinstance(action.type, EnumType) and action.type)
            const = True if options["type"] == "bool" else action.const
            options |= {"const": const, "choices": list(choices) if choices else None}
        takes = [kind for kind in ("None", "list", "dict") if kind in hints[action.dest]]
        if action.dest in RANGES["a name"][1].split():
            takes = []
        options = {key: value for key, value in options.items() if value is not None}
        flags.append([action.option_strings, takes, options])
    return json.loads(json.dumps(flags, default=str))


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(flag) for flag in collect())
    FLAGS.write_text(f"[\n{lines}\n]\n")
