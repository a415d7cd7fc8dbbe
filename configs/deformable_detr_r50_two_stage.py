r"""Deformable DETR ++ two-stage (with refinement), ResNet-50 (Zhu et al., ICLR 2021).

Published: AP 46.9 on COCO val2017 after 50 epochs at batch 32; 173 GFLOPs, 41 M parameters.
The AP is the official repository's; the paper's Table 1 has 46.2.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/deformable_detr_r50_two_stage.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DeformableDETRConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.r50_two_stage(),
    train=TrainConfig(output_dir="runs/deformable_detr_r50_two_stage", batch_size=32, epochs=50),
)
