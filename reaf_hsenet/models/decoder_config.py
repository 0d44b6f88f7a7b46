"""Sizes and rules of a language decoder, read from the config.json of Phi-3, Phi-4 and Llama folders.

What a config.json asks for and models/decoder.py does not do is refused by name. Source: transformers 4.49.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reaf_hsenet.errors import InputError
from reaf_hsenet.files import read_json
from reaf_hsenet.settings import check_ranges, setting

# Keys that change no output of a trained model, and keys of which one value is implemented.
INERT = {
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "max_length",
    "name_or_path",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
}
ONLY = {
    "attention_bias": False,
    "attention_dropout": 0,
    "embd_pdrop": 0,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "resid_pdrop": 0,
}
# The same of what transformers 4 writes of every model's settings (to_dict), whatever they mean to it. Not
# written here.
NEUTRAL = {
    "add_cross_attention": False,
    "diversity_penalty": 0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1,
    "tie_encoder_decoder": False,
}
ROPE_KEYS = {
    "default": set(),
    "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
LARGEST = 2**24  # sizes above this are refused before anything is made of them


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions. kind: `default`, `longrope` (Phi-3, Phi-4-mini) or `llama3`.

    dims: features of a head that are rotated. original: tokens that the model was first trained on; longrope
    takes `long_factor` for more tokens than that. context: tokens that it can take.
    """

    dims: int = setting(above=0, most=LARGEST)
    theta: float = setting(10000.0, above=0)
    kind: Literal["default", "longrope", "llama3"] = "default"
    original: int = setting(0, least=0, most=LARGEST)
    context: int = setting(0, least=0, most=LARGEST)
    short_factor: tuple[float, ...] = setting((), above=0)
    long_factor: tuple[float, ...] = setting((), above=0)
    factor: float = setting(1.0, above=0)
    low_freq_factor: float = setting(1.0, above=0)
    high_freq_factor: float = setting(1.0, above=0)

    def __post_init__(self):
        check_ranges(self)
        factors = self.dims // 2 if self.kind == "longrope" else 0
        if self.dims % 2 or not len(self.short_factor) == len(self.long_factor) == factors:
            raise InputError(
                f"RopeConfig has {self.dims} dims of kind {self.kind}; expected an even number, and "
                f"{factors} factors"
            )
        if self.kind == "longrope" and self.original < 2:
            raise InputError(f"original of RopeConfig is {self.original}; expected 2 or more")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise InputError("low_freq_factor of RopeConfig is not below high_freq_factor")

    @property
    def frequencies(self) -> tuple[list[float], list[float]]:
        """Return radians a position of each pair of features: up to `original` tokens, and for more."""
        plain = [self.theta ** (-2 * i / self.dims) for i in range(self.dims // 2)]
        if self.kind == "longrope":
            return tuple(
                [f / s for f, s in zip(plain, x, strict=True)] for x in (self.short_factor, self.long_factor)
            )
        if self.kind == "llama3":
            plain = [self._llama3(f) for f in plain]
        return plain, plain

    def _llama3(self, frequency: float) -> float:
        """Return a frequency as Llama 3 changes it: long waves are stretched by `factor`, short ones stay."""
        turns = self.original * frequency / (2 * math.pi)  # in the original context
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return frequency * (kept + (1 - kept) / self.factor)

    @property
    def amplitude(self) -> float:
        """The factor that longrope multiplies cos and sin by, at every length."""
        ratio = self.context / self.original if self.kind == "longrope" else 1.0
        return math.sqrt(1 + math.log(ratio) / math.log(self.original)) if ratio > 1 else 1.0


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder.

    family: `phi3` (qkv and gate_up are one matrix each on disk) or `llama` (separate). window: None or
    tokens seen, the query's own included. Ids: eos may be several, pad and bos may be absent.
    """

    family: Literal["phi3", "llama"]
    vocab: int = setting(above=0, most=LARGEST)
    width: int = setting(above=0, most=LARGEST)
    layers: int = setting(above=0, most=LARGEST)
    heads: int = setting(above=0, most=LARGEST)
    kv_heads: int = setting(above=0, most=LARGEST)
    head_dim: int = setting(above=0, most=LARGEST)
    mlp: int = setting(above=0, most=LARGEST)
    context: int = setting(above=0, most=LARGEST)
    rope: RopeConfig
    eps: float = setting(1e-5, above=0)
    tied: bool = False
    window: int | None = None
    bos_id: int | None = setting(None, least=0)
    eos_ids: tuple[int, ...] = setting((), least=0)
    pad_id: int | None = setting(None, least=0)

    @classmethod
    def from_folder(cls, folder: Path) -> "DecoderConfig":
        path = Path(folder) / "config.json"
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, values: dict, source: str = "config.json") -> "DecoderConfig":
        """Read the values of a config.json.

        Raises InputError, naming the key, for what is missing, of another kind or not implemented.
        """
        if not isinstance(values, dict):
            raise InputError(f"{source}: expected an object of settings, found {type(values).__name__}")
        # null means absent, but of what transformers computes with as it is.
        left = {
            k: v
            for k, v in values.items()
            if k not in INERT and (v is not None or k in ("rms_norm_eps", "rope_theta"))
        }
        family = left.pop("model_type", None)
        if family not in ("phi3", "llama"):
            raise InputError(
                f"{source}: model_type {family!r:.60} is not implemented; expected phi3 (Phi-3, Phi-4) or "
                f"llama"
            )
        for key, only in (ONLY | NEUTRAL).items():
            if left.pop(key, only) != only:
                raise InputError(f"{source}: {key} {values[key]!r:.60} is not implemented; only {only!r} is")

        def take(key: str, kind: type, default=None):
            value = left.pop(key, default)
            expected = {
                int: f"a whole number from 1 to {LARGEST}",
                float: "a positive number",
                bool: "true or false",
            }[kind]
            fits = (
                _positive(value)
                if kind is float
                else type(value) is kind and (kind is bool or 1 <= value <= LARGEST)
            )
            if not fits:
                raise InputError(f"{source}: {key} is {value!r:.60}; expected {expected}")
            return kind(value)

        width, heads = take("hidden_size", int), take("num_attention_heads", int)
        head_dim, context = take("head_dim", int, width // heads), take("max_position_embeddings", int)
        bos, eos, pad = (left.pop(f"{token}_token_id", None) for token in ("bos", "eos", "pad"))
        pad = None if pad == -1 else pad  # "none" of the first Llama files
        eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        rope = _rope(left, take, head_dim, context=context, family=family, source=source)
        made = dict(
            family=family,
            vocab=take("vocab_size", int),
            width=width,
            layers=take("num_hidden_layers", int),
            heads=heads,
            kv_heads=take("num_key_value_heads", int, heads),
            head_dim=head_dim,
            mlp=take("intermediate_size", int),
            context=context,
            rope=rope,
            eps=take("rms_norm_eps", float, 1e-5 if family == "phi3" else 1e-6),
            tied=take("tie_word_embeddings", bool, False),
            bos_id=bos,
            eos_ids=eos,
            pad_id=pad,
            window=left.pop("sliding_window", None) if family == "phi3" else None,
        )
        kinds = left.pop("layer_types", None)
        full = isinstance(kinds, list) and kinds.count("full_attention") == len(kinds) == made["layers"]
        if kinds is not None and not (full and made["window"] is None):
            expected = "full_attention of every layer, and no sliding_window beside it"
            raise InputError(f"{source}: layer_types {kinds!r:.60} is not implemented; expected {expected}")
        if left:
            raise InputError(
                f"{source}: {', '.join(sorted(left))} not implemented; expected the settings of Phi-3, "
                f"Phi-4 or Llama"
            )
        try:
            return cls(**made)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def __post_init__(self):
        check_ranges(self)
        if self.rope.dims > self.head_dim:
            raise InputError(f"{self.rope.dims} rotated features are more than the {self.head_dim} of a head")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} attention heads cannot share {self.kv_heads} key/value heads")
        if self.heads * self.head_dim > LARGEST:
            raise InputError(
                f"{self.heads} attention heads of {self.head_dim} features are more than is implemented"
            )
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise InputError(
                f"sliding_window is {self.window!r:.60}; expected a positive number of tokens or null"
            )
        special = [i for i in (self.bos_id, self.pad_id, *self.eos_ids) if i is not None]
        if not all(type(i) is int and 0 <= i < self.vocab for i in special):
            raise InputError(
                f"bos, eos and pad ids {special!r:.60} are not all tokens of a vocabulary of {self.vocab}"
            )

    def to_json(self, dtype: str) -> dict:
        """Return the values of a config.json, as transformers 4.49 writes them."""
        rope, scaling = self.rope, None
        if rope.kind != "default":
            scaling = {"type" if rope.kind == "longrope" else "rope_type": rope.kind}
            scaling |= {key: _listed(getattr(rope, key)) for key in sorted(ROPE_KEYS[rope.kind])}
        values = {
            "architectures": ["Phi3ForCausalLM" if self.family == "phi3" else "LlamaForCausalLM"],
            "model_type": self.family,
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp,
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": self.tied,
            "rope_theta": rope.theta,
            "rope_scaling": scaling,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None,
            "pad_token_id": self.pad_id,
            "torch_dtype": dtype,
            **{
                key: value
                for key, value in ONLY.items()
                if self.family == "phi3" or key in ("hidden_act", "attention_bias", "mlp_bias")
            },
        }
        if self.family == "phi3":
            values |= {
                "original_max_position_embeddings": rope.original or self.context,
                "sliding_window": self.window,
                "partial_rotary_factor": rope.dims / self.head_dim,
            }
        if self.family == "llama" or self.head_dim != self.width // self.heads:
            values["head_dim"] = self.head_dim
        if rope.kind == "llama3":
            scaling["original_max_position_embeddings"] = rope.original
        return values


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _positive(value) -> bool:
    """Return a number that is neither so large nor so small that formulas overflow."""
    return type(value) in (int, float) and 1e-30 <= value <= 1e30


def _rope(left: dict, take, head_dim: int, context: int, family: str, source: str) -> RopeConfig:
    """Read `rope_scaling` beside `rope_theta`, or, of transformers 5, `rope_parameters` with both."""
    found = [left.pop(key) for key in ("rope_scaling", "rope_parameters") if key in left]
    if len(found) > 1 or not all(isinstance(scaling, dict) for scaling in found):
        raise InputError(
            f"{source}: rope_scaling is {found!r:.60}; expected one object or null, there or in "
            f"rope_parameters"
        )
    scaling = {key: value for scaling in found for key, value in scaling.items()}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if key in scaling and left.setdefault(key, scaling[key]) != scaling[key]:
            raise InputError(
                f"{source}: {key} is {left[key]!r:.60}, but {scaling[key]!r:.60} in the rope settings; "
                f"leave one out"
            )
        scaling.pop(key, None)
    kinds = [scaling.pop(key) for key in ("type", "rope_type") if key in scaling] or ["default"]
    if family == "phi3":  # older names of longrope in Phi-3 folders
        kinds = ["longrope" if kind in ("su", "yarn") else kind for kind in kinds]
    kind, implemented = kinds[0], ("default", "longrope" if family == "phi3" else "llama3")
    if kind not in implemented or kinds[-1] != kind:
        raise InputError(
            f"{source}: rope type {kinds[-1]!r:.60} is not implemented for {family}; expected "
            f"{' or '.join(implemented)}"
        )
    wanted = ROPE_KEYS[kind]
    if set(scaling) != wanted:
        wrong = ", ".join(sorted(set(scaling) ^ wanted))
        raise InputError(
            f"{source}: rope_scaling of type {kind} takes {', '.join(sorted(wanted)) or 'nothing'}; not "
            f"so: {wrong}"
        )
    part = take("partial_rotary_factor", float, 1.0)
    dims = int(head_dim * min(part, 2.0))
    if not 0 < dims <= head_dim or dims % 2 or (family == "llama" and dims < head_dim):
        raise InputError(
            f"{source}: partial_rotary_factor {part} of head_dim {head_dim}: expected an even number of "
            f"features" + (", and all of them for llama" if family == "llama" else "")
        )
    for key, value in scaling.items():
        listed = kind == "longrope"
        if isinstance(value, list) != listed or not all(map(_positive, value if listed else [value])):
            raise InputError(
                f"{source}: rope_scaling {key} is {value!r:.60}; expected "
                f"{'positive numbers' if listed else 'a positive number'}"
            )
        if listed and len(value) != dims // 2:
            raise InputError(
                f"{source}: rope_scaling {key} has {len(value)} factors; expected {dims // 2} (half of "
                f"{dims} rotated features)"
            )
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{source}: rope_scaling low_freq_factor must be below high_freq_factor")
    original = take("original_max_position_embeddings", int, context if kind == "default" else None)
    if kind == "longrope" and original < 2:
        raise InputError(f"{source}: original_max_position_embeddings is {original}; expected 2 or more")
    return RopeConfig(
        dims=dims,
        theta=take("rope_theta", float, 10000.0),
        kind=kind,
        context=context,
        original=original,
        **{key: tuple(value) if isinstance(value, list) else float(value) for key, value in scaling.items()},
    )
