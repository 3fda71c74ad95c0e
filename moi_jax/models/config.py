"""The architecture of a decoder: `ModelConfig`, read from and written as a config.json."""

import dataclasses
import json
import math
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.models.adapter import Adapter
from moi_jax.models.families import FAMILIES
from moi_jax.models.families.family import Family

# Fields that a config.json may leave out, whatever its family.
_OPTIONAL = ("head_dim", "num_kv_heads", "partial_rotary_factor")


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
    partial_rotary_factor: float = 1.0  # the share of each head that is rotated
    # Whether each layer rotates its queries and keys; None means that all of them do.
    rope_layers: tuple[bool, ...] | None = None
    norm_eps: float
    dynamic_ntk: bool
    logn_attention: bool
    initializer_range: float
    # The chat template adds this prompt if there is no system turn. It is not part of the
    # architecture and not in config.json: two configs that differ only here are equal.
    default_system_prompt: str = dataclasses.field(compare=False)
    # LoRA adapters beside the matrices of the layers. They are not in config.json either.
    adapter: Adapter | None = None

    @property
    def rotary_dim(self) -> int:
        """How many of the N numbers of a head are rotated: the first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def base(self) -> "ModelConfig":
        """The architecture without adapters."""
        return self.with_adapter(None)

    @property
    def unquantized(self) -> "ModelConfig":
        """The architecture whose matrices are plain numbers, with the same adapters."""
        if self.adapter is None:
            return self
        return self.with_adapter(dataclasses.replace(self.adapter, quantization=None))

    def with_adapter(self, adapter: Adapter | None) -> "ModelConfig":
        return dataclasses.replace(self, adapter=adapter)

    def to_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values, for a checkpoint of ours."""
        values = dataclasses.asdict(self)
        if self.adapter is None:  # as before there were adapters: runs compare these values
            del values["adapter"]
        elif self.adapter.quantization is None:
            del values["adapter"]["quantization"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        """Makes the config from the values of `to_json`."""
        scaling, layers = values.get("rope_scaling"), values.get("rope_layers")
        adapter = values.get("adapter")
        typed = {
            "rope_scaling": RopeScaling(**scaling) if scaling else None,
            "rope_layers": tuple(layers) if layers else None,
            "adapter": Adapter.from_json(adapter) if adapter else None,
        }
        return cls(**{**values, **typed})


def read_hf_config(text: str | bytes, where: str) -> ModelConfig:
    """Reads the architecture from a published `config.json`; `where` names the file.

    Raises:
      UserError: the text is not JSON, the architecture is another one, a key is missing, or a
        setting is not supported.
    """
    given, family = _parse(text, where)
    values = family.defaults | {key: value for key, value in given.items() if value is not None}
    # Here null is a value: it means no window, a missing key means the family's.
    values["sliding_window"] = given.get("sliding_window", family.default_window)
    rope = _rope_parameters(values, where) if family.scales_rope else {}
    own = {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    values |= {key: value for key, value in own.items() if value is not None}
    _refuse_unsupported(values, family, where)
    fields = _fields(values, family, where)
    fields["rope_scaling"] = _rope_scaling(values, rope, family, where)
    if family.skips_rope:
        fields["rope_layers"] = _rope_layers(values, fields["num_layers"], where)
    config = ModelConfig(family=family.name, **family.fixed, **fields)
    _refuse_shapes(config, where)
    _refuse_windows(values, family, config, where)
    return config


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
    if config.partial_rotary_factor == 1:
        del fields["partial_rotary_factor"]
    values = {keys[0]: fields[field] for field, keys in family.keys.items() if field in fields}
    values |= {key: values[same] for key, same in family.repeated.items()}
    if config.rope_scaling:
        values["rope_scaling"] = {**fields["rope_scaling"], "rope_type": "llama3"}
    if config.rope_layers and family.skips_rope:
        values["no_rope_layers"] = [int(rotates) for rotates in config.rope_layers]
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


def _parse(text: str | bytes, where: str) -> tuple[dict[str, Any], Family]:
    """Reads the values of a config.json and finds the family of its model_type."""
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
    return values, family


def _fields(values: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Reads the fields of ModelConfig that have a key of their own."""
    fields = {
        field: _value(values, field, keys, where)
        for field, keys in family.keys.items()
        if field not in _OPTIONAL or keys[0] in values
    }
    fields.setdefault("num_kv_heads", fields["num_heads"])
    if "head_dim" not in fields:
        fields["head_dim"], rest = divmod(fields["hidden_size"], fields["num_heads"])
        if rest:
            raise UserError(f"{where}: hidden_size does not divide into the attention heads")
    # Qwen v1's width counts both matrices of the gated MLP.
    fields["mlp_width"] //= family.mlp_matrices
    return fields


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


def _refuse_shapes(config: ModelConfig, where: str) -> None:
    """Raises UserError for heads that cannot be shared or rotated."""
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"{where}: {config.num_heads} attention heads cannot share "
            f"{config.num_kv_heads} key/value heads evenly"
        )
    if config.partial_rotary_factor == 1 and config.head_dim % 2:
        raise UserError(f"{where}: heads of odd width {config.head_dim} cannot be rotated")
    if config.rotary_dim % 2 or not 0 < config.rotary_dim <= config.head_dim:
        raise UserError(
            f"{where}: partial_rotary_factor {config.partial_rotary_factor} of heads of width "
            f"{config.head_dim} would rotate {config.rotary_dim} numbers of each; they must be an "
            f"even number and part of the head"
        )


def _refuse_windows(
    values: dict[str, Any], family: Family, config: ModelConfig, where: str
) -> None:
    """Raises UserError if the attention of a layer does not cover the whole segment.

    A window of at least max_position_embeddings tokens covers every row up to that length.
    """
    kinds = values.get("layer_types", [])
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{where}: layer_types other than 'full_attention' are not supported")
    window, switch = values["sliding_window"], ""
    if family.switches_windows:
        switch = "use_sliding_window is true and "
        window = values.get("use_sliding_window") and window
        # Only the layers from max_window_layers on have the window.
        if window and _number(values, "max_window_layers", True, where) >= config.num_layers:
            window = None
    if window and _number(values, "sliding_window", True, where) < config.seq_length:
        raise UserError(
            f"{where}: {switch}sliding_window {window} is below max_position_embeddings "
            f"{config.seq_length}, but sliding windows are not supported; for rows of up to "
            f"{window} tokens, which need no window, set max_position_embeddings to {window}"
        )


def _rope_parameters(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads rope_scaling or, as transformers 5 writes it, rope_parameters.

    Raises:
      UserError: the file has both, or parameters for each type of layer.
    """
    if values.get("rope_scaling") and values.get("rope_parameters"):
        raise UserError(f"{where} has both rope_scaling and rope_parameters; remove one of them")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"{where}: rotary parameters by layer type are not supported")
    return rope


def _rope_scaling(
    values: dict[str, Any], rope: dict[str, Any], family: Family, where: str
) -> RopeScaling | None:
    """Reads the scaling of the rotary frequencies; None means that they are not scaled.

    Raises:
      UserError: the type is none of the family's, or a number is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types:
        raise UserError(
            f"{where}: rope type {kind!r} is not supported, only "
            f"{' and '.join(map(repr, family.rope_types))}; remove the scaling if the weights were "
            f"trained without it"
        )
    if kind == "default":
        return None
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
    return scaling


def _rope_layers(values: dict[str, Any], layers: int, where: str) -> tuple[bool, ...]:
    """Reads which layers rotate. Despite its name, no_rope_layers has 1 for those that do.

    Raises:
      UserError: the list is shorter than the model, or has other entries than 0 and 1.
    """
    listed = values.get("no_rope_layers")
    if listed is None:
        interval = _number(values, "no_rope_layer_interval", True, where)
        return tuple(layer % interval != 0 for layer in range(1, layers + 1))
    if not isinstance(listed, list) or any(entry not in (0, 1) for entry in listed):
        raise UserError(f"{where}: no_rope_layers is {listed!r}, not a list of 0 and 1")
    if len(listed) < layers:
        raise UserError(
            f"{where}: no_rope_layers has {len(listed)} entries for {layers} layers; give one for "
            f"each layer"
        )
    return tuple(map(bool, listed[:layers]))


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
