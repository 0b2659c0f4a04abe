"""Names and shapes in the published files of SEED's tokenizer, for any sizes."""

from models.seed_tokenizer import SeedConfig

VISUAL, QFORMER = "visual_encoder.", "Qformer.bert."


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear_shapes(name: str, width_out: int, width_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def vision_shapes(config: SeedConfig, depth: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the EVA file that are used, for that many blocks."""
    width, patches = config.vision_width, (config.image_size // config.patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, patches + 1, width),
        "patch_embed.proj.weight": (width, 3, config.patch_size, config.patch_size),
        "patch_embed.proj.bias": (width,),
    }
    for block in (f"blocks.{number}." for number in range(depth)):
        shapes |= norm_shapes(f"{block}norm1", width) | norm_shapes(f"{block}norm2", width)
        shapes |= {f"{block}attn.qkv.weight": (3 * width, width)}
        shapes |= {f"{block}attn.q_bias": (width,), f"{block}attn.v_bias": (width,)}
        shapes |= linear_shapes(f"{block}attn.proj", width, width)
        shapes |= linear_shapes(f"{block}mlp.fc1", config.vision_hidden, width)
        shapes |= linear_shapes(f"{block}mlp.fc2", width, config.vision_hidden)
    return shapes


def quantizer_shapes(config: SeedConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of SEED's own file that are used."""
    width = config.width
    shapes: dict[str, tuple[int, ...]] = norm_shapes("ln_vision", config.vision_width)
    shapes |= {"query_tokens": (1, config.queries, width)}
    shapes |= norm_shapes(f"{QFORMER}embeddings.LayerNorm", width)
    for number in range(config.layers):
        layer = f"{QFORMER}encoder.layer.{number}."
        for kind, read in (("attention", width), ("crossattention", config.vision_width)):
            if kind == "crossattention" and number % 2:
                continue
            shapes |= linear_shapes(f"{layer}{kind}.self.query", width, width)
            shapes |= linear_shapes(f"{layer}{kind}.self.key", width, read)
            shapes |= linear_shapes(f"{layer}{kind}.self.value", width, read)
            shapes |= linear_shapes(f"{layer}{kind}.output.dense", width, width)
            shapes |= norm_shapes(f"{layer}{kind}.output.LayerNorm", width)
        shapes |= linear_shapes(f"{layer}intermediate_query.dense", config.hidden, width)
        shapes |= linear_shapes(f"{layer}output_query.dense", width, config.hidden)
        shapes |= norm_shapes(f"{layer}output_query.LayerNorm", width)
    shapes |= linear_shapes("encode_task_layer.0", width, width)
    shapes |= linear_shapes("encode_task_layer.2", config.code_width, width)
    return shapes | {"quantize.embedding.weight": (config.codebook_size, config.code_width)}


def decoder_shapes(config: SeedConfig) -> dict[str, tuple[int, ...]]:
    """Tensors of SEED's own file for decoding and training."""
    width, code = config.width, config.code_width
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.queries, width),
        "pos_embed_image": (1, config.queries, width),
        "image_down.0.weight": (256, width),
        "image_down.2.weight": (128, 256),
        "image_down.4.weight": (code, 128),
        f"{QFORMER}embeddings.position_ids": (1, 512),
    }
    shapes |= linear_shapes("distill_image_proj", 1024, 1024)
    shapes |= linear_shapes("decode_task_layer.0", code, code) | linear_shapes("decode_task_layer.2", width, code)
    for block in (f"{kind}.{number}." for kind in ("blocks", "blocks_image") for number in range(4)):
        shapes |= norm_shapes(f"{block}norm1", width) | norm_shapes(f"{block}norm2", width)
        shapes |= linear_shapes(f"{block}attn.qkv", 3 * width, width)
        shapes |= linear_shapes(f"{block}attn.proj", width, width)
        shapes |= linear_shapes(f"{block}mlp.fc1", 4 * width, width)
        shapes |= linear_shapes(f"{block}mlp.fc2", width, 4 * width)
    return shapes


def text_keys(config: SeedConfig) -> list[str]:
    """Names of BERT's tensors for texts, which the published file may have or not."""
    keys = [f"{QFORMER}embeddings.{kind}_embeddings.weight" for kind in ("word", "position")]
    keys += ["Qformer.cls.predictions.bias", "Qformer.cls.predictions.transform.dense.weight"]
    for number in range(config.layers):
        parts = ("intermediate.dense", "output.dense", "output.LayerNorm")
        keys += [f"{QFORMER}encoder.layer.{number}.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return keys
