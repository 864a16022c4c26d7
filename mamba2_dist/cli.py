"""The command `mamba2-dist`: every mistake of a user ends in one line that says what to do."""

import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn

USAGE = """usage: mamba2-dist COMMAND ...

  train CONFIG.yaml [key=value ...]   train a model, or go on where the run stopped; `train --help` lists the keys
  sample RUN [key=value ...]          print text from a run's newest checkpoint
  preprocess out=FOLDER [key=value]   tokenize text into Megatron's datasets; `preprocess --help` lists the keys
  plan CONFIG.yaml [--gpus 8,64]      model a step on more GPUs than there are; `plan --help` lists the keys
  calibrate [out=FILE.json]           measure this machine's links for `machine=FILE.json` of plan and train
  doctor [--ledger]                   versions, devices, and a check that split models equal whole ones here; what
                                      those communicate
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 2 after a user's mistake."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": _train,
        "sample": _sample,
        "preprocess": _preprocess,
        "plan": _plan,
        "calibrate": _calibrate,
        "doctor": _doctor,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if arguments[0] not in commands:
        _fail(f"unknown command {arguments[0]!r}; commands are {', '.join(commands)}")
    try:
        commands[arguments[0]](arguments[1:])
    except ValueError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error}; check that the path exists and may be written")
    except KeyboardInterrupt:
        _fail("interrupted; run the same command to go on")


def _train(arguments: list[str]) -> None:
    from mamba2_dist.train.config import TrainConfig

    if not arguments:
        _fail("train needs a CONFIG.yaml or key=value, such as examples/hybrid.yaml; see train --help")
    config = parse(TrainConfig, "train", arguments, with_file=True)
    if "RANK" not in os.environ and config.parallel.processes > 1:
        from mamba2_dist.launch import launch

        # what can be refused is refused here, once, before any process starts
        from mamba2_dist.train.trainer import check

        check(config)
        raise SystemExit(launch(config.parallel.processes, ["-m", "mamba2_dist", "train", *arguments]))
    from mamba2_dist.train.trainer import train

    folder = train(config)
    if int(os.environ.get("RANK", 0)) == 0 and config.sample_tokens > 0:
        from mamba2_dist.train.sample import SampleConfig, sample

        print(sample(SampleConfig(run=str(folder), prompt=config.prompt, tokens=config.sample_tokens)))


def _sample(arguments: list[str]) -> None:
    from mamba2_dist.train.sample import SampleConfig, sample

    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        arguments = [f"run={arguments[0]}", *arguments[1:]]
    print(sample(parse(SampleConfig, "sample", arguments)))


def _preprocess(arguments: list[str]) -> None:
    from mamba2_dist.train.preprocess import PreprocessConfig, preprocess

    print(preprocess(parse(PreprocessConfig, "preprocess", arguments)))


def _plan(arguments: list[str]) -> None:
    from mamba2_dist.plan import PlanConfig, plan

    if not arguments:
        _fail("plan needs a CONFIG.yaml or key=value, such as examples/hybrid_1_3b.yaml; see plan --help")
    plan(parse(PlanConfig, "plan", _gpus(arguments), with_file=True))


def _calibrate(arguments: list[str]) -> None:
    from mamba2_dist.calibrate import CalibrateConfig, calibrate

    raise SystemExit(calibrate(parse(CalibrateConfig, "calibrate", arguments)))


def _gpus(arguments: list[str]) -> list[str]:
    """`--gpus 8,64`, `--gpus=8,64` and `gpus=8,64` written as `gpus=[8,64]`."""
    rest, given, counts = iter(arguments), [], None
    for argument in rest:
        key, _, value = argument.removeprefix("--").partition("=")
        if key != "gpus":
            given.append(argument)
            continue
        value = (next(rest, "") if argument == "--gpus" else value).strip("[]")
        if not re.fullmatch(r"\d+(,\d+)*", value):
            raise ValueError(f"gpus must be numbers with commas between them, as in gpus=8,64, got {value!r}")
        if counts is not None:
            raise ValueError(f"gpus was given twice ({counts} and {value}); give it once, as in gpus=8,64")
        counts = value
        given.append(f"gpus=[{value}]")
    return given


def _doctor(arguments: list[str]) -> None:
    from mamba2_dist.doctor import doctor

    if arguments not in ([], ["--ledger"]):
        _fail(f"doctor takes --ledger or nothing, got {' '.join(arguments)}")
    raise SystemExit(0 if doctor(ledger=bool(arguments)) else 1)


def parse(kind: type, command: str, arguments: Sequence[str], *, with_file: bool = False):
    """A configuration from `[FILE.yaml] key=value ...`. Raises ValueError for keys and values that do not fit."""
    from jsonargparse import ArgumentError, ArgumentParser

    file = "CONFIG.yaml" if with_file else {"sample": "RUN"}.get(command, "")
    parser = ArgumentParser(exit_on_error=False)
    if with_file:
        parser.add_argument("--config", action="config")
    parser.add_class_arguments(kind, as_group=False)
    given = []
    for argument in arguments:
        key, equals, _value = argument.partition("=")
        if argument in ("-h", "--help"):
            print(_help(kind, command, file))
            raise SystemExit(0)
        if equals and re.fullmatch(r"[A-Za-z_][\w.]*", key):
            _check_key(kind, key)
            given.append(f"--{argument}")
        elif with_file and not argument.startswith("-"):
            if not os.path.isfile(argument):
                raise ValueError(f"configuration {argument} does not exist; give a YAML file, then key=value")
            _check_yaml(kind, argument)
            given += ["--config", argument]
        else:
            raise ValueError(f"argument {argument!r} is not understood; options are written key=value")
    try:
        options = parser.instantiate(parser.parse_args(given)).as_dict()
    except (ArgumentError, TypeError) as error:
        raise ValueError(_plain(error)) from None
    options.pop("config", None)
    return kind(**options)


_YAML = {str(MISSING): "", "None": "null", "True": "true", "False": "false"}


def _help(kind: type, command: str, file: str) -> str:
    """Every key with its default and what it means, as the dataclasses say."""
    import docstring_parser

    lines = [" ".join(["usage: mamba2-dist", command, *file.split(), "[key=value ...]"]), "", str(kind.__doc__), ""]

    def describe(group: Any, prefix: str) -> None:
        # a class says what its own fields mean, not those it inherits
        about = {
            item.arg_name: item.description
            for base in reversed(group.__mro__[:-1])
            for item in docstring_parser.parse_from_object(base).params
        }
        nested = [item for item in fields(group) if is_dataclass(item.type)]
        for item in fields(group):
            if item not in nested:
                default = _YAML.get(str(item.default), item.default)
                lines.append(f"  {f'{prefix}{item.name}={default}':38} {about[item.name]}")
        for item in nested:
            lines.extend(["", f"{prefix}{item.name}: {about[item.name]}"])
            describe(item.type, f"{prefix}{item.name}.")

    describe(kind, "")
    return "\n".join(lines)


def _plain(error: BaseException) -> str:
    """The parser's message in one line."""
    text = " ".join(str(error).split())
    return re.sub(r"^Parser key \"([\w.]+)\":", r"\1:", text)


def _check_yaml(kind: type, file: str) -> None:
    """Raise ValueError for a file that is not YAML, not a mapping, or has unknown keys."""
    import yaml

    try:
        with open(file) as stream:
            content = yaml.safe_load(stream)
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {file} is not YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ValueError(f"configuration {file} is not a text file") from None
    if not isinstance(content, dict):
        raise ValueError(f"configuration {file} must hold 'key: value' lines, got {type(content).__name__}")

    def walk(keys: dict, prefix: str) -> None:
        for key, value in keys.items():
            _check_key(kind, f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    walk(content, "")


def _check_key(kind: type, key: str) -> None:
    """Raise ValueError with the nearest known key unless `key` is one."""
    known = list(_keys(kind))
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1) or [k for k in known if k.endswith(f".{key}")]
        remedy = f"did you mean {near[0]}?" if near else "see --help for the keys"
        raise ValueError(f"unknown key {key!r}; {remedy}")


def _keys(kind: Any, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        yield prefix + item.name
        if is_dataclass(item.type):
            yield from _keys(item.type, f"{prefix}{item.name}.")


def _fail(message: str) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    print(f"{f'[rank {rank}] ' if rank else ''}mamba2-dist: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)
