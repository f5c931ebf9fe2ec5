"""A recipe as data: ordered steps and a runtime, with one text form and one YAML form that say the same.

prune(magnitude, sparsity=0.5) | quantize(rtn, bits=4, group_size=64) @ openvino(dtype=bfloat16)

steps:
  - prune: {method: magnitude, sparsity: 0.5}
  - quantize: {method: rtn, bits: 4, group_size: 64}
runtime: {name: openvino, dtype: bfloat16}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lighten.errors import RecipeError
from lighten.recipe.options import OPTIONS, Batching, Speculation, check_options, speculation_of
from lighten.recipe.predicted import KINDS, PREDICTED, require_done
from lighten.recipe.steps import STEPS
from lighten.recipe.targets import CUDA, DEVICES, RUNTIMES
from lighten.recipe.words import Parameter, StepKind

Value: TypeAlias = str | int | float | bool
DEFAULT_RUNTIME = "torch"

_CALL = re.compile(r"^\s*([A-Za-z_][\w.-]*)\s*(?:\((.*)\))?\s*$", re.DOTALL)
_PLAIN = re.compile(r"^[\w.:+-]+\Z")
_PIECES = re.compile(r""""[^"]*"|'[^']*'|.""", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step, its arguments complete (defaults filled in) and checked."""

    verb: str
    method: str
    arguments: tuple[tuple[str, Value], ...]

    def __getitem__(self, name: str) -> Any:
        return dict(self.arguments).get(name)

    @property
    def kind(self) -> StepKind:
        return KINDS[self.verb, self.method]

    @property
    def calibrated(self) -> bool:
        """Whether doing it needs calibration text."""
        return self.kind.calibrated or self["activations"] == "static" or self["weighted"] is True

    def __str__(self) -> str:
        parameters, arguments = self.kind.parameters, dict(self.arguments)
        unsaid = {name: parameter.default for name, parameter in parameters.items()} | dict(self.kind.implied(arguments))
        said = [f"{name}{_sign(parameters[name])}{_value_text(value)}" for name, value in self.arguments if value != unsaid[name]]
        return f"{self.verb}({', '.join([self.method, *said])})"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Steps in the order in which they are done, and the runtime that runs the result.

    Attributes:
        runtime: a name of `RUNTIMES`.
        dtype: the type that the runtime computes in; None: that of the weights.
        device: what it runs on: cuda; None: the CPU.
        options: of the runtime beside that, by the names of `OPTIONS` and in their order.
    """

    steps: tuple[Step, ...] = ()
    runtime: str = DEFAULT_RUNTIME
    dtype: str | None = None
    device: str | None = None
    options: tuple[tuple[str, Value], ...] = ()

    @property
    def steps_text(self) -> str:
        return " | ".join(str(step) for step in self.steps)

    @property
    def activations(self) -> Literal["dynamic", "static"] | None:
        """Whether steps ask for int8 activations: scaled from each input, or from calibration."""
        asked = {step.method if step.verb == "quantize" else None for step in self.steps} | {step["activations"] for step in self.steps}
        return "dynamic" if "dynamic" in asked else "static" if "static" in asked else None

    @property
    def labels(self) -> float | None:
        """Largest weight that a step gives true labels; None: no step takes any."""
        return max((step["labels"] for step in self.steps if "labels" in step.kind.parameters), default=None)

    def require_done(self) -> None:
        """Raises:
        RecipeError: a step that is predicted, but that nothing carries out yet.
        """
        for step in self.steps:
            require_done(str(step), (step.verb, step.method))

    @property
    def kv_dtype(self) -> str | None:
        """What cached keys and values are stored in; None where no step says it."""
        return next((f"int{step['bits']}" for step in self.steps if (step.verb, step.method) == ("quantize", "kv")), None)

    @property
    def batching(self) -> Batching:
        """How texts of different lengths come into batches."""
        found: Batching = dict(self.options).get("batching", "padded")  # type: ignore[assignment]
        return found

    @property
    def speculation(self) -> Speculation | None:
        """What proposes tokens while it decodes; None: nothing."""
        return speculation_of(dict(self.options))

    @property
    def runtime_text(self) -> str:
        said = [(name, value) for name, value in (("dtype", self.dtype), ("device", self.device)) if value] + list(self.options)
        return self.runtime + (f"({', '.join(f'{name}={_value_text(value)}' for name, value in said)})" if said else "")

    def __str__(self) -> str:
        """The text form, which parses back to the same recipe."""
        return f"{self.steps_text} @ {self.runtime_text}".strip()


def read_recipe(text_or_file: str) -> Recipe:
    """The recipe that a text says, or that the YAML or text file of that name holds.

    Raises:
        RecipeError: not a recipe; what exists is named.
    """
    path = Path(text_or_file)
    if path.suffix in (".yaml", ".yml", ".txt", ".recipe"):
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe file {path}: {error}.") from error
        return parse_recipe(content) if path.suffix in (".txt", ".recipe") else parse_yaml(content)
    return parse_recipe(text_or_file)


def parse_recipe(text: str) -> Recipe:
    """The recipe that a text says.

    >>> str(parse_recipe("quantize(rtn, bits=4) @ openvino"))
    'quantize(rtn, bits=4) @ openvino'

    Raises:
        RecipeError: a syntax error, or an unknown step, argument, value or runtime.
    """
    said, *runtimes = _split(text, "@")
    steps = tuple(_parse_step(piece) for piece in _split(said, "|")) if said.strip() else ()
    if not runtimes:
        return Recipe(steps=steps)
    if len(runtimes) > 1:
        raise RecipeError(f"recipe {text.strip()!r} names more than one runtime; write steps @ runtime.")
    runtime = runtimes[0]
    name, options = _parse_call(runtime, "runtime")
    if any(key is None for key, _ in options):
        raise RecipeError(f"runtime {runtime.strip()!r}: options are written name=value.")
    if len(dict(options)) < len(options):
        raise RecipeError(f"runtime {runtime.strip()!r} says an option twice.")
    return make_recipe(steps, name, {str(key): value for key, value in options})


def parse_yaml(text: str) -> Recipe:
    """The recipe that a YAML document says.

    Raises:
        RecipeError: not YAML of the form above.
    """
    import yaml

    from lighten.recipe.yaml_words import Loader

    try:
        document = yaml.load(text, Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"recipe: not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(document, dict) or not set(document) <= {"steps", "runtime"} or not isinstance(document.get("steps", []), list):
        raise RecipeError("recipe: a YAML recipe has `steps` (a list) and `runtime`, nothing else.")
    steps = []
    for entry in document.get("steps", []):
        if not isinstance(entry, dict) or len(entry) != 1 or not isinstance((body := next(iter(entry.values()))), dict) or "method" not in body:
            raise RecipeError(f"recipe: step {entry!r} is not of the form `verb: {{method: name, key: value}}`.")
        arguments = {str(key): value for key, value in body.items() if key != "method"}
        steps.append(make_step(str(next(iter(entry))), str(body["method"]), arguments))
    runtime = document.get("runtime", DEFAULT_RUNTIME)
    options = dict(runtime) if isinstance(runtime, dict) else {"name": runtime}
    return make_recipe(tuple(steps), str(options.pop("name", DEFAULT_RUNTIME)), options)


def format_yaml(recipe: Recipe) -> str:
    """The YAML form, which parses back to the same recipe."""
    import yaml

    from lighten.recipe.yaml_words import Dumper

    steps = [{step.verb: {"method": step.method, **dict(step.arguments)}} for step in recipe.steps]
    placed = {name: value for name, value in (("dtype", recipe.dtype), ("device", recipe.device)) if value}
    runtime = {"name": recipe.runtime} | placed | dict(recipe.options)
    return yaml.dump({"steps": steps, "runtime": runtime}, Dumper=Dumper, sort_keys=False)


def make_recipe(steps: tuple[Step, ...], runtime: str, options: Mapping[str, Any]) -> Recipe:
    """A recipe whose runtime and options exist.

    Raises:
        RecipeError: they do not.
    """
    if runtime not in RUNTIMES:
        raise RecipeError(f"runtime {runtime!r} does not exist; runtimes: {', '.join(RUNTIMES)}.")
    dtype, device = options.get("dtype"), options.get("device")
    own = {name: value for name, value in options.items() if name not in ("dtype", "device")}
    check_options(runtime, RUNTIMES[runtime].options, own)
    if device is not None and device not in DEVICES:
        raise RecipeError(f"runtime {runtime}: device={device!r} is not possible; devices: {', '.join(DEVICES)}.")
    if device == CUDA and not RUNTIMES[runtime].cuda:
        able = ", ".join(name for name, kind in RUNTIMES.items() if kind.cuda)
        raise RecipeError(f"runtime {runtime} does not run on device=cuda here; these do: {able}.")
    device = device if device == CUDA else None
    types = RUNTIMES[runtime].types_on(device)
    if dtype is not None and dtype not in types:
        where = " on device=cuda" if device else ""
        raise RecipeError(f"runtime {runtime} does not compute in {dtype!r}{where}; it computes in {', '.join(types)}.")
    chosen = tuple((name, own[name]) for name in OPTIONS if name in own)
    return Recipe(steps=steps, runtime=runtime, dtype=dtype, device=device, options=chosen)


def make_step(verb: str, method: str, given: Mapping[str, Any]) -> Step:
    """A step with all its arguments.

    Raises:
        RecipeError: an unknown verb, method, argument or value; what exists is named.
    """
    if verb not in {known for known, _ in KINDS}:
        raise RecipeError(f"step {verb!r} does not exist; steps: {', '.join(sorted({known for known, _ in STEPS}))}.{_predicted_alone()}")
    if (verb, method) not in KINDS:
        methods = [known for known_verb, known in STEPS if known_verb == verb]
        said = f"methods: {', '.join(methods)}." if methods else "none is carried out yet."
        raise RecipeError(f"{verb} has no method {method!r}; {said}{_predicted_alone(verb)}")
    kind = KINDS[verb, method]
    if unknown := set(given) - set(kind.parameters):
        known = ", ".join(kind.parameters) or "none"
        raise RecipeError(f"{verb}({method}) has no argument {', '.join(sorted(unknown))}; arguments: {known}.")
    implied = kind.implied({name: value for name, value in given.items() if kind.parameters[name].accepts(value)})
    for name, value in given.items():
        if not kind.parameters[name].accepts(value) and (name not in implied or value != implied[name]):
            raise RecipeError(f"{verb}({method}): {name}={value!r} is not possible; {name} is {kind.parameters[name].says}.")
    for name, value in implied.items():
        if given.get(name, value) != value:
            why = ", ".join(f"{each}={given[each]}" for each in ("format", "activations") if each in given)
            raise RecipeError(f"{verb}({method}): {name}={given[name]} does not go with {why}, which has {name}={_value_text(value)}; leave it out.")
    full = {name: given.get(name, implied.get(name, parameter.default)) for name, parameter in kind.parameters.items()}
    arguments = [(name, value) for name, value in full.items() if value is not None]
    step = Step(verb=verb, method=method, arguments=tuple(arguments))
    if problem := kind.check(dict(arguments)):
        raise RecipeError(f"{step}: {problem}")
    return step


def _predicted_alone(verb: str | None = None) -> str:
    """What can be said in a recipe that is predicted, and not carried out."""
    names = [f"{known}({method})" for known, method in PREDICTED if verb in (None, known)]
    return f" Predicted alone: {', '.join(names)}." if names else ""


def _parse_step(text: str) -> Step:
    verb, arguments = _parse_call(text, "step")
    if not arguments or arguments[0][0] is not None:
        raise RecipeError(f"step {text.strip()!r} names no method; write verb(method, key=value).")
    if any(key is None for key, _ in arguments[1:]):
        raise RecipeError(f"step {text.strip()!r}: after the method, arguments are written key=value.")
    keys = [str(key) for key, _ in arguments[1:]]
    method, names = str(arguments[0][1]), [key.removesuffix("<").rstrip() for key in keys]
    if len(set(names)) < len(names):
        raise RecipeError(f"step {text.strip()!r} says an argument twice.")
    kind = KINDS.get((verb, method))
    for key, name in zip(keys, names, strict=True):
        if kind is not None and name in kind.parameters and kind.parameters[name].at_most != key.endswith("<"):
            raise RecipeError(f"{verb}({method}): {name} is written {name}{_sign(kind.parameters[name])}value.")
    return make_step(verb, method, dict(zip(names, (value for _, value in arguments[1:]), strict=True)))


def _parse_call(text: str, what: str) -> tuple[str, list[tuple[str | None, Value]]]:
    found = _CALL.match(text)
    if not found:
        raise RecipeError(f"{what} {text.strip()!r} is not of the form name(argument, key=value).")
    arguments: list[tuple[str | None, Value]] = []
    for piece in _split(found[2], ",") if (found[2] or "").strip() else ():
        key, equals, value = piece.partition("=")
        arguments.append((key.strip(), _parse_value(value)) if equals else (None, _parse_value(piece)))
    return found[1], arguments


def _split(text: str, separator: str) -> list[str]:
    """The pieces of `text` between separators that stand outside quotes."""
    pieces = [""]
    for piece in _PIECES.findall(text):
        if piece in ('"', "'"):
            raise RecipeError(f"recipe {text.strip()!r}: the quote {piece} is not closed.")
        if piece == separator:
            pieces.append("")
        else:
            pieces[-1] += piece
    return pieces


def _parse_value(text: str) -> Value:
    text = text.strip()
    if len(text) > 1 and text[0] in "\"'" and text[-1] == text[0]:
        return text[1:-1]
    if text in ("true", "True", "false", "False"):
        return text in ("true", "True")
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    if not _PLAIN.match(text):
        raise RecipeError(f"value {text!r}: quote what is not a plain word or number.")
    return text


def _sign(parameter: Parameter) -> str:
    return "<=" if parameter.at_most else "="


def _value_text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if not isinstance(value, str) or (_PLAIN.match(text) and _parse_value(text) == value):
        return text
    return f"'{text}'" if '"' in text else f'"{text}"'
