"""Models whose layers differ in shape, in transformers.

transformers' classes give all layers the same heads and neurons. :func:`reshape` gives each layer
of such a model the shape that the ``structure`` of a folder says, before weights are loaded;
:func:`load` does both. A layer without attention, or without a feed-forward block, passes on what
it is given there. Where key and value heads serve different numbers of query heads, each is
repeated as often behind its projection, so that the model's cache holds it as often too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError, UnsupportedError

__all__ = ["FAMILIES", "KEYS", "load", "plain", "reshape", "structure_of"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
"""Values of ``model_type`` whose layers may differ."""

KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""What may differ between layers."""

_BIASES = ("o_proj", "down_proj")
_MAX_JSON = 64 << 20


def structure_of(config: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the shapes of the layers in a configuration; ``None`` when all are as it says.

    Raises
    ------
    ConfigError
        When an entry is not a layer's shape, or there are not as many as layers.
    """
    section = config.get("nybble")
    found = section.get("structure") if isinstance(section, Mapping) else None
    if found is None:
        return None
    layers = found.get("layers") if isinstance(found, Mapping) else None
    # A vision tower inside a model with a text tower has its sizes in a section of their own.
    tower = config.get("vision_config")
    sizes = tower if isinstance(tower, Mapping) else config
    count = sizes.get("num_hidden_layers")
    if not isinstance(layers, list) or len(layers) != count:
        message = f"config.json: nybble.structure.layers: expected {count} entries, one a layer"
        raise ConfigError(message)
    for index, layer in enumerate(layers):
        _check(f"config.json: nybble.structure.layers[{index}]", layer)
    return layers


def _check(where: str, layer: object) -> None:
    if not isinstance(layer, Mapping):
        message = f"{where}: expected a mapping, found {layer!r:.60}"
        raise ConfigError(message)
    for key in KEYS:
        value = layer.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            message = f"{where}.{key}: expected a count, found {value!r:.60}"
            raise ConfigError(message)
    heads, kv_heads = layer["num_attention_heads"], layer["num_key_value_heads"]
    queries = layer.get("queries_per_kv")
    if queries is None:
        if (heads == 0) != (kv_heads == 0) or (kv_heads and heads % kv_heads):
            message = f"{where}: expected heads divided evenly, found {heads} over {kv_heads}"
            raise ConfigError(message)
    elif (
        not isinstance(queries, list)
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in queries)
        or (sum(queries), len(queries)) != (heads, kv_heads)
    ):
        message = f"{where}.queries_per_kv: expected {kv_heads} counts of together {heads}, "
        message += f"found {queries!r:.60}"
        raise ConfigError(message)
    biases = layer.get("biases", [])
    if not isinstance(biases, list) or any(name not in _BIASES for name in biases):
        message = f"{where}.biases: expected some of {', '.join(_BIASES)}, found {biases!r:.60}"
        raise ConfigError(message)


def plain(layers: Sequence[Mapping[str, Any]]) -> bool:
    """Say whether all layers have one shape that transformers' classes can have."""
    first = layers[0]
    return (
        all(dict(layer) == dict(first) for layer in layers)
        and all(first[key] > 0 for key in KEYS)
        and not first.get("biases")
        and "queries_per_kv" not in first
    )


def reshape(model: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    """Give each layer of a transformers model its own shape; weights are lost.

    Parameters
    ----------
    model
        A decoder of one of :data:`FAMILIES`, with as many layers.
    layers
        Their shapes.

    Raises
    ------
    UnsupportedError
        When the family is another one.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        message = f"{kind}: layers of different shapes are not supported "
        message += f"(supported: {', '.join(FAMILIES)})"
        raise UnsupportedError(message)
    for module, layer in zip(model.get_submodule("model.layers"), layers, strict=True):
        _attention(module, layer, sandwich=kind == "gemma3_text")
        _mlp(module, layer, sandwich=kind == "gemma3_text")


def _resize(owner: Any, name: str, rows: int, cols: int, *, bias: bool = False) -> None:
    import torch

    old = getattr(owner, name)
    biased = old.bias is not None or bias
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    if old.weight.device.type == "meta":
        like["device"] = "cpu"  # modules are made without memory by whoever asked for that
    new = torch.nn.Linear(cols, rows, bias=biased, **like)
    if old.weight.device.type == "meta":
        new = new.to("meta")
    for parameter in new.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    setattr(owner, name, new)


def _attention(module: Any, layer: Mapping[str, Any], *, sandwich: bool) -> None:
    import torch

    attention = module.self_attn
    heads, kv_heads = layer["num_attention_heads"], layer["num_key_value_heads"]
    if not heads:
        module.self_attn = _no_attention(attention.layer_idx)
        module.input_layernorm = torch.nn.Identity()
        if sandwich:
            module.post_attention_layernorm = torch.nn.Identity()
        return
    width, dim = attention.q_proj.in_features, attention.head_dim
    _resize(attention, "q_proj", heads * dim, width)
    _resize(attention, "k_proj", kv_heads * dim, width)
    _resize(attention, "v_proj", kv_heads * dim, width)
    _resize(attention, "o_proj", width, heads * dim, bias="o_proj" in layer.get("biases", ()))
    attention.num_key_value_groups = heads // kv_heads
    queries = layer.get("queries_per_kv")
    if queries is not None and len(set(queries)) > 1:
        attention.num_key_value_groups = 1
        for name in ("k_proj", "v_proj"):
            getattr(attention, name).register_forward_hook(_repeated(queries, dim))


def _repeated(queries: Sequence[int], dim: int) -> Any:
    """Return a hook that repeats each head of a projection's output as often as it is read."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        import torch

        of = torch.repeat_interleave(
            torch.arange(len(queries)), torch.tensor(list(queries)), output_size=sum(queries)
        )
        heads = output.unflatten(-1, (len(queries), dim))
        return heads.index_select(-2, of.to(output.device)).flatten(-2)

    return hook


def _no_attention(index: int) -> Any:
    import torch

    class NoAttention(torch.nn.Module):  # type: ignore[misc]
        """Gives nothing, and keeps the cache's count of tokens."""

        layer_idx = index

        def forward(self, hidden_states: Any, past_key_values: Any = None, **_: Any) -> Any:
            if past_key_values is not None:
                seen = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
                past_key_values.update(seen, seen, self.layer_idx)
            return torch.zeros_like(hidden_states), None

    return NoAttention()


def _mlp(module: Any, layer: Mapping[str, Any], *, sandwich: bool) -> None:
    import torch

    class NoMlp(torch.nn.Module):  # type: ignore[misc]
        """Gives nothing."""

        def forward(self, hidden: Any) -> Any:
            return torch.zeros_like(hidden)

    inner, mlp = layer["intermediate_size"], module.mlp
    if not inner:
        module.mlp = NoMlp()
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        setattr(module, before, torch.nn.Identity())
        if sandwich:
            module.post_feedforward_layernorm = torch.nn.Identity()
        return
    width = mlp.up_proj.in_features
    _resize(mlp, "gate_proj", inner, width)
    _resize(mlp, "up_proj", inner, width)
    _resize(mlp, "down_proj", width, inner, bias="down_proj" in layer.get("biases", ()))
    mlp.intermediate_size = inner


def load(folder: str | Path) -> Any:
    """Load a folder of float weights into transformers' model, each layer in its own shape.

    Parameters
    ----------
    folder
        What ``nybble prune`` wrote. Quantized folders are for nybble's run-time.

    Raises
    ------
    ConfigError
        When the configuration contradicts itself, or a tensor has another shape than it says.
    UnsupportedError
        When torch or transformers are missing, weights are quantized, or the family is another one.
    """
    try:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        message = f"loading into transformers needs {error.name}: pip install 'nybble[compress]'"
        raise UnsupportedError(message) from None
    from nybble.compress.files import weight_files
    from nybble.runtime.files import read_json

    path = Path(folder)
    config = read_json(path / "config.json", _MAX_JSON)
    if config.get("quantization_config"):
        message = f"{path}: its weights are quantized: prune without quantizing for transformers"
        raise UnsupportedError(message)
    layers = structure_of(config)
    known = {key: value for key, value in config.items() if key not in ("nybble", "dtype")}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**known), dtype=torch.float32
    ).eval()
    if layers is not None:
        reshape(model, layers)
    tensors = {}
    for file in weight_files(path):
        if file.suffix == ".safetensors":
            tensors.update(load_file(file))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            message = f"{path}: {name}: expected a tensor of shape {list(shape)}, found {found}"
            raise ConfigError(message)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return model
