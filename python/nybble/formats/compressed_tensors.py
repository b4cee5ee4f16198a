"""``quantization_config`` in compressed-tensors form: written, and read back.

A quantized module ``m`` is stored as ``m.weight_packed``, ``m.weight_scale``, ``m.weight_shape``
and, if asymmetric, ``m.weight_zero_point`` (:mod:`nybble.formats.packing`); one whose activations
have a scale found beforehand has that as ``m.input_scale``. The configuration lists
groups of modules that share a scheme. A group names its modules by *targets*: a module's path, a
class (``Linear``, ``Embedding``), or ``re:`` and a regular expression that must fit from the
path's start. The closest target wins (path, then expression, then class); ``ignore`` beats all.

What readers do with it, as found out by trying (compressed-tensors 0.20, transformers 5.23):

* The format is written explicitly, for all and for each group: a reader that has to infer it would
  take one byte a weight for granted wherever activations are quantized too.
* compressed-tensors unpacks every layout written here to the same integers.
* Zero points in sixteenths are floats, and ``tensor_group`` is the one strategy with groups whose
  zero points compressed-tensors neither packs nor unpacks; their type is its ``zp_dtype``. (What
  else the strategy stands for, a scale for the whole tensor, is 1 and not stored.) It reads them as
  they are meant.
* transformers loads symmetric linears in every combination, and 4-bit ones with zero points in
  sixteenths (it says that the tensor's scale is missing, and does not use it). Zero points at whole
  codes it does not pack when it prepares an empty model, so those load with ``dequantize=True``
  only, which in turn knows a single scheme. It loads no quantized ``Embedding`` (it wants to
  initialise a weight that is not there). A folder for transformers therefore has a 16-bit embedding
  and head.
* A head that shares the embedding's matrix is not stored; it is listed under ``ignore``.
* The linears of GPT-2 are of class ``Conv1D`` there, which compressed-tensors does not match. They
  are stored as ``[outputs, inputs]`` like all others, whatever the plain weight's order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from nybble.errors import FormatError, UnsupportedError
from nybble.formats.packing import words
from nybble.quant.base import Scheme

__all__ = ["FORMAT", "Module", "QuantizedModules", "entries", "quantization_config"]

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Module:
    """A linear or embedding, and the scheme it is stored in.

    Parameters
    ----------
    name
        Its path.
    kind
        Its class as targets call it: ``Linear`` or ``Embedding``.
    scheme
        How it is quantized; ``None`` if it is not.
    """

    name: str
    kind: str
    scheme: Scheme | None


def entries(
    module: str, rows: int, cols: int, scheme: Scheme
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, type and shape of the tensors that hold a matrix ``[rows, cols]``."""
    groups = scheme.groups(cols)
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{module}.weight_packed", "I32", (rows, words(cols, scheme.stored_bits))),
        (f"{module}.weight_scale", "F16", (rows, groups)),
        (f"{module}.weight_shape", "I64", (2,)),
    ]
    if scheme.zeros == "sixteenths":
        tensors.append((f"{module}.weight_zero_point", "F16", (rows, groups)))
    elif scheme.zeros == "whole":
        zeros = (words(rows, scheme.stored_bits), groups)
        tensors.append((f"{module}.weight_zero_point", "I32", zeros))
    if scheme.static:
        tensors.append((f"{module}.input_scale", "F32", (1,)))
    return tensors


def quantization_config(modules: Sequence[Module], tied: Iterable[str] = ()) -> dict[str, Any]:
    """Describe how modules are quantized.

    The most common scheme of each class is written for the class, every other one for its modules
    by name; modules of these classes that are not quantized are listed under ``ignore``.

    Parameters
    ----------
    modules
        Every linear and embedding, quantized or not.
    tied
        Modules without weights of their own.
    """
    common: dict[str, Scheme] = {}
    for kind in ("Linear", "Embedding"):
        counts = Counter(m.scheme for m in modules if m.kind == kind and m.scheme is not None)
        if counts:
            common[kind] = counts.most_common(1)[0][0]
    targets: dict[tuple[str, Scheme], list[str]] = {}
    for kind, scheme in common.items():
        targets[kind, scheme] = [kind]
    for module in modules:
        if module.scheme is not None and module.scheme != common[module.kind]:
            targets.setdefault((module.kind, module.scheme), []).append(module.name)
    ignore = [m.name for m in modules if m.scheme is None and m.kind in common]
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": names,
                "weights": _weights(scheme),
                "input_activations": _activations(scheme) if kind == "Linear" else None,
                "output_activations": None,
                "format": FORMAT,
            }
            for i, ((kind, scheme), names) in enumerate(targets.items())
        },
        "ignore": [*ignore, *tied],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = "channel" if scheme.group is None else "group"
    section: dict[str, Any] = {
        "num_bits": scheme.stored_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }
    if scheme.zeros == "sixteenths":
        section |= {"strategy": "tensor_group", "zp_dtype": "torch.float16"}
    return section


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations == 16:
        return None
    # Activations are rounded in the groups of the weights they meet: with one scale a row of
    # weights, that is one scale a token.
    by_group = scheme.strategy == "group" and scheme.group is not None
    return {
        "num_bits": scheme.activations,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if by_group else "tensor" if scheme.static else "token",
        "group_size": scheme.group if by_group else None,
        "dynamic": not scheme.static,
        "actorder": None,
        "block_structure": None,
        "observer": None,
        "observer_kwargs": {},
    }


class QuantizedModules:
    """A ``quantization_config`` that was read: which scheme has which module.

    Parameters
    ----------
    section
        The section of a ``config.json``.
    where
        The file, for messages.

    Raises
    ------
    FormatError
        When the section is not what it should be.
    UnsupportedError
        When it names a method, a format or a scheme that is not read here.
    """

    def __init__(self, section: Mapping[str, Any], where: str = "config.json") -> None:
        self._where = where
        if (method := section.get("quant_method")) != "compressed-tensors":
            message = f"{where}: quant_method {method!r} is not supported: compressed-tensors is"
            raise UnsupportedError(message)
        groups = section.get("config_groups")
        if not isinstance(groups, Mapping):
            self._refuse("config_groups", "an object of groups", groups)
        self.ignore = self._names("ignore", section.get("ignore") or [])
        self.groups: list[tuple[list[str], Scheme]] = []
        for name, group in groups.items():
            if not isinstance(group, Mapping):
                self._refuse(f"config_groups.{name}", "an object", group)
            if (found := group.get("format") or section.get("format")) != FORMAT:
                message = f"{where}: {name}: format {found!r} is not supported: {FORMAT} is"
                raise UnsupportedError(message)
            targets = self._names(f"{name}.targets", group.get("targets"))
            self.groups.append((targets, self._scheme(name, group)))

    def scheme(self, module: str, kind: str) -> Scheme | None:
        """Return the scheme of a module of class `kind`; ``None`` if it is not quantized."""
        if any(_fit(target, module, kind) for target in self.ignore):
            return None
        best: tuple[int, Scheme | None] = (0, None)
        for targets, scheme in self.groups:
            fit = max((_fit(target, module, kind) for target in targets), default=0)
            if fit > best[0]:
                best = (fit, scheme)
        return best[1]

    def _refuse(self, key: str, expected: str, found: object) -> NoReturn:
        message = f"{self._where}: {key}: expected {expected}, found {found!r:.80}"
        raise FormatError(message)

    def _names(self, key: str, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._refuse(key, "a list of texts", value)
        return value

    def _scheme(self, name: str, group: Mapping[str, Any]) -> Scheme:
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not isinstance(weights, Mapping):
            self._refuse(f"{name}.weights", "an object", weights)
        if inputs is not None and not isinstance(inputs, Mapping):
            self._refuse(f"{name}.input_activations", "an object", inputs)
        strategy = weights.get("strategy")
        if weights.get("type") != "int" or strategy not in ("group", "tensor_group", "channel"):
            message = f"{self._where}: {name}: only integers by group or channel are read"
            raise UnsupportedError(message)
        try:
            return Scheme(
                bits=weights.get("num_bits", 0),
                group=None if strategy == "channel" else weights.get("group_size"),
                symmetric=bool(weights.get("symmetric", True)),
                activations=16 if inputs is None else inputs.get("num_bits", 0),
                strategy="group" if inputs is None else inputs.get("strategy", ""),
                whole_zeros=strategy != "tensor_group",
            )
        except ValueError as error:
            message = f"{self._where}: {name}: {error}"
            raise UnsupportedError(message) from None


def _fit(target: str, module: str, kind: str) -> int:
    """How closely a target fits: 3 by path, 2 by expression, 1 by class, 0 not at all."""
    if target.startswith("re:"):
        try:
            return 2 if re.match(target[3:], module) else 0
        except re.error:
            return 0
    if target == module:
        return 3
    return 1 if target == kind else 0
