"""The demo model: transformers' DeepSeek-V3 decoder, the multi-token-prediction (MTP) module, and the export.

Shape legend: B windows, T positions, H hidden size, V vocabulary, I expert intermediate size, N = B * T
tokens, K experts per token, S = N * K token-expert pairs.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3MoE,
    DeepseekV3RMSNorm,
)

SHARDS = 2


def demo_config(vocab_size: int) -> DeepseekV3Config:
    """Every DeepSeek-V3 trait, as small as can be; kv rank and rope width are what vLLM serves on CPU."""
    return DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        num_nextn_predict_layers=1,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_interleave=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


class _Reorder(torch.autograd.Function):
    """Rows by a permutation; its gradient is the inverse permutation, which a general gather cannot know."""

    @staticmethod
    def forward(ctx, rows_SH: torch.Tensor, order_S: torch.Tensor, inverse_S: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order_S, inverse_S)
        return rows_SH[order_S]

    @staticmethod
    def backward(ctx, gradient_SH: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient_SH[ctx.saved_tensors[1]], None, None


def sorted_experts(
    experts: nn.Module, hidden_NH: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor
) -> torch.Tensor:
    """Routed experts for training on CPU: pairs sorted by expert, one bfloat16 product per expert and matrix.

    The same sum as transformers' own implementations (report, section 2.1.2), under the name "demo_sorted".
    """
    tokens_N, top_K = expert_ids_NK.shape
    order_S = torch.argsort(expert_ids_NK.flatten(), stable=True)
    inverse_S = torch.argsort(order_S)
    counts = torch.bincount(expert_ids_NK.flatten(), minlength=experts.num_experts).tolist()
    pairs_SH = hidden_NH.to(torch.bfloat16).unsqueeze(1).expand(-1, top_K, -1).reshape(tokens_N * top_K, -1)
    inputs_SH = _Reorder.apply(pairs_SH, order_S, inverse_S)
    gate_up, down = experts.gate_up_proj.to(torch.bfloat16), experts.down_proj.to(torch.bfloat16)
    outputs = []
    for part, gate_up_one, down_one in zip(
        inputs_SH.split(counts), gate_up.unbind(), down.unbind(), strict=True
    ):
        gate, up = nn.functional.linear(part, gate_up_one).chunk(2, dim=-1)
        outputs.append(nn.functional.linear(nn.functional.silu(gate) * up, down_one))
    outputs_SH = _Reorder.apply(torch.cat(outputs), inverse_S, order_S)
    weights_N1K = weights_NK.to(torch.bfloat16).unsqueeze(1)
    return torch.bmm(weights_N1K, outputs_SH.view(tokens_N, top_K, -1)).squeeze(1)


ALL_EXPERTS_FUNCTIONS.register("demo_sorted", sorted_experts)


class MtpModule(nn.Module):
    """One MTP module (DeepSeek-V3 report, section 2.2), in the form that vLLM's `deepseek_mtp` computes.

    As there, the embedding comes first in the concatenation, the hidden state is the one after the model's
    last norm, and the embedding at position 0 is zero.
    """

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, layer_idx=config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        next_embedding_BTH: torch.Tensor,
        hidden_BTH: torch.Tensor,
        mask: torch.Tensor | None,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Hidden states, normed for the head, that predict the token after next: float[B, T, H]."""
        next_embedding_BTH = torch.cat(
            [torch.zeros_like(next_embedding_BTH[:, :1]), next_embedding_BTH[:, 1:]], dim=1
        )
        joined = torch.cat([self.enorm(next_embedding_BTH), self.hnorm(hidden_BTH)], dim=-1)
        return self.norm(self.block(self.eh_proj(joined), attention_mask=mask, position_embeddings=rope))


class DemoModel(nn.Module):
    """The causal model and its MTP module, which shares the model's embedding and head."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.main = DeepseekV3ForCausalLM(config)
        self.mtp = MtpModule(config)
        self.mtp.apply(self.main._init_weights)
        # Depth-scaled output projections keep the residual stream's size at the start (as in GPT-2).
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                weight.data.mul_((2 * config.num_hidden_layers) ** -0.5)

    def moe_layers(self) -> Iterator[tuple[int, DeepseekV3MoE]]:
        """(layer index, MoE block), the MTP module's last, under index `num_hidden_layers`."""
        for index, layer in enumerate([*self.main.model.layers, self.mtp.block]):
            if isinstance(layer.mlp, DeepseekV3MoE):
                yield index, layer.mlp

    def forward(self, ids_BT1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From int64[B, T + 1]: logits[B, T, V] of the next token, and logits[B, T, V] of the one after."""
        ids_BT, next_ids_BT = ids_BT1[:, :-1], ids_BT1[:, 1:]
        embed = self.main.model.embed_tokens
        embedding_BTH = embed(ids_BT)
        hidden_BTH = self.main.model(inputs_embeds=embedding_BTH, use_cache=False).last_hidden_state
        positions = torch.arange(ids_BT.shape[1]).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=embedding_BTH,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        rope = self.main.model.rotary_emb(embedding_BTH, positions)
        drafted_BTH = self.mtp(embed(next_ids_BT), hidden_BTH, mask, rope)
        return self.main.lm_head(hidden_BTH), self.main.lm_head(drafted_BTH)


def checkpoint_tensors(model: DemoModel) -> dict[str, torch.Tensor]:
    """Tensors under the names of DeepSeek-V3's own checkpoint: bfloat16, the correction bias float32."""
    depth = model.config.num_hidden_layers
    prefix = f"model.layers.{depth}."
    renames = {"mtp.block.": prefix, "mtp.norm.": f"{prefix}shared_head.norm.", "mtp.": prefix, "main.": ""}
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        old = next(old for old in renames if name.startswith(old))
        name = renames[old] + name.removeprefix(old)
        if name.endswith(".experts.gate_up_proj"):
            for expert, both in enumerate(value):  # [2I, H]
                stem = name.replace("gate_up_proj", str(expert))
                gate, up = both.chunk(2)
                tensors[f"{stem}.gate_proj.weight"], tensors[f"{stem}.up_proj.weight"] = gate, up
        elif name.endswith(".experts.down_proj"):
            for expert, down in enumerate(value):  # [H, I]
                tensors[f"{name.replace('down_proj', str(expert))}.down_proj.weight"] = down
        else:
            tensors[name] = value
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    return {
        name: value.detach()
        .to(torch.float32 if "correction_bias" in name else torch.bfloat16)
        .contiguous()
        .clone()
        for name, value in tensors.items()
    }


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.chmod(0o644)
    partial.replace(path)


def export(model: DemoModel, folder: Path) -> None:
    """Write config.json, generation_config.json and the safetensors shards with their index into `folder`."""
    config = model.config.to_diff_dict()
    config.update(model_type="deepseek_v3", dtype="bfloat16")
    for name in ("rope_interleave", "norm_topk_prob", "hidden_act", "tie_word_embeddings", "attention_bias"):
        config[name] = getattr(model.config, name)
    config["num_nextn_predict_layers"] = config.pop("num_mtp_layers", model.config.num_nextn_predict_layers)
    # transformers omits these; without them vLLM does not load the correction bias.
    config.update(topk_method="noaux_tc", scoring_func="sigmoid", moe_layer_freq=1)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}

    tensors = checkpoint_tensors(model)
    # Shard 1 holds the first half of the decoder layers, shard 2 the rest, as a real checkpoint's cuts fall.
    first = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.", "model.layers.2.")
    names = [[n for n in sorted(tensors) if n.startswith(first) is (shard == 0)] for shard in range(SHARDS)]
    weight_map: dict[str, str] = {}
    for number, of_shard in enumerate(names, start=1):
        file_name = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        shard = {name: tensors[name] for name in of_shard}
        _replace(
            folder / file_name, lambda path, shard=shard: save_file(shard, path, metadata={"format": "pt"})
        )
        weight_map.update(dict.fromkeys(of_shard, file_name))
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    for file_name, content in (
        ("model.safetensors.index.json", index),
        ("config.json", dict(sorted(config.items()))),
        ("generation_config.json", generation),
    ):
        text = json.dumps(content, indent=2) + "\n"
        _replace(folder / file_name, lambda path, text=text: path.write_text(text, encoding="utf-8"))


def load_checkpoint(folder: Path) -> DemoModel:
    """Read an exported checkpoint back, in float32: the main model by transformers, the MTP module by name.

    Raises KeyError when a tensor of the MTP module is missing.
    """
    main = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = DemoModel(main.config)
    model.main = main
    experts = main.config.n_routed_experts
    prefix = f"model.layers.{main.config.num_hidden_layers}."
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        stored |= {n.removeprefix(prefix): t for n, t in load_file(path).items() if n.startswith(prefix)}
    state: dict[str, torch.Tensor] = {}
    for name in model.mtp.state_dict():
        disk = "shared_head.norm.weight" if name == "norm.weight" else name.removeprefix("block.")
        stem = disk.removesuffix("gate_up_proj").removesuffix("down_proj")
        if disk.endswith("experts.gate_up_proj"):
            pairs = [
                [stored[f"{stem}{e}.{part}_proj.weight"] for part in ("gate", "up")] for e in range(experts)
            ]
            state[name] = torch.stack([torch.cat(pair) for pair in pairs])
        elif disk.endswith("experts.down_proj"):
            state[name] = torch.stack([stored[f"{stem}{e}.down_proj.weight"] for e in range(experts)])
        else:
            state[name] = stored[disk]
    model.mtp.load_state_dict(state)
    return model.float().eval()
