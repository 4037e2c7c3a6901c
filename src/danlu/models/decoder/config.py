"""Configuration of the decoder whose token mixing is chosen by name, layer by layer."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from transformers import PretrainedConfig

__all__ = ["MASKS", "MIXERS", "RESIDUALS", "DanluConfig"]

#: What a layer may mix tokens with. ``nope`` is full attention without positions.
MIXERS = ("full", "grouped", "window", "nope", "latent", "linear", "vq", "recurrent")
#: Mixers with whole keys and values, which the host's own caches hold.
PLAIN = ("full", "grouped", "window", "nope")
#: Mixers that cannot tell apart several texts in a row; a recurrence starts anew where positions do.
UNPACKED = ("latent", "linear", "vq")
#: Mixers with a softmax over whole keys, which take any mask.
SOFTMAX = ("full", "grouped", "nope", "latent")
RESIDUALS = ("pre", "post", "deepnorm", "none")
#: Who sees whom. The last three are for encoders: nothing can be generated with them.
MASKS = ("causal", "prefix", "bidirectional", "mixed_heads", "mixed_layers")


class DanluConfig(PretrainedConfig):
    """Sizes and choices of a decoder; with the default mixer, residual and mask it is a Llama, parameter names too.

    Args:
        vocab_size: number of tokens, >= 1.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward; None: 8/3 of the hidden size, rounded up to 64.
        num_hidden_layers: layers, >= 1.
        num_attention_heads: query heads of every mixer.
        num_key_value_heads: key heads, a divisor of the query heads. None: as many as query heads, and a quarter of
            them (at least 1) where the mixer is ``grouped``.
        head_dim: None: ``hidden_size / num_attention_heads``.
        mixer: one of ``MIXERS`` for all layers, or a list with one for each layer, or ``hybrid``: windows with a last
            layer of full attention without positions (archive 9603).
        sliding_window: keys that a ``window`` layer sees, the token's own included.
        residual: ``pre`` x + F(norm(x)), ``post`` norm(x + F(x)), ``deepnorm`` norm(alpha x + F(x)) with the constants
            and the initialisation of archive 8978, ``none`` F(norm(x)).
        deepnorm_recipe: ``paper``, ``sgd``, ``adam`` or ``lamb``, for ``residual="deepnorm"``.
        mask: ``causal``; ``prefix`` (prefix-LM, UniLM: the first tokens of a row see each other, see ``prefix_lengths``
            of the model's call); ``bidirectional``; ``mixed_heads``: the first half of the heads causal, the second
            anti-causal; ``mixed_layers``: odd layers (the first, third, ...) causal, even ones anti-causal.
        key_norm: keys of root-mean-square 1 in softmax layers (archive 9859).
        log_n: trained length at which the factor ln n / ln log_n on queries of full layers is 1 (archive 8823), >= 2;
            the factor is not clipped, since the model is trained with it. None: no factor.
        attention_scale: factor of the scores q.k of softmax layers; ``optimal``: the scale at which softmax learns
            fastest for half of ``max_position_embeddings`` keys (archive 9812); None: 1/sqrt(head_dim).
        kv_rank: width of the latent that ``latent`` layers cache; None: 4 head_dim.
        q_rank: width of the query latent; None: no query latent.
        rope_head_dim: rotated dims per head of ``latent`` layers, even; None: half of head_dim, rounded down to even.
        feature_map: of ``linear`` layers, see :class:`danlu.LinearAttention`.
        num_features: features per head of ``linear`` layers; None: the map's own default.
        num_codes: codes per key head of ``vq`` layers.
        block_size: block of ``vq`` layers, and chunk of ``linear`` ones.
        commitment: weight of the commitment loss of ``vq`` layers.
        state_size: complex channels of ``recurrent`` layers; None: the hidden size.
        radius_min: smallest initial modulus of their eigenvalues.
        radius_max: largest.
        hidden_act: activation of the feed-forward's gate.
        max_position_embeddings: training length.
        rope_parameters: as in the host library; None: base 10000.
        rms_norm_eps: of all norms.
        initializer_range: standard deviation of the initial matrices, but for deepnorm and for mixers that have an
            initialisation of their own.
        attention_bias: biases in the projections of softmax layers.
        attention_dropout: of softmax layers, in training.
        use_cache: whether the model returns a cache by default.
        tie_word_embeddings: the head is the embedding.
        pad_token_id: of padding, whose embedding is 0 at first.
        bos_token_id: of the start of a text.
        eos_token_id: of its end.
        kwargs: what every host configuration takes: ``dtype``, ...

    Raises:
        ValueError: an unknown name, a size out of range, or choices that exclude each other.

    Source: Scientific Spaces archive 10091, 9862, 9554, 9603, 8978, 9529, 9547, 9859, 9812
    """

    model_type = "danlu"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - the host adds lists to it
    base_model_tp_plan = {  # noqa: RUF012 - the host reads an attribute of the class
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        mixer: str | list[str] = "full",
        sliding_window: int = 512,
        residual: str = "pre",
        deepnorm_recipe: str = "paper",
        mask: str = "causal",
        key_norm: bool = False,
        log_n: int | None = None,
        attention_scale: float | str | None = None,
        kv_rank: int | None = None,
        q_rank: int | None = None,
        rope_head_dim: int | None = None,
        feature_map: str = "favor",
        num_features: int | None = None,
        num_codes: int = 256,
        block_size: int = 256,
        commitment: float = 1e-4,
        state_size: int | None = None,
        radius_min: float = 0.9,
        radius_max: float = 0.999,
        hidden_act: str = "silu",
        max_position_embeddings: int = 2048,
        rope_parameters: dict[str, Any] | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = -(-hidden_size * 8 // 3 // 64) * 64 if intermediate_size is None else intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.mixer = mixer
        self.mixers = _per_layer(mixer, num_hidden_layers)
        if num_key_value_heads is None:
            num_key_value_heads = max(1, num_attention_heads // 4) if "grouped" in self.mixers else num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.sliding_window = sliding_window
        self.residual = residual
        self.deepnorm_recipe = deepnorm_recipe
        self.mask = mask
        self.key_norm = key_norm
        self.log_n = log_n
        self.attention_scale = attention_scale
        self.kv_rank = 4 * self.head_dim if kv_rank is None else kv_rank
        self.q_rank = q_rank
        self.rope_head_dim = self.head_dim // 4 * 2 if rope_head_dim is None else rope_head_dim
        self.feature_map = feature_map
        self.num_features = num_features
        self.num_codes = num_codes
        self.block_size = block_size
        self.commitment = commitment
        self.state_size = hidden_size if state_size is None else state_size
        self.radius_min = radius_min
        self.radius_max = radius_max
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = False
        self.use_cache = use_cache
        self.pad_token_id, self.bos_token_id, self.eos_token_id = pad_token_id, bos_token_id, eos_token_id
        # what the host's caches go by; mixers with a state of their own put it in place of a full layer's
        self.layer_types = ["sliding_attention" if m == "window" else "full_attention" for m in self.mixers]
        _check(self)
        if set(self.mixers) <= set(PLAIN) and mask != "mixed_heads":
            # mixers with a state of their own, and halves of heads, stay whole on every process
            sides = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
            own = {f"layers.*.self_attn.{name}": side for name, side in sides.items()}
            self.base_model_tp_plan = own | type(self).base_model_tp_plan
        for derived in ("mixers", "layer_types"):
            kwargs.pop(derived, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def _per_layer(mixer: str | list[str], layers: int) -> list[str]:
    if layers < 1:
        raise ValueError(f"num_hidden_layers must be at least 1, got {layers}")
    if mixer == "hybrid":
        return ["window"] * (layers - 1) + ["nope"]
    names = [mixer] * layers if isinstance(mixer, str) else list(mixer)
    if len(names) != layers:
        raise ValueError(f"mixer must name one mixer for each of the {layers} layers, got {len(names)}: {names}")
    for name in names:
        _check_choice("mixer", name, (*MIXERS, "hybrid") if isinstance(mixer, str) else MIXERS)
    return names


def _check_choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = get_close_matches(str(value), allowed, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def _check(config: Any) -> None:
    _check_choice("residual", config.residual, RESIDUALS)
    _check_choice("mask", config.mask, MASKS)
    _check_choice("deepnorm_recipe", config.deepnorm_recipe, ("paper", "sgd", "adam", "lamb"))
    sizes = ("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "sliding_window", "kv_rank", "num_codes")
    for name in (*sizes, "num_key_value_heads", "block_size", "state_size", "intermediate_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads = {heads}, got {groups}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even to be rotated in pairs, got {config.head_dim}")
    if config.log_n is not None and config.log_n < 2:
        raise ValueError(f"log_n must be a trained length of at least 2, got {config.log_n}; None switches it off")
    scale = config.attention_scale
    if not (scale is None or scale == "optimal" or (isinstance(scale, int | float) and scale > 0)):
        raise ValueError(f'attention_scale must be a number > 0, "optimal" or None, got {scale!r}')
    used = dict.fromkeys(config.mixers)
    if config.mask != "causal" and (wrong := [m for m in used if m not in SOFTMAX]):
        raise ValueError(
            f"mask {config.mask!r} needs mixers that take any mask ({', '.join(SOFTMAX)}), got {', '.join(wrong)}"
        )
    if config.mask == "mixed_heads" and (heads % 2 or groups % 2):
        raise ValueError(f"mask 'mixed_heads' needs an even number of heads and of key heads, got {heads} and {groups}")
    plain = [m for m in used if m in PLAIN]
    for name in ("key_norm", "log_n"):
        if getattr(config, name) and len(plain) < len(used):
            wrong = [m for m in used if m not in plain]
            raise ValueError(f"{name} is for mixers with whole keys (full, grouped, window, nope), got {wrong}")
    if config.attention_scale is not None and (wrong := [m for m in used if m not in (*plain, "latent")]):
        raise ValueError(f"attention_scale is for softmax mixers, got {', '.join(wrong)}")
