r"""DINO-5scale, ResNet-50, 12 epochs (Zhang et al., ICLR 2023).

Published: AP 49.4 on COCO val2017 after 12 epochs at batch 16; 860 GFLOPs, 47 M parameters. The learning rate drops
after epoch 11.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/dino_r50_5scale_12ep.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DINOConfig, LossConfig, OptimConfig, TrainConfig

config = Config(
    model=DINOConfig.r50_5scale(),
    loss=LossConfig.dino(),
    optim=OptimConfig(lr=1e-4, lr_batch_size=16, offsets_lr_factor=1.0, drop_at=11 / 12),
    train=TrainConfig(output_dir="runs/dino_r50_5scale_12ep", batch_size=16, epochs=12),
)
