"""Names: where each module of ours is in a Hugging Face checkpoint, one table per family.

A table maps our module path to the Hugging Face module; `{}` stands for the layer number of stacked
blocks. Leaves follow from their kind: `kernel` is a transposed `weight`, `scale` and `table` are
`weight`, `bias` is `bias`; a table may also name a leaf itself.
"""

LLAMA = {
    "embed": "model.embed_tokens",
    "blocks.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.attn.q": "model.layers.{}.self_attn.q_proj",
    "blocks.attn.k": "model.layers.{}.self_attn.k_proj",
    "blocks.attn.v": "model.layers.{}.self_attn.v_proj",
    "blocks.attn.o": "model.layers.{}.self_attn.o_proj",
    "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}

PHI = {
    "embed": "model.embed_tokens",
    "blocks.attn_norm": "model.layers.{}.input_layernorm",
    "blocks.attn.q": "model.layers.{}.self_attn.q_proj",
    "blocks.attn.k": "model.layers.{}.self_attn.k_proj",
    "blocks.attn.v": "model.layers.{}.self_attn.v_proj",
    "blocks.attn.o": "model.layers.{}.self_attn.dense",
    "blocks.mlp.up": "model.layers.{}.mlp.fc1",
    "blocks.mlp.down": "model.layers.{}.mlp.fc2",
    "norm": "model.final_layernorm",
    "head": "lm_head",
}

_VIT = {
    "position": "embeddings.position_embedding.weight",
    "patch": "embeddings.patch_embedding",
    "blocks.attn_norm": "encoder.layers.{}.layer_norm1",
    "blocks.attn.q": "encoder.layers.{}.self_attn.q_proj",
    "blocks.attn.k": "encoder.layers.{}.self_attn.k_proj",
    "blocks.attn.v": "encoder.layers.{}.self_attn.v_proj",
    "blocks.attn.o": "encoder.layers.{}.self_attn.out_proj",
    "blocks.mlp_norm": "encoder.layers.{}.layer_norm2",
    "blocks.mlp.up": "encoder.layers.{}.mlp.fc1",
    "blocks.mlp.down": "encoder.layers.{}.mlp.fc2",
    "post_norm": "post_layernorm",
}

SIGLIP = _VIT
CLIP = _VIT | {"cls": "embeddings.class_embedding", "pre_norm": "pre_layrnorm"}

# Prefixes of LLaVA tensors in files -> in the state dict of transformers 5; the first match counts.
FILE_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}

LLAVA_CONNECTOR = {
    "layers.0": "multi_modal_projector.linear_1",
    "layers.1": "multi_modal_projector.linear_2",
}
