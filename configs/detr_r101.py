r"""DETR, ResNet-101 (Carion et al., ECCV 2020).

Published: AP 43.5 on COCO val2017 after 500 epochs at batch 64; 152 GFLOPs, 60 M parameters.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/detr_r101.py --data.root /data/coco \
        --train.init-backbone resnet101.safetensors
"""

from detr_jax.config import Config, DETRConfig, LossConfig, OptimConfig, TrainConfig

config = Config(
    model=DETRConfig.r101(),
    loss=LossConfig.detr(),
    optim=OptimConfig(lr=1e-4, lr_batch_size=64),
    train=TrainConfig(output_dir="runs/detr_r101", batch_size=64, epochs=500),
)
