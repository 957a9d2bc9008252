"""A checkpoint of OLMoE's family as the GGUF file that llama.cpp reads, tensor for tensor."""

import json
import pathlib

import numpy as np

# Of a layer: the name in the checkpoint, and in the file.
LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
TRUNK = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Writes matrices in bfloat16, norms and routers in float32. The file has no tokenizer."""
    import gguf

    from moe_jax.checkpoint import safetensors_file

    config = json.loads((folder / "config.json").read_text())
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= safetensors_file.read_table(file)

    def read(name):
        tensor = stored[name]
        data = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.start)
        return data.view(tensor.dtype).reshape(tensor.shape)

    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")

    def add(name, array):
        if array.ndim == 1 or "gate_inp" in name:
            writer.add_tensor(name, array.astype(np.float32))
        else:
            writer.add_tensor(name, array.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    for theirs, ours in TRUNK.items():
        add(ours, read(theirs))
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in LAYER.items():
            add(f"blk.{layer}.{ours}", read(f"model.layers.{layer}.{theirs}"))
        for part in ("gate", "up", "down"):
            experts = [
                read(f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight")
                for expert in range(config["num_experts"])
            ]
            add(f"blk.{layer}.ffn_{part}_exps.weight", np.stack(experts))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
