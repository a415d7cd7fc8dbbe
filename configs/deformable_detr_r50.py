r"""Deformable DETR, multi-scale, ResNet-50 (Zhu et al., ICLR 2021).

Published: AP 44.5 on COCO val2017 after 50 epochs at batch 32; 173 GFLOPs, 40 M parameters.
The AP is the official repository's; the paper's Table 1 has 43.8.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/deformable_detr_r50.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DeformableDETRConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.r50(),
    train=TrainConfig(output_dir="runs/deformable_detr_r50", batch_size=32, epochs=50),
)
