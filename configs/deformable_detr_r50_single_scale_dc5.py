r"""Deformable DETR, single-scale, DC5, ResNet-50 (Zhu et al., ICLR 2021).

Published: AP 41.5 on COCO val2017 after 50 epochs at batch 32; 128 GFLOPs, 34 M parameters.
The AP is the official repository's.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/deformable_detr_r50_single_scale_dc5.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DeformableDETRConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.r50_single_scale_dc5(),
    train=TrainConfig(output_dir="runs/deformable_detr_r50_single_scale_dc5", batch_size=32, epochs=50),
)
