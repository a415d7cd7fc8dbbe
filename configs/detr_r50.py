r"""DETR, ResNet-50 (Carion et al., ECCV 2020).

Published: AP 42.0 on COCO val2017 after 500 epochs at batch 64; 86 GFLOPs, 41 M parameters.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/detr_r50.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DETRConfig, LossConfig, OptimConfig, TrainConfig

config = Config(
    model=DETRConfig.r50(),
    loss=LossConfig.detr(),
    optim=OptimConfig(lr=1e-4, lr_batch_size=64),
    train=TrainConfig(output_dir="runs/detr_r50", batch_size=64, epochs=500),
)
