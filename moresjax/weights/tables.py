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

QWEN3 = LLAMA | {
    "blocks.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.attn.k_norm": "model.layers.{}.self_attn.k_norm",
}

GEMMA2 = LLAMA | {
    "blocks.attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "blocks.mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "blocks.mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
GEMMA3 = QWEN3 | GEMMA2

STABLELM = LLAMA

OPT = {
    "embed": "model.decoder.embed_tokens",
    "position": "model.decoder.embed_positions.weight",
    "blocks.attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "blocks.attn.q": "model.decoder.layers.{}.self_attn.q_proj",
    "blocks.attn.k": "model.decoder.layers.{}.self_attn.k_proj",
    "blocks.attn.v": "model.decoder.layers.{}.self_attn.v_proj",
    "blocks.attn.o": "model.decoder.layers.{}.self_attn.out_proj",
    "blocks.mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "blocks.mlp.up": "model.decoder.layers.{}.fc1",
    "blocks.mlp.down": "model.decoder.layers.{}.fc2",
    "norm": "model.decoder.final_layer_norm",
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

DINOV2 = {
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "position": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection",
    "blocks.attn_norm": "encoder.layer.{}.norm1",
    "blocks.attn.q": "encoder.layer.{}.attention.q_proj",
    "blocks.attn.k": "encoder.layer.{}.attention.k_proj",
    "blocks.attn.v": "encoder.layer.{}.attention.v_proj",
    "blocks.attn.o": "encoder.layer.{}.attention.o_proj",
    "blocks.attn_scale": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.mlp_norm": "encoder.layer.{}.norm2",
    "blocks.mlp.up": "encoder.layer.{}.mlp.fc1",
    "blocks.mlp.down": "encoder.layer.{}.mlp.fc2",
    "blocks.mlp_scale": "encoder.layer.{}.layer_scale2.lambda1",
    "post_norm": "layernorm",
}
DINOV2_GATED_MLP = {
    "blocks.mlp.gate": "encoder.layer.{}.mlp.gate_proj",
    "blocks.mlp.up": "encoder.layer.{}.mlp.up_proj",
    "blocks.mlp.down": "encoder.layer.{}.mlp.down_proj",
}

# Prefixes of LLaVA tensors in files -> in the state dict of transformers 5; the first match counts.
# Those with an underscore are TinyLLaVA Factory's.
FILE_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower._vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower._vision_tower.": "model.vision_tower.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "connector._connector": "model.connector",
}

# The other way, as published LLaVAs have it; older and newer versions of transformers read these.
WRITTEN_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}

# Names of DINOv2 modules in files -> in the state dict of transformers 5.
FILE_MODULES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.weights_out": "mlp.down_proj",
}
# One tensor in files -> its halves along the first axis.
FILE_HALVES = {"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")}

LLAVA_CONNECTOR = {
    "layers.0": "multi_modal_projector.linear_1",
    "layers.1": "multi_modal_projector.linear_2",
}

# Tensors with leading axes of size one, and how many.
BATCHED = {
    "embeddings.cls_token": 2,
    "embeddings.register_tokens": 1,
    "embeddings.position_embeddings": 1,
}

# Parts of the names of tensors that nothing of ours needs: buffers, pretraining's mask token, the
# pooling head of SigLIP ..
UNUSED = ("rotary_emb.inv_freq", "position_ids", "mask_token", "vision_tower.head.")
# .. and, in the folder of a vision encoder, what stands beside or on top of it.
BESIDE_VISION = (
    "text_model.",
    "text_projection",
    "visual_projection",
    "logit_scale",
    "logit_bias",
    "head.",
    "classifier.",
)
