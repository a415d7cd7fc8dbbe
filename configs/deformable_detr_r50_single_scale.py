r"""Deformable DETR, single-scale, ResNet-50 (Zhu et al., ICLR 2021).

Published: AP 39.4 on COCO val2017 after 50 epochs at batch 32; 78 GFLOPs, 34 M parameters.
The AP is the official repository's.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/deformable_detr_r50_single_scale.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DeformableDETRConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.r50_single_scale(),
    train=TrainConfig(output_dir="runs/deformable_detr_r50_single_scale", batch_size=32, epochs=50),
)
