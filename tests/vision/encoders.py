"""Tiny random image encoders of every family, made by transformers from seeded configurations."""

import json

import torch
import transformers as t

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 24,
    "patch_size": 4,
}
LABELS = {"num_labels": 7}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
TEXT |= {"intermediate_size": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _clip(**settings):
    return t.CLIPConfig(vision_config=SIZES, text_config=TEXT, projection_dim=20, **settings)


def _siglip(**settings):
    return t.SiglipConfig(vision_config=SIZES, text_config=TEXT, **settings)


ENCODERS = {
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZES, **LABELS)),
    "vit-bare": lambda: t.ViTModel(t.ViTConfig(**SIZES, qkv_bias=False, hidden_act="relu")),
    "deit": lambda: t.DeiTForImageClassification(t.DeiTConfig(**SIZES, **LABELS)),
    "deit-teacher": lambda: t.DeiTForImageClassificationWithTeacher(
        t.DeiTConfig(**SIZES, **LABELS)
    ),
    "dinov2": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**SIZES, **LABELS)),
    "dinov2-bare": lambda: t.Dinov2Model(t.Dinov2Config(**SIZES)),
    "dinov2-registers": lambda: t.Dinov2WithRegistersForImageClassification(
        t.Dinov2WithRegistersConfig(**SIZES, **LABELS, num_register_tokens=3)
    ),
    "clip-tower": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES)),
    "clip-projected": lambda: t.CLIPVisionModelWithProjection(
        t.CLIPVisionConfig(**SIZES, projection_dim=20)
    ),
    "clip": lambda: t.CLIPModel(_clip()),
    "clip-classifier": lambda: t.CLIPForImageClassification(_clip(**LABELS)),
    "siglip-tower": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES)),
    "siglip": lambda: t.SiglipModel(_siglip()),
    "siglip-classifier": lambda: t.SiglipForImageClassification(_siglip(**LABELS)),
}


def make(name):
    """A model with weights large enough that every part of it shows in the result."""
    torch.manual_seed(0)
    model = ENCODERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                # Linears keep the size of their inputs; learned tokens have that of patches.
                fan = parameter[0].numel() if parameter.ndim in (2, 4) else 1
                parameter.copy_(torch.randn_like(parameter) * fan**-0.5)
    return model


def save(name, folder, crop=False):
    """Write a model and an image processor's settings; return the model."""
    model = make(name)
    model.save_pretrained(folder)
    settings = {
        "do_resize": True,
        "size": {"height": 24, "width": 24},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48, 0.45, 0.4],
        "image_std": [0.26, 0.25, 0.27],
    }
    if crop:
        settings |= {
            "size": {"shortest_edge": 28},
            "do_center_crop": True,
            "crop_size": {"height": 24, "width": 24},
        }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def reference(model, pixels):
    """Tokens, embedding and class scores by transformers."""
    pixels = torch.from_numpy(pixels)
    name = type(model).__name__
    dino = name.startswith("Dinov2")  # always interpolates
    extra = {} if dino else {"interpolate_pos_encoding": True}
    if name == "CLIPForImageClassification":
        extra = {}
    with torch.no_grad():
        logits = None
        if "Classification" in name:
            logits = model(pixels, **extra).logits.numpy()
        body = model
        for part in ("vit", "deit", "dinov2", "dinov2_with_registers", "vision_model"):
            body = getattr(body, part, body)
        extra = {} if dino else {"interpolate_pos_encoding": True}
        out = body(pixels, **extra)
        tokens = out.last_hidden_state
        pooled = tokens[:, 0]
        if name.startswith(("CLIP", "Siglip")):
            pooled = out.pooler_output
        if hasattr(model, "visual_projection"):
            pooled = model.visual_projection(pooled)
    return tokens.numpy(), pooled.numpy(), logits
