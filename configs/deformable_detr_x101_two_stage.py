r"""Deformable DETR ++ two-stage (with refinement), ResNeXt-101 (Zhu et al., ICLR 2021, Table 3).

The paper does not say which ResNeXt-101: this is 64x4d.

Published: AP 49.0 on COCO test-dev (not val2017) after 50 epochs at batch 32.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/deformable_detr_x101_two_stage.py --data.root /data/coco \
        --train.init-backbone resnext101_64x4d.safetensors
"""

from detr_jax.config import Config, DeformableDETRConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.x101_two_stage(),
    train=TrainConfig(output_dir="runs/deformable_detr_x101_two_stage", batch_size=32, epochs=50),
)
