"""What to do to which part of a model, as data.

A recipe is a YAML file, a name of a shipped one, or a mapping with the same keys::

    prune: {name: flap, ratio: 0.2}
    weights: {bits: 4, group: 32, groups: {}, symmetric: false, zeros: fractional, method: rtn}
    activations: {bits: 8, strategy: group, dynamic: true, roles: {}}
    embedding: {bits: 8, group: 32, symmetric: true}
    head: {bits: 8, group: 32, symmetric: true}
    folds: []
    tuning: {name: scales, tokens: 32768, context: 512, rate: 0.001}
    calibration: {tokens: 16384, context: 1024, seed: 0, images: 64}
    ignore: ["re:.*down_proj", "model.layers.0.*"]
    floats: auto
    softmax: exact
    attention: {bits: auto}
    tokens: {name: agile_quant, beta: 0.2}
    sparsity: {name: chess, sparsity: 0.5, allocate: greedy}

Every key may be left out. Options given beside a recipe take the place of what it says. A key that
is not known is an error that lists the nearest ones: nothing in a recipe is ever skipped over.

``ignore`` names linears, the embedding or the head by path, by a pattern with ``*``, or by ``re:``
and a regular expression for the whole path; they stay in 16 bits. ``floats`` says in which type the
matrices are written that stay floats: ``auto`` keeps 16-bit types and writes float32 as bfloat16
and what a GGUF file had quantized as float16; ``bf16`` and ``f16`` force one. Vectors (norms,
biases) keep 32 bits if they had them.

``folds`` names at most one way to rescale channels before rounding
(:data:`nybble.quant.FOLDS`), as ``method`` does, alone or as a mapping with settings. ``tuning``
names, likewise, what is done to scales after it (:data:`nybble.quant.TUNINGS`); by default nothing.
``calibration`` says how much text is looked at by methods that do, or for an image encoder how many
images; text and images themselves are given beside the recipe.

``softmax: log2`` makes attention weigh with powers of two of 4-bit exponents while running, as
Agile-Quant (arXiv 2312.05693) does: a loss to measure, not a gain in speed here.

``attention`` is for image encoders: ``bits: 7`` multiplies queries with keys, and probabilities
with values, in codes of 7 bits, ``16`` in floats; ``auto`` takes 7 where weights and activations
have 7, else floats. The crate's ``kernels/attention/codes.rs`` says what is rounded how.

``tokens`` says which tokens of prompts are left out when the model runs: the keys of
:class:`nybble.tokens.TokenPolicy`, or the name and the settings of a method in
:data:`nybble.tokens.METHODS`. It changes no weight.

``sparsity`` names a method in :data:`nybble.sparsity.METHODS`, with its settings: which values
count as 0 when the model runs. Thresholds are found on the calibration text, with the weights as
they are written, and stored beside them. ``allocate: greedy`` lets layers differ so that the
predictions change least. With a ``tuning`` thresholds are found before it, and it trains with what
they leave.

``prune`` names a method in :data:`nybble.prune.METHODS`, with its settings: what is taken out
before anything else is looked at. What is left is calibrated and quantized like a model of its own;
kept neurons are a multiple of the weights' group. A method that takes out single weights leaves
zeros, which quantization with ``zeros: whole`` or ``symmetric: true`` keeps. Among its settings,
``recovery: {name: perp, tokens: 32768}`` names what is trained after the cut, before anything is
quantized (:data:`nybble.prune.RECOVERIES`); by default nothing.

A head that shares the embedding's matrix has the embedding's scheme, whatever ``head`` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from nybble.compress.yaml_text import parse
from nybble.errors import ArgumentError, ConfigError
from nybble.prune import METHODS as PRUNINGS
from nybble.prune import RECOVERIES, PruneMethod, Recovery, Structured
from nybble.quant import FOLDS, METHODS, TUNINGS, ScaleTuning
from nybble.quant.base import GROUPS, Quantizer, Scheme
from nybble.quant.fold import Fold
from nybble.registry import Registry, make, unknown
from nybble.runtime.files import read_text
from nybble.sparsity import METHODS as SPARSITIES
from nybble.sparsity import SparsityMethod
from nybble.tokens import settings

__all__ = ["Activations", "Calibration", "Matrix", "Recipe", "Weights", "read", "shipped"]

T = TypeVar("T")

_MAX_FILE = 1 << 20
_LAYER_ROLES = ("qkv", "out", "gate_up", "down")
_ROLES = (*_LAYER_ROLES, "project", "head")


def _check(where: str, found: object, accepted: tuple[object, ...]) -> None:
    # `True == 1` and `8.0 == 8`: a recipe that says so is mistaken all the same.
    if not any(found == value and type(found) is type(value) for value in accepted):
        shown = ", ".join("null" if value is None else str(value) for value in accepted)
        message = f"recipe: {where}: expected one of {shown}; found {found!r:.60}"
        raise ConfigError(message)


def _by_role(where: str, given: object, roles: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        message = f"recipe: {where}: expected a mapping, found {given!r:.60}"
        raise ConfigError(message)
    for role in given:
        if role not in roles:
            raise ConfigError(f"recipe: {where}: " + unknown("role", role, roles))
    return given


@dataclass(frozen=True)
class Weights:
    """The linears of the layers.

    Parameters
    ----------
    bits
        Bits a weight: 4, 8, or 16 for floats. Codes of 7 bits are stored as 8 and, with activations
        of 7 bits, go half as fast again on x86-64 without dot product instructions.
    group
        Weights that share a scale: 32, 64, 128, or ``None`` for a whole row. Where it does not
        divide a matrix's rows, that matrix has the largest smaller one that does.
    groups
        Other groups for some linears: ``qkv``, ``out``, ``gate_up``, ``down``, ``project``. Kernels
        that skip neurons apply the scales of ``down`` once a group: wide ones make them faster.
    symmetric
        Whether groups are centred on zero; ``None`` leaves it to the bits: 4-bit weights are not,
        those of 8 bits are, and those of 7 bits must be.
    zeros
        Zero points of 4-bit groups that are not: ``fractional``, in sixteenths of a code, or
        ``whole`` codes, which lose accuracy, but keep a weight of 0 and are what most other
        programs read.
    method
        A name in :data:`nybble.quant.METHODS`, or a mapping with that ``name`` and the method's
        settings.
    """

    bits: int = 4
    group: int | None = 32
    groups: Mapping[str, int | None] = field(default_factory=dict)
    symmetric: bool | None = None
    zeros: str = "fractional"
    method: str | Mapping[str, Any] = "rtn"

    def __post_init__(self) -> None:
        _check("weights.bits", self.bits, (4, 7, 8, 16))
        _check("weights.group", self.group, (*GROUPS, None))
        for role, group in _by_role("weights.groups", self.groups, _ROLES[:-1]).items():
            _check(f"weights.groups.{role}", group, (*GROUPS, None))
        seven = self.bits == 7
        _check("weights.symmetric", self.symmetric, (True, None) if seven else (True, False, None))
        _check("weights.zeros", self.zeros, ("fractional", "whole"))

    def quantizer(self) -> Quantizer:
        """Return the method, made with its settings."""
        return _method(METHODS, self.method, "weights.method")


@dataclass(frozen=True)
class Activations:
    """The inputs of linears.

    Parameters
    ----------
    bits
        8, 7, 4, or 16 to leave them in float.
    strategy
        One scale for each ``group`` of a token's values, as wide as the weights' group, or one for
        the whole ``token``; or one for the whole ``tensor``, all that a linear ever reads. What the
        head and projections outside the layers read, which calibration does not see, then has one a
        token.
    dynamic
        Whether scales are found while running. Those of groups and tokens are, that of a tensor is
        found on calibration text: a recipe may say so, not otherwise. ``None`` leaves it out.
    roles
        Other bits for the inputs of some linears: ``qkv``, ``out``, ``gate_up``, ``down``,
        ``project``, ``head``. What the head reads is rounded to 8 bits where all others have
        fewer, unless it is named here.
    """

    bits: int = 8
    strategy: str = "group"
    dynamic: bool | None = None
    roles: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("activations.bits", self.bits, (4, 7, 8, 16))
        _check("activations.strategy", self.strategy, ("group", "token", "tensor"))
        _check("activations.dynamic", self.dynamic, (True, False, None))
        if self.dynamic is (self.strategy == "tensor"):
            found = "while running" if self.dynamic else "on calibration text"
            message = f"recipe: activations: strategy {self.strategy} and dynamic "
            message += f"{str(self.dynamic).lower()} contradict each other: scales found {found} "
            message += "are of a group or a token" if self.dynamic else "are of a tensor"
            raise ConfigError(message)
        for role, bits in _by_role("activations.roles", self.roles, _ROLES).items():
            _check(f"activations.roles.{role}", bits, (4, 7, 8, 16))

    def of(self, role: str) -> int:
        """Return the bits for the inputs of linears of a role."""
        return self.roles.get(role, max(self.bits, 8) if role == "head" else self.bits)


@dataclass(frozen=True)
class Matrix:
    """The embedding, or the head.

    Parameters
    ----------
    bits
        4, 8 or 16; ``None`` for 8 where the weights are quantized, else 16.
    group
        Values that share a scale; ``"weights"`` for as many as of the weights.
    symmetric
        As of the weights.
    """

    bits: int | None = None
    group: int | str | None = "weights"
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        _check("embedding/head.bits", self.bits, (4, 8, 16, None))
        _check("embedding/head.group", self.group, (*GROUPS, "weights", None))
        _check("embedding/head.symmetric", self.symmetric, (True, False, None))


@dataclass(frozen=True)
class Attention:
    """The two products of attention.

    Parameters
    ----------
    bits
        7, 16 for floats, or ``auto``.
    """

    bits: int | str = "auto"

    def __post_init__(self) -> None:
        _check("attention.bits", self.bits, ("auto", 7, 16))


@dataclass(frozen=True)
class Calibration:
    """How much text calibrated methods look at, or how many images.

    Parameters
    ----------
    tokens
        Tokens, rounded up to whole windows.
    context
        Tokens a window; at most the model's context.
    seed
        Which windows of the text, or which images.
    images
        Images, for an image encoder.
    """

    tokens: int = 16384
    context: int = 1024
    seed: int = 0
    images: int = 64

    def __post_init__(self) -> None:
        for name, value, least in (
            ("tokens", self.tokens, 1),
            ("context", self.context, 2),
            ("seed", self.seed, 0),
            ("images", self.images, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                message = (
                    f"recipe: calibration.{name}: expected {least} or more, found {value!r:.60}"
                )
                raise ConfigError(message)


@dataclass(frozen=True)
class Recipe:
    """All of it; see the module."""

    weights: Weights = field(default_factory=Weights)
    activations: Activations = field(default_factory=Activations)
    embedding: Matrix = field(default_factory=Matrix)
    head: Matrix = field(default_factory=Matrix)
    folds: tuple[str | Mapping[str, Any], ...] = ()
    tuning: str | Mapping[str, Any] | None = None
    calibration: Calibration = field(default_factory=Calibration)
    ignore: tuple[str, ...] = ()
    floats: str = "auto"
    softmax: str = "exact"
    attention: Attention = field(default_factory=Attention)
    tokens: Mapping[str, Any] | None = None
    sparsity: str | Mapping[str, Any] | None = None
    prune: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.sparsifier()
        self.pruner()
        self.recovery()
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _tokens(self.tokens))
        _check("floats", self.floats, ("auto", "bf16", "f16"))
        _check("softmax", self.softmax, ("exact", "log2"))
        if self.softmax != "exact" and self.attention.bits == 7:
            message = "recipe: attention.bits 7: softmax must be exact, not powers of two"
            raise ConfigError(message)
        self.weights.quantizer()  # its settings are checked now, not an hour into the work
        if self.tuner() is not None and self.weights.bits == 16:
            message = "recipe: tuning: there are no scales, as weights.bits is 16"
            raise ConfigError(message)
        fold = self.fold()
        if fold is None:
            return
        inputs = self.activations
        if fold.rounds_inputs and {inputs.bits, *inputs.roles.values()} == {16}:
            message = (
                "recipe: folds: it prepares activations for rounding, but activations.bits is 16"
            )
            raise ConfigError(message)
        if self.weights.bits == 16:
            message = "recipe: folds: nothing is rounded, as weights.bits is 16"
            raise ConfigError(message)

    def fold(self) -> Fold | None:
        """Return the fold, made with its settings; ``None`` without one."""
        if len(self.folds) > 1:
            message = f"recipe: folds: expected one at most, found {len(self.folds)}: "
            message += "each chooses the factors of the same channels"
            raise ConfigError(message)
        for named in self.folds:
            return _method(FOLDS, named, "folds")
        return None

    def tuner(self) -> ScaleTuning | None:
        """Return the tuning, made with its settings; ``None`` without one."""
        if self.tuning is None:
            return None
        return _method(TUNINGS, self.tuning, "tuning")

    def sparsifier(self) -> SparsityMethod | None:
        """Return the method that finds thresholds, made with its settings; ``None`` without one."""
        if self.sparsity is None:
            return None
        return _method(SPARSITIES, self.sparsity, "sparsity")

    def pruner(self) -> PruneMethod | None:
        """Return the pruning, made with its settings; ``None`` without one."""
        if self.prune is None:
            return None
        named = self.prune
        if isinstance(named, Mapping):
            named = {key: value for key, value in named.items() if key != "recovery"}
        method = _method(PRUNINGS, named, "prune")
        group = self.weights.group
        if isinstance(method, Structured) and self.weights.bits < 16 and group is not None:
            # What reads the neurons is rounded in groups of them.
            method = dataclasses.replace(method, round_to=math.lcm(method.round_to, group))
        return method

    def recovery(self) -> Recovery | None:
        """Return what is trained after pruning, made with its settings; ``None`` for nothing."""
        named = self.prune.get("recovery") if isinstance(self.prune, Mapping) else None
        return None if named is None else _method(RECOVERIES, named, "prune.recovery")

    def needs_calibration(self) -> str:
        """Return which key needs calibration text or images; an empty text if none does."""
        if (pruner := self.pruner()) is not None and pruner.reads_text:
            return "prune"
        if self.recovery() is not None:
            return "prune.recovery"
        return self.needs_layers() or ("" if self.sparsity is None else "sparsity")

    def needs_layers(self) -> str:
        """Return which key needs a pass over the layers before rounding; empty if none does."""
        if self.folds:
            return "folds"
        if self.tuning is not None:
            return "tuning"
        if self.weights.bits == 16:
            return ""
        if self.weights.quantizer().needs:
            return "weights.method"
        inputs = self.activations
        static = inputs.strategy == "tensor" and any(inputs.of(role) < 16 for role in _LAYER_ROLES)
        return "activations.strategy" if static else ""

    def linear_scheme(self, role: str) -> Scheme | None:
        """Return the scheme of the linears of a role; ``None`` leaves them in float."""
        if role == "head":
            return self.matrix_scheme(self.head)
        weights = self.weights
        group = weights.groups.get(role, weights.group)
        return self._scheme(weights.bits, group, weights.symmetric, role)

    def matrix_scheme(self, matrix: Matrix) -> Scheme | None:
        """Return the scheme of the embedding or the head; ``None`` leaves it in float."""
        bits = matrix.bits
        if bits is None:
            bits = 8 if self.weights.bits < 16 else 16
        group = self.weights.group if matrix.group == "weights" else matrix.group
        return self._scheme(
            bits, group if isinstance(group, int) else None, matrix.symmetric, "head"
        )

    def _scheme(
        self, bits: int, group: int | None, symmetric: bool | None, role: str
    ) -> Scheme | None:
        if bits == 16:
            return None
        if symmetric is None:
            symmetric = bits > 4
        inputs = self.activations
        strategy = inputs.strategy
        if strategy == "tensor" and role not in _LAYER_ROLES:
            strategy = "token"
        whole = self.weights.zeros == "whole"
        return Scheme(bits, group, symmetric, inputs.of(role), strategy, whole)

    def run_settings(self, *, images: bool = False) -> dict[str, Any]:
        """Return what the folder says about running beyond its tensors; empty for the usual.

        `images` says whether the model is an image encoder.
        """
        settings: dict[str, Any] = {}
        if self.softmax != "exact":
            settings["softmax"] = self.softmax
        bits = self.attention.bits
        if bits == "auto" and settings == {} and self.weights.bits == self.activations.bits:
            bits = self.weights.bits
        if images and bits == 7:
            settings["attention"] = {"bits": 7}
        if self.tokens is not None:
            settings["tokens"] = dict(self.tokens)
        if self.sparsity is not None:
            named = self.sparsity
            settings["sparsity"] = {"name": named} if isinstance(named, str) else dict(named)
        return settings

    def with_options(
        self,
        weights: int | None = None,
        activations: int | None = None,
        group: int | None = None,
        symmetric: bool | None = None,
        calibration_tokens: int | None = None,
        calibration_images: int | None = None,
        seed: int | None = None,
    ) -> Recipe:
        """Return the recipe with what an option says in the place of what it said."""
        old = self.weights
        new = dataclasses.replace(
            old,
            bits=old.bits if weights is None else weights,
            group=old.group if group is None else group,
            symmetric=old.symmetric if symmetric is None else symmetric,
        )
        inputs = self.activations
        if activations is not None:
            inputs = dataclasses.replace(inputs, bits=activations)
        looked = self.calibration
        looked = dataclasses.replace(
            looked,
            tokens=looked.tokens if calibration_tokens is None else calibration_tokens,
            images=looked.images if calibration_images is None else calibration_images,
            seed=looked.seed if seed is None else seed,
        )
        return dataclasses.replace(self, weights=new, activations=inputs, calibration=looked)

    def to_yaml(self) -> str:
        """Return the recipe as a file that :func:`read` reads, every key written out."""
        values = dataclasses.asdict(self)
        values["ignore"] = list(self.ignore)
        values["folds"] = [fold if isinstance(fold, str) else dict(fold) for fold in self.folds]
        values["activations"]["roles"] = dict(self.activations.roles)
        values["weights"]["groups"] = dict(self.weights.groups)
        for name in ("sparsity", "tuning", "prune"):
            if isinstance(values[name], Mapping):
                values[name] = dict(values[name])
        return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def shipped() -> dict[str, str]:
    """Return the recipes that come with nybble: name and first comment line."""
    found = {}
    for file in resources.files("nybble.compress").joinpath("recipes").iterdir():
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").partition("\n")[0]
            found[file.name.removesuffix(".yaml")] = first.lstrip("# ")
    return dict(sorted(found.items()))


def read(recipe: Recipe | Mapping[str, Any] | str | Path | None) -> Recipe:
    """Return a recipe from whatever names or describes one.

    Parameters
    ----------
    recipe
        A recipe; a mapping with its keys; the path of a YAML file; the name of a shipped one; or
        ``None`` for the defaults.

    Raises
    ------
    ArgumentError
        When there is neither a file nor a shipped recipe of that name.
    ConfigError
        When a key or a value is not known.
    """
    if recipe is None:
        return Recipe()
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _recipe(recipe)
    names = shipped()
    if isinstance(recipe, str) and recipe in names:
        file = resources.files("nybble.compress").joinpath("recipes").joinpath(f"{recipe}.yaml")
        return _recipe(parse(file.read_text(encoding="utf-8"), recipe))
    path = Path(recipe)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise ArgumentError(unknown("recipe", recipe, names) + "; or give a YAML file")
    return _recipe(parse(read_text(path, _MAX_FILE), str(path)))


def _recipe(values: Mapping[str, Any]) -> Recipe:
    sections: dict[str, type[Any]] = {
        "weights": Weights,
        "activations": Activations,
        "attention": Attention,
        "embedding": Matrix,
        "head": Matrix,
        "calibration": Calibration,
    }
    made = dict(values)
    for name, kind in sections.items():
        if name in made:
            if not isinstance(made[name], Mapping):
                message = f"recipe: {name}: expected a mapping, found {made[name]!r:.60}"
                raise ConfigError(message)
            made[name] = _section(kind, made[name], name)
    if "ignore" in made:
        patterns = made["ignore"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            message = f"recipe: ignore: expected a list of patterns, found {patterns!r:.60}"
            raise ConfigError(message)
        made["ignore"] = tuple(patterns)
    if "folds" in made:
        folds = made["folds"]
        folds = [folds] if isinstance(folds, (str, Mapping)) else folds
        if not isinstance(folds, (list, tuple)):
            message = f"recipe: folds: expected a list of names, found {folds!r:.60}"
            raise ConfigError(message)
        made["folds"] = tuple(folds)
    return _section(Recipe, made, "recipe")


def _section(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    with _in_recipe():
        return make(kind, values, where)


def _method(known: Registry[T], named: object, where: str) -> T:
    """Make a method from its name, or from a mapping with its name and settings."""
    with _in_recipe():
        return known.make(named, where)


@contextmanager
def _in_recipe() -> Iterator[None]:
    """Say of a wrong setting that it stands in a recipe."""
    try:
        yield
    except ArgumentError as error:
        message = f"recipe: {error}"
        raise ConfigError(message) from None


def _tokens(values: object) -> dict[str, Any] | None:
    """Return the settings by which the run-time reduces tokens."""
    if not isinstance(values, Mapping):
        message = f"recipe: tokens: expected a mapping, found {values!r:.60}"
        raise ConfigError(message)
    with _in_recipe():
        return settings(values)
