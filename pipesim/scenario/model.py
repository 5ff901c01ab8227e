"""The target model of a scenario, and what its draft model is known by."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipesim.hardware.costs import ModelPart
from pipesim.hardware.models import BITS_PER_WEIGHT, MODELS, ModelShape
from pipesim.scenario.section import Section, find_profile

_SHAPE = ("hidden", "heads", "kv_heads", "intermediate", "gated", "tied")
_FOLLOWS_FROM_PROFILE = ("name", "layers", "hidden")


def _schema(schema: dict[str, Any]) -> None:
    """What a profile brings need not be given beside it."""
    required = [key for key in schema.pop("required", ()) if key in _FOLLOWS_FROM_PROFILE]
    schema["anyOf"] = [{"required": required}, {"required": ["profile"]}]


class ModelShapeSection(Section):
    """The sizes of a model: all of a profile, or given one by one."""

    model_config = ConfigDict(json_schema_extra=_schema)

    profile: str | None = Field(default=None, json_schema_extra={"enum": [*MODELS, None]})
    """A known model such as llama-2-70b (`pipesim profiles` lists them): brings name, layers, hidden, vocabulary and
    all that a roofline cost needs. Layers and vocabulary may differ from it."""
    layers: int = Field(ge=1)
    """Transformer layers, spread over the stages."""
    hidden: int = Field(ge=1)
    """Width of the activations that travel between stages, in elements per row."""
    vocabulary: int = Field(default=32000, ge=3)
    """Number of token ids; simulated text draws from it."""
    heads: int | None = Field(default=None, ge=1)
    """Attention heads; needed by a roofline cost."""
    kv_heads: int | None = Field(default=None, ge=1)
    """Heads of keys and values; null: as many as heads."""
    intermediate: int | None = Field(default=None, ge=1)
    """Width of the MLP; needed by a roofline cost."""
    gated: bool = True
    """The MLP has three matrices (Llama), not two (Falcon)."""
    tied: bool = False
    """The LM head is the embedding: one table where both lie on one stage."""
    quantization: Literal["fp32", "bf16", "fp16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_1", "q4_0", "q3_k_m"] = "bf16"
    """Format of the weights, by its name in GGUF files; a roofline cost counts its bytes."""
    kv_bytes: int = Field(default=2, ge=1)
    """Bytes of one element in the KV cache, as a roofline cost counts them (2: float16)."""

    @model_validator(mode="before")
    @classmethod
    def _from_profile(cls, raw: Any) -> Any:
        """Fills in what the profile says, and refuses what contradicts it."""
        if not isinstance(raw, dict) or not isinstance(raw.get("profile"), str):
            return raw
        profile = find_profile("profile", raw["profile"], MODELS)
        shape = profile.shape
        wrong = [key for key in _SHAPE if raw.get(key) is not None and raw[key] != getattr(shape, key)]
        if wrong:
            raise ValueError(
                "\n".join(
                    f"{key} = {raw[key]}: profile {profile.name} has {getattr(shape, key)}: leave out one of the two"
                    for key in wrong
                )
            )
        known = {key: getattr(shape, key) for key in (*_SHAPE, "layers", "vocabulary")}
        known["name"] = profile.name
        known["activation_bytes"] = 4 if raw.get("quantization") == "fp32" else 2
        given = {key: value for key, value in raw.items() if value is not None}
        return {key: value for key, value in known.items() if key in cls.model_fields} | given

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelShapeSection":
        heads, kv_heads = self.heads, self.kv_heads
        if heads and self.hidden % heads:
            raise ValueError(f"heads = {heads}: hidden = {self.hidden} does not divide into them")
        if kv_heads and (heads is None or heads % kv_heads):
            raise ValueError(f"kv_heads = {kv_heads}: heads = {heads} does not divide into them")
        return self

    def missing(self) -> list[str]:
        """Keys that a roofline cost needs and that are not given."""
        return [key for key in ("heads", "intermediate") if getattr(self, key) is None]

    def shape(self) -> ModelShape:
        """All sizes; only if nothing is :meth:`missing`."""
        assert self.heads is not None
        assert self.intermediate is not None
        kv_heads = self.kv_heads or self.heads
        sizes = (self.layers, self.hidden, self.heads, kv_heads, self.intermediate, self.vocabulary)
        return ModelShape(*sizes, gated=self.gated, tied=self.tied)

    def part(self, layers: int, embeds: bool, predicts: bool, activation_bytes: int | None = None) -> ModelPart:
        """What a stage with so many layers holds; only if nothing is :meth:`missing`."""
        weight_bytes = BITS_PER_WEIGHT[self.quantization] / 8
        activation_bytes = activation_bytes or (4 if self.quantization == "fp32" else 2)
        return ModelPart(self.shape(), layers, embeds, predicts, weight_bytes, self.kv_bytes, activation_bytes)


class Model(ModelShapeSection):
    """The target model."""

    name: str
    """What to load for real: a known name such as smollm2-135m, a path, or a hub name. A label in simulation."""
    activation_bytes: int = Field(default=4, ge=1)
    """Bytes of one activation element on a link. Left out: 2 if execution.dtype is bfloat16 or quantized, otherwise 4;
    with a profile, 4 for fp32 weights, otherwise 2."""
