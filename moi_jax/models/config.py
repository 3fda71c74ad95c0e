"""The architecture of a decoder: `ModelConfig`, read from and written as a config.json."""

import dataclasses
import json
import math
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.models.families import FAMILIES
from moi_jax.models.families.family import Family


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of the rotary frequencies (Llama 3.1 model card, rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; families differ only in these fields.

    The sizes have the same letters everywhere: D hidden_size, H num_heads, K num_kv_heads,
    N head_dim, F mlp_width, V vocab_size, L num_layers. Our first checkpoints do not name the
    fields that have a default here.
    """

    family: str  # decides the tensor names and the config.json of a published checkpoint
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    seq_length: int  # trained length; beyond it Qwen v1 uses NTK and log-n at inference
    qkv_bias: bool
    out_bias: bool = False  # bias of the attention's output projection
    qk_norm: bool = False  # RMSNorm over each head of queries and keys
    tied_head: bool = False  # the head is the transposed embedding
    rope_base: float
    rope_scaling: RopeScaling | None = None
    norm_eps: float
    dynamic_ntk: bool
    logn_attention: bool
    initializer_range: float
    # The chat template adds this prompt if there is no system turn. It is not part of the
    # architecture and not in config.json: two configs that differ only here are equal.
    default_system_prompt: str = dataclasses.field(compare=False)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, for a checkpoint of ours."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        """Makes the config from the values of `to_json`."""
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": RopeScaling(**scaling) if scaling else None})


def read_hf_config(text: str | bytes, where: str) -> ModelConfig:
    """Reads the architecture from a published `config.json`; `where` names the file.

    Raises:
      UserError: the text is not JSON, the architecture is another one, a key is missing, or a
        setting is not supported.
    """
    try:
        values = json.loads(text)
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{where} has no model_type; is it the config.json of a model?")
    families = {family.model_type: family for family in FAMILIES.values()}
    family = families.get(str(values["model_type"]))
    if family is None:
        raise UserError(
            f"{where}: model_type {values['model_type']!r} is not built yet; use one of "
            f"{', '.join(map(repr, families))} (dense models, no mixtures of experts)"
        )
    values = family.defaults | {key: value for key, value in values.items() if value is not None}
    _refuse_unsupported(values, family, where)
    scaling = None
    if family.scales_rope:
        values["rope_theta"], scaling = _rope(values, where)
    fields = {
        field: _value(values, field, keys, where)
        for field, keys in family.keys.items()
        if field not in ("head_dim", "num_kv_heads") or keys[0] in values
    }
    fields.setdefault("num_kv_heads", fields["num_heads"])
    if "head_dim" not in fields:
        fields["head_dim"], rest = divmod(fields["hidden_size"], fields["num_heads"])
        if rest:
            raise UserError(f"{where}: hidden_size does not divide into the attention heads")
    # Qwen v1's width counts both matrices of the gated MLP.
    fields["mlp_width"] //= family.mlp_matrices
    _refuse_windows(values, fields["num_layers"], where)
    if fields["num_heads"] % fields["num_kv_heads"]:
        raise UserError(
            f"{where}: {fields['num_heads']} attention heads cannot share "
            f"{fields['num_kv_heads']} key/value heads evenly"
        )
    if fields["head_dim"] % 2:
        raise UserError(f"{where}: heads of odd width {fields['head_dim']} cannot be rotated")
    return ModelConfig(family=family.name, rope_scaling=scaling, **family.fixed, **fields)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns the values of a published config.json for this architecture, in its family's layout.

    The caller adds torch_dtype, bos_token_id and eos_token_id. (Without these ids transformers
    takes 1 and 2 for a Llama.)
    """
    family = FAMILIES[config.family]
    fields = dataclasses.asdict(config)
    fields["mlp_width"] *= family.mlp_matrices
    if config.head_dim == config.hidden_size // config.num_heads and family.derives_head_dim:
        del fields["head_dim"]
    values = {keys[0]: fields[field] for field, keys in family.keys.items() if field in fields}
    if config.rope_scaling:
        values["rope_scaling"] = {**fields["rope_scaling"], "rope_type": "llama3"}
    return dict(
        sorted(({"architectures": [family.architecture]} | family.written | values).items())
    )


def in_family(config: ModelConfig, name: str) -> ModelConfig:
    """Returns the config with which another family reads the same parameters.

    Tools that do not know the model's own family can then use it. The result has no dynamic NTK
    and no log-n attention. It is exact where they are inactive: for Qwen v1, up to its
    seq_length.

    Raises:
      UserError: the other family cannot express this architecture.
    """
    if name == config.family:
        return config
    other = dataclasses.replace(config, family=name, dynamic_ntk=False, logn_attention=False)
    if name not in FAMILIES or _reads_as(other) != other:
        raise UserError(f"a model of the family {config.family} cannot be written as {name!r}")
    return other


def _reads_as(config: ModelConfig) -> ModelConfig:
    return read_hf_config(json.dumps(to_hf_config(config)), f"config.json as {config.family}")


def _refuse_unsupported(values: dict[str, Any], family: Family, where: str) -> None:
    """Raises UserError for a setting that would need another decoder."""
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: quantised weights are not supported; import the full-precision ones"
        )
    for key, only in family.supported.items():
        if values.get(key, only) != only:
            raise UserError(
                f"{where}: {key} {values[key]!r} is not supported, only {only!r}; "
                f"choose a model that has this value"
            )


def _refuse_windows(values: dict[str, Any], layers: int, where: str) -> None:
    """Raises UserError if the attention of a layer does not cover the whole segment."""
    kinds = values.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{where}: layer_types other than 'full_attention' are not supported")
    window = values.get("use_sliding_window") and values.get("sliding_window")
    if window and _number(values, "max_window_layers", True, where) < layers:
        raise UserError(f"{where}: use_sliding_window is true; sliding windows are not supported")


def _rope(values: dict[str, Any], where: str) -> tuple[Any, RopeScaling | None]:
    """Reads base and scaling from the top level or from transformers 5's rope_parameters.

    Raises:
      UserError: the file has both layouts, or a type of scaling other than Llama 3's.
    """
    if values.get("rope_scaling") and values.get("rope_parameters"):
        raise UserError(f"{where} has both rope_scaling and rope_parameters; remove one of them")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where}: rotary parameters by layer type are not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(
            f"{where}: rope type {kind!r} is not supported, only 'default' and 'llama3'; remove "
            f"the scaling if the weights were trained without it"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor other than 1 is not supported")
    base = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    if kind == "default":
        return base, None
    # As in transformers: a length at the top level wins; without one, the full length counts.
    key = "original_max_position_embeddings"
    lengths = {key: values.get("max_position_embeddings")} | rope | values
    rope = rope | {key: lengths[key]}
    scaling = RopeScaling(
        **{
            field.name: _number(rope, field.name, field.type is int, where)
            for field in dataclasses.fields(RopeScaling)
        }
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise UserError(f"{where}: high_freq_factor must be greater than low_freq_factor")
    return base, scaling


def _value(values: dict[str, Any], field: str, keys: tuple[str, ...], where: str) -> Any:
    """Reads a field of ModelConfig from the first of its keys in the file, and checks its type."""
    key = next((key for key in keys if key in values), keys[0])
    kind = ModelConfig.__annotations__[field]
    if kind is not bool:
        return _number(values, key, kind is int, where)
    if not isinstance(values.get(key), bool):
        raise UserError(f"{where}: {key} is {values.get(key)!r}, not true or false")
    return values[key]


def _number(values: dict[str, Any], key: str, whole: bool, where: str) -> Any:
    """Reads a number; raises UserError if it is missing or not a (whole) number above zero."""
    value = values.get(key)
    if value is None:
        raise UserError(f"{where} lacks {key}")
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{where}: {key} is {value!r}, not {kind} above zero")
    return value
