"""A vision transformer from a Hugging Face configuration, with random weights."""

import torch

import gradinvbench as gib

try:
    from transformers import ViTConfig, ViTForImageClassification
except ImportError:
    print("This example needs transformers: pip install transformers")
    raise SystemExit from None

torch.manual_seed(0)
config = ViTConfig(image_size=16, patch_size=4, num_channels=1, num_labels=5)
config.hidden_size, config.intermediate_size = 48, 96
config.num_hidden_layers, config.num_attention_heads = 2, 4
model = ViTForImageClassification(config).eval()
coarse = torch.rand(1, 1, 4, 4)
images = torch.nn.functional.interpolate(coarse, (16, 16), mode="bicubic").clamp(0, 1)

target, truth = gib.share(model, images, [2])
found = gib.invert(target, iterations=300, progress=False)
image = gib.evaluate(found, truth).to_frame().loc[0]
print(f"PSNR {image.psnr:.1f} dB, SSIM {image.ssim:.3f}, label {found.labels.tolist()}")
