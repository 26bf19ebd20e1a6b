"""torchao: a ``FqnToConfig``, written by torchao itself, that ``quantize_`` or transformers applies.

torchao finds its own scales when it applies a config. `hold` makes a model whose torchao tensors have our codes.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq._lazy import require
from mpq.errors import ConfigError, ExportError
from mpq.export.check import check, left_out
from mpq.export.fields import matches, of_kind, read_format, take
from mpq.export.report import Exported, rounded_by
from mpq.export.runtimes import RUNTIMES
from mpq.layers import LayerSpec
from mpq.quantizers import Scheme

if TYPE_CHECKING:
    from torch import nn

    from mpq.config import BitConfig

_NEXT = {
    "torchao": "quantize_(model, config_from_dict(json), filter_fn=None)",
    "transformers": "AutoModelForCausalLM.from_pretrained(..., quantization_config=TorchAoConfig.from_dict(json))",
}


def torchao(config: BitConfig, path: Path, model: nn.Module | None, form: str = "torchao") -> Exported:
    """Write the JSON of a ``FqnToConfig``: the full name of each layer, and None for what stays float.

    Args:
        config: The bits.
        path: The file.
        model: To check names and shared weights: torchao ignores names that it doesn't find.
        form: ``torchao``, or ``transformers`` for what goes into ``config.json`` as ``quantization_config``.

    Raises:
        ExportError: If torchao can't hold the config, or there is no such form.
    """
    if form not in _NEXT:
        raise ExportError(f"unknown form {form!r} of torchao's config; known: {', '.join(_NEXT)}")
    check(config, RUNTIMES["torchao"], model)
    require(("torchao",), "export-torchao")
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig

    rules: OrderedDict[str, Any] = OrderedDict((n, _layer_config(c.scheme)) for n, c in config.layers.items())
    rules.update(dict.fromkeys(left_out(config)))
    written = config_to_dict(FqnToConfig(fqn_to_config=rules))
    if form == "transformers":
        apart = left_out(config)
        written = {"quant_method": "torchao", "quant_type": {"default": written}, "modules_to_not_convert": apart}
    path.write_text(json.dumps(written, indent=1) + "\n", "utf8")
    return Exported("torchao", path, rounded_by("torchao", config), _NEXT[form])


def hold(model: nn.Module, config: BitConfig) -> nn.Module:
    """A copy of a model with torchao's tensors in place of the weights, holding our codes and scales.

    Raises:
        ExportError: If torchao can't hold the config.
        ConfigError: If the config was made for other weights.
    """
    import copy

    from torch import nn

    check(config, RUNTIMES["torchao"], model)
    require(("torchao",), "export-torchao")
    from mpq.apply import remove_input_quantizers
    from mpq.kept_codes import check_made_for

    check_made_for(model, config)
    copied = copy.deepcopy(model)
    remove_input_quantizers(copied)  # torchao's tensors round inputs themselves
    for name in config.layers:
        copied.get_submodule(name).weight = nn.Parameter(_tensor(config, model, name), requires_grad=False)
    return copied


def _layer_config(scheme: Scheme) -> Any:
    """Torchao's config for one layer."""
    import torch
    from torchao.quantization import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
    )

    fmt = scheme.weight
    granularity = PerGroup(fmt.group_size) if fmt.group_size else PerAxis(0)
    mapping = MappingType.SYMMETRIC if fmt.symmetric else MappingType.ASYMMETRIC
    scales = torch.float16 if fmt.scale == "fp16" else None
    dtype = getattr(torch, f"int{fmt.bits}")
    if scheme.activation is None:
        return IntxWeightOnlyConfig(
            weight_dtype=dtype, granularity=granularity, mapping_type=mapping, scale_dtype=scales
        )
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=dtype, weight_granularity=granularity, weight_mapping_type=mapping, weight_scale_dtype=scales
    )


def _tensor(config: BitConfig, model: nn.Module, name: str) -> Any:
    """A layer's weight as torchao's tensor; scales are float32 whatever the model's type, so nothing is rounded."""
    import torch
    from torchao.quantization import IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    from mpq.export.packed import by_row, layer_codes, layer_weight

    scheme = config[name].scheme
    fmt = scheme.weight
    codes, scale, zero = by_row(layer_codes(config, model, name))
    first = 0 if fmt.symmetric else 2 ** (fmt.bits - 1)  # torchao's codes are signed, with or without zero points
    inputs = None
    if scheme.activation is not None:
        inputs = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
    return IntxUnpackedToInt8Tensor(
        (codes.int() - first).to(torch.int8),
        scale.float(),
        (zero - first).to(torch.int8),
        getattr(torch, f"int{fmt.bits}"),
        (1, fmt.group_size or codes.shape[1]),
        layer_weight(model, name).dtype,
        inputs,
    )


def read_torchao(settings: Mapping[str, Any], layers: Mapping[str, LayerSpec]) -> dict[str, Scheme]:
    """What torchao gives each linear layer: a full name counts, else the first pattern that fits all of one.

    Args:
        settings: What ``config_to_dict`` gave, of a ``FqnToConfig`` or of one config for all linear layers; or the
            ``quantization_config`` of transformers, which leaves the head float unless it is named.
        layers: Quantizable layers of the model.

    Raises:
        ConfigError: If a field is missing or wrong, or mpq has no format for a config.
    """
    hosted = "quant_type" in settings
    if hosted:
        settings = take(take(settings, "quant_type", dict, "the config"), "default", dict, "'quant_type'")
    rules: dict[str, Any] = {"_default": settings}
    if settings.get("_type") in ("FqnToConfig", "ModuleFqnToConfig"):
        data = take(settings, "_data", dict, "the config")
        rules = take(data, "fqn_to_config" if "fqn_to_config" in data else "module_fqn_to_config", dict, "'_data'")
    found = {}
    for name, layer in layers.items():
        key = _rule_of(name, rules) or ("" if hosted and name == "lm_head" else "_default")
        rule = rules.get(key)
        if rule is not None and (layer.op == "linear" or key in (name, f"{name}.weight")):
            found[name] = _scheme(of_kind(rule, dict, f"the rule {key!r}"), f"the rule {key!r}")
    return found


def _rule_of(name: str, rules: Mapping[str, Any]) -> str | None:
    """Key of the rule that counts: the name of the weight, of the layer, then patterns of the one and of the other."""
    names = f"{name}.weight", name
    patterns = [k for k in rules if k.startswith("re:")]
    fitting = (k for n in names for k in patterns if matches(f"(?:{k[3:]})$", n, "the config"))
    return next((n for n in names if n in rules), next(fitting, None))


def _scheme(rule: Mapping[str, Any], where: str) -> Scheme:
    """Inverse of `_layer_config`, of JSON."""
    kind, data = take(rule, "_type", str, where), take(rule, "_data", dict, where)
    dynamic = kind == "Int8DynamicActivationIntxWeightConfig"
    part = "weight_" if dynamic else ""
    if kind not in ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"):
        raise ConfigError(f"{where}: mpq has no format for torchao's {kind}")
    granularity = take(data, f"{part}granularity", dict, where)
    size = ""
    if take(granularity, "_type", str, where) == "PerGroup":
        size = f":g{take(take(granularity, '_data', dict, where), 'group_size', int, where)}"
    bits = take(take(data, "weight_dtype", dict, where), "_data", str, where)
    mapping = take(take(data, f"{part}mapping_type", dict, where), "_data", str, where)
    weight = read_format(f"{bits}{size}{':asym' if mapping == 'ASYMMETRIC' else ''}", where)
    if not dynamic:
        return Scheme(weight)
    inputs = take(take(data, "act_mapping_type", dict, where, {}), "_data", str, where, "ASYMMETRIC")
    return Scheme(weight, read_format(f"int8:token{':asym' if inputs == 'ASYMMETRIC' else ''}", where))
