"""The whole model in one file: a decoder-only transformer with quantised linear layers.

Mirrors core/src/model.cpp name by name. In eval mode its logits are those of the engine, bit for bit; in training it is
the same function in torch's own order of operations, under autocast and with straight-through gradients.

Legend: B batch, T tokens, D d_model, F d_ff, N heads, K kv heads, H d_head, V vocabulary.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebit.checkpoint import Checkpoint, granularity, rows
from onebit.config import ModelConfig, Weights, input_quantizer
from onebit.nn import ordered
from onebit.nn.bitlinear import (
    Rounding,
    bf16_rows,
    bit_linear,
    blended_linear,
    code_linear,
    hadamard,
    int8_rows,
    int15_activations,
    limit_gradient,
)
from onebit.nn.frozen import CodeLinear, frozen
from onebit.packing import PackedTensor

_EXACT = Rounding()


# Queries and keys before their rotary positions, and values; float32 [B, heads, T, H] each.
States = tuple[Tensor, Tensor, Tensor]


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain, over the last axis; in eval mode to the bit what the engine computes."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, float32 [..., width]."""
        if self.training:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return ordered.rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """A float32 master matrix [out, in], for some with a bias; `Block` decides how it multiplies.

    With a learned scale the master is gain * weight, a gain for each row: what is rounded, and what is saved.
    """

    def __init__(self, n: int, k: int, bias: bool = False, learned_scale: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, k))
        if bias:
            self.bias = nn.Parameter(torch.zeros(n))
        self.gain = nn.Parameter(torch.ones(n)) if learned_scale else None
        # What an adapter adds; see nn/lora.py.
        self.lora: nn.Module | None = None

    @property
    def master(self) -> Tensor:
        """The matrix that the model multiplies by, before it is rounded; float32 [out, in]."""
        return self.weight if self.gain is None else self.gain[:, None] * self.weight


class Block(nn.Module):
    """Attention and gated feed-forward layer, each with a pre-norm and, where configured, a sub-norm."""

    def __init__(
        self, config: ModelConfig, weights: Weights, rounding: Rounding, learned_scale: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.weights = weights
        self.rounding = rounding
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        if config.sub_norm:
            self.attn_sub_norm = RMSNorm(config.n_heads * config.d_head, config.norm_eps)
            self.ffn_sub_norm = RMSNorm(config.d_ff, config.norm_eps)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.d_head, config.norm_eps)
            self.k_norm = RMSNorm(config.d_head, config.norm_eps)
        for name, (n, k) in config.linear_shapes().items():
            bias = config.qkv_bias and name in ("q", "k", "v")
            setattr(self, name, Linear(n, k, bias, learned_scale))

    def linear(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """Multiply x [..., in] by the named matrices; they share its quantisation. Then biases, then adapters."""
        layers = [getattr(self, name) for name in names]
        if self.config.hadamard and names[0] in ("o", "down"):
            x = hadamard(x) if self.training else ordered.hadamard(x)
        results = []
        for y, layer in zip(self._multiply(x, layers, names[0]), layers, strict=True):
            y = y + layer.bias if hasattr(layer, "bias") else y
            results.append(y if layer.lora is None else y + layer.lora(x))
        return tuple(results)

    def _multiply(self, x: Tensor, layers: list[Any], first: str) -> tuple[Tensor, ...]:
        c, rounding = self.config, self.rounding if self.training else _EXACT
        kind = input_quantizer(rounding.activations or c.activations, first)
        if rounding.notes is not None:
            rounding.note(x, kind)
        if isinstance(layers[0], CodeLinear):
            return code_linear(x, [(layer.codes, layer.scale) for layer in layers], kind, c.scale)
        if not isinstance(layers[0], Linear):
            return tuple(layer.logits(x) for layer in layers)
        weights = tuple(layer.master for layer in layers)
        if self.weights == "dense":
            return F.linear(x, torch.cat(weights)).float().split([w.shape[0] for w in weights], dim=-1)
        if rounding.strength is not None:
            ys = blended_linear(x, weights, self.weights, kind, c.scale, rounding.strength)
        else:
            ys = bit_linear(x, weights, self.weights, kind, c.scale, rounding.temperature)
        if rounding.gradient_limit:
            ys = tuple(limit_gradient(y, rounding.gradient_limit) for y in ys)
        return ys

    def forward(
        self, x_BTD: Tensor, cos_TH: Tensor, sin_TH: Tensor, states: list[States] | None = None
    ) -> Tensor:
        """One block; cos and sin are float32 [T, H / 2]. A list of states gets those of this block."""
        c = self.config
        q, k, v = self.linear(self.attn_norm(x_BTD), "q", "k", "v")
        q_BNTH, k_BKTH = _heads(q, c.n_heads), _heads(k, c.n_kv_heads)
        if c.qk_norm:
            q_BNTH, k_BKTH = self.q_norm(q_BNTH), self.k_norm(k_BKTH)
        if states is not None:
            states.append((q_BNTH, k_BKTH, _heads(v, c.n_kv_heads)))
        q_BNTH = rope(q_BNTH, cos_TH, sin_TH)
        # The cache holds bfloat16, so keys and values are rounded here too.
        k_BKTH = rope(k_BKTH, cos_TH, sin_TH).bfloat16().float()
        v_BKTH = _heads(v, c.n_kv_heads).bfloat16().float()
        if self.training:
            grouped = c.n_kv_heads != c.n_heads
            a_BNTH = F.scaled_dot_product_attention(
                q_BNTH, k_BKTH, v_BKTH, is_causal=True, enable_gqa=grouped
            )
        else:
            group = c.n_heads // c.n_kv_heads
            k_BNTH, v_BNTH = (x.repeat_interleave(group, dim=1) for x in (k_BKTH, v_BKTH))
            a_BNTH = ordered.attend(q_BNTH, k_BNTH, v_BNTH)
        a = a_BNTH.float().transpose(1, 2).flatten(2)
        x_BTD = x_BTD + self.linear(self.attn_sub_norm(a) if c.sub_norm else a, "o")[0]

        gate, up = self.linear(self.ffn_norm(x_BTD), "gate", "up")
        if c.activation == "relu2":
            f_BTF = F.relu(gate).square() * up
        else:
            f_BTF = (F.silu(gate) if self.training else ordered.silu(gate)) * up
        return x_BTD + self.linear(self.ffn_sub_norm(f_BTF) if c.sub_norm else f_BTF, "down")[0]


class Transformer(nn.Module):
    """Tokens in, logits out. State dict names are the canonical names of `ModelConfig.tensor_shapes`.

    Args:
        config: shape and flags.
        seed: of the initial weights: normal with deviation 0.02, o and down divided by sqrt(2 n_layers).
        head: how the engine will keep embedding and head: "q8" or "bf16".
        learned_scale: the linear layers learn a gain for each of their rows, which is part of the saved weights.
    """

    def __init__(
        self, config: ModelConfig, seed: int = 0, head: str = "q8", learned_scale: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        # How a training step rounds; in eval mode the definitions hold.
        self.rounding = Rounding()
        self.head_format = head
        self.embed: Any = Linear(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(
            Block(config, config.weights_of(f"layers.{i}"), self.rounding, learned_scale)
            for i in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied_head:
            self.head: Any = Linear(config.vocab_size, config.d_model)
        self.cos: Tensor
        self.sin: Tensor
        for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
            self.register_buffer(name, table, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and not parameter.is_meta:
                deep = name.endswith((".o.weight", ".down.weight"))
                deviation = 0.02 / (2 * config.n_layers) ** 0.5 if deep else 0.02
                nn.init.normal_(parameter, std=deviation, generator=generator)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, head: str = "q8") -> "Transformer":
        """A model with the weights of a float32 master, and the head that `quantize` would give it.

        Raises:
            ValueError: a packed checkpoint: rounding its weights again would not give its codes and scales.
        """
        if checkpoint.is_packed:
            raise ValueError("this model is packed; training and evaluation need its float32 master")
        model = cls(checkpoint.config, head=head)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(torch.tensor(checkpoint.tensors[name]))
        return model

    @classmethod
    def from_packed(cls, checkpoint: Checkpoint) -> "Transformer":
        """A model with the codes of a packed checkpoint, which do not learn: for adapters, see nn/lora.py.

        Args:
            checkpoint: as `onebit.checkpoint.quantize` makes it.
        """
        assert checkpoint.is_packed and checkpoint.head
        config, tensors = checkpoint.config, checkpoint.tensors
        # Without memory for weights that are replaced at once.
        with torch.device("meta"):
            model = cls(config, head=checkpoint.head)
        for name in config.tensor_shapes():
            path, _, kind = name.rpartition(".")
            parent, _, last = path.rpartition(".")
            tensor = tensors[name]
            if isinstance(tensor, PackedTensor):
                layer = frozen(tensor, granularity(name, config, tensor.encoding))
                setattr(model.get_submodule(parent), last, layer)
            elif kind == "bias":
                model.get_submodule(path).register_buffer("bias", torch.tensor(rows(name, tensor)))
            else:
                # No parameter, but a constant: what has parameters learns.
                norm = model.get_submodule(path)
                del norm.weight
                norm.register_buffer("weight", torch.tensor(rows(name, tensor)))
        return model

    def linear_weights(self) -> dict[str, nn.Parameter]:
        """The parameters behind the codes of the linear layers, by their canonical names."""
        return {name: p for name, p in self.named_parameters() if self.config.is_linear(name)}

    def masters(self) -> dict[str, Tensor]:
        """The tensors of a float32 checkpoint, by their canonical names; learned scales are multiplied in."""
        named = dict(self.named_parameters())
        tensors = {}
        for name in self.config.tensor_shapes():
            gain = named.get(f"{name.removesuffix('.weight')}.gain")
            tensors[name] = (named[name] if gain is None else gain[:, None] * named[name]).detach()
        return tensors

    def forward(
        self, tokens_BT: Tensor, layer: int | None = None, states: list[States] | None = None
    ) -> Tensor:
        """Logits of every position.

        Args:
            tokens_BT: int64 [B, T], T at most max_seq_len.
            layer: whose queries, keys and values are wanted.
            states: a list that gets them.

        Returns:
            float32 [B, T, V].
        """
        length = tokens_BT.shape[1]
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens exceed the context of {self.config.max_seq_len}")
        x_BTD = self._embed(tokens_BT)
        cos_TH, sin_TH = self.cos[:length], self.sin[:length]
        for i, block in enumerate(self.layers):
            x_BTD = block(x_BTD, cos_TH, sin_TH, states if i == layer else None)
        return self._logits(self.norm(x_BTD))

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        if not isinstance(self.embed, Linear):
            return self.embed.take(tokens_BT)
        embed_VD: Tensor = self.embed.weight
        if self.config.weights != "dense":
            embed_VD = bf16_rows(embed_VD) if self.head_format == "bf16" else int8_rows(embed_VD)
        return F.embedding(tokens_BT, embed_VD)

    def _logits(self, x_BTD: Tensor) -> Tensor:
        head = self.embed if self.config.tied_head else self.head
        if not isinstance(head, Linear):
            return head.logits(x_BTD)
        head_VD, is_bf16 = head.weight, self.head_format == "bf16"
        if self.config.weights == "dense":
            return F.linear(x_BTD, head_VD).float()
        if not self.training:
            return (ordered.head_bf16 if is_bf16 else ordered.head)(x_BTD, head_VD)
        if is_bf16:
            return F.linear(x_BTD, bf16_rows(head_VD)).float()
        return F.linear(int15_activations(x_BTD), int8_rows(head_VD)).float()


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, float32 [max_seq_len, d_head / 2].

    angle = position * float32(frequency), in float64, where it is exact. Sine, cosine and their product with the
    attention factor are float64 too, and rounded once.
    """
    frequencies = np.array(config.rope_frequencies(), np.float32).astype(np.float64)
    angle = np.arange(config.max_seq_len, dtype=np.float64)[:, None] * frequencies
    factor = config.rope_attention_factor
    cos, sin = ((factor * wave(angle)).astype(np.float32) for wave in (np.cos, np.sin))
    return torch.from_numpy(cos), torch.from_numpy(sin)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of every head: (a, b) -> (a cos - b sin, b cos + a sin). x: [B, heads, T, H]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)
