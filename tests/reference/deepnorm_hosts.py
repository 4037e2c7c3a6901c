"""Small hosts for the tests of DeepNorm, and the same networks written out in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def llama(kind: str = "Llama", **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **changes}
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def gpt2(layers: int = 3, **changes):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=layers, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, **changes
    )
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()


def bert(name: str = "BertForMaskedLM", **changes):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SMALL, "max_position_embeddings": 64, **changes})
    return getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()


BUILD = {"llama": llama, "gpt2": gpt2, "bert": bert}


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def shake(model, seed: int = 5):
    """Move every parameter, so that no gain is 1 and no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def dense_llama(model, ids, alpha):
    """Post-norm Llama in float64, token by token formulas written out; no final norm."""
    config, state = model.config, {name: p.double() for name, p in model.state_dict().items()}
    x = state["model.embed_tokens.weight"][ids]
    length, heads, groups, dim = ids.shape[1], 4, 2, 8
    angle = torch.arange(length)[:, None].double() / 10000 ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rms(h, name):
        return h / (h.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[f"{name}.weight"]

    def split(h, count):
        return h.unflatten(-1, (count, dim)).transpose(1, 2)

    def turn(h):
        return h * cos + torch.cat((-h[..., dim // 2 :], h[..., : dim // 2]), -1) * sin

    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        q, k, v = (
            split(x @ state[f"{at}.self_attn.{p}_proj.weight"].T, n)
            for p, n in (("q", heads), ("k", groups), ("v", groups))
        )
        k, v = turn(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = turn(q) @ k.mT / dim**0.5 + torch.full((length, length), -torch.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = rms(alpha * x + mixed @ state[f"{at}.self_attn.o_proj.weight"].T, f"{at}.input_layernorm")
        inner = F.silu(x @ state[f"{at}.mlp.gate_proj.weight"].T) * (x @ state[f"{at}.mlp.up_proj.weight"].T)
        x = rms(alpha * x + inner @ state[f"{at}.mlp.down_proj.weight"].T, f"{at}.post_attention_layernorm")
    return x @ state["lm_head.weight"].T


def dense_layer_norm(state, name, h, eps):
    centred = h - h.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def dense_gpt2(model, ids, alpha):
    """Post-norm GPT-2 in float64."""
    state = {name.removeprefix("transformer."): p.double() for name, p in model.state_dict().items()}
    length = ids.shape[1]
    x = state["wte.weight"][ids] + state["wpe.weight"][:length]
    for i in range(model.config.n_layer):
        at = f"h.{i}"
        q, k, v = (x @ state[f"{at}.attn.c_attn.weight"] + state[f"{at}.attn.c_attn.bias"]).split(32, -1)
        q, k, v = (h.unflatten(-1, (4, 8)).transpose(1, 2) for h in (q, k, v))
        scores = q @ k.mT / 8**0.5 + torch.full((length, length), -torch.inf).triu(1)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        update = mixed @ state[f"{at}.attn.c_proj.weight"] + state[f"{at}.attn.c_proj.bias"]
        x = dense_layer_norm(state, f"{at}.ln_1", alpha * x + update, 1e-5)
        inner = F.gelu(x @ state[f"{at}.mlp.c_fc.weight"] + state[f"{at}.mlp.c_fc.bias"], approximate="tanh")
        update = inner @ state[f"{at}.mlp.c_proj.weight"] + state[f"{at}.mlp.c_proj.bias"]
        x = dense_layer_norm(state, f"{at}.ln_2", alpha * x + update, 1e-5)
    return x @ state["wte.weight"].T


def dense_bert(model, ids, alpha):
    """Post-norm BERT encoder in float64; the last hidden state."""
    state = {name.removeprefix("bert."): p.double() for name, p in model.state_dict().items()}
    eps = model.config.layer_norm_eps
    x = state["embeddings.word_embeddings.weight"][ids] + state["embeddings.token_type_embeddings.weight"][0]
    x = x + state["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = dense_layer_norm(state, "embeddings.LayerNorm", x, eps)

    def linear(name, h):
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for i in range(model.config.num_hidden_layers):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(f"{at}.attention.self.{part}", x).unflatten(-1, (4, 8)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        update = linear(f"{at}.attention.output.dense", mixed)
        x = dense_layer_norm(state, f"{at}.attention.output.LayerNorm", alpha * x + update, eps)
        update = linear(f"{at}.output.dense", F.gelu(linear(f"{at}.intermediate.dense", x)))
        x = dense_layer_norm(state, f"{at}.output.LayerNorm", alpha * x + update, eps)
    return x


DENSE = {"llama": dense_llama, "gpt2": dense_gpt2, "bert": dense_bert}
