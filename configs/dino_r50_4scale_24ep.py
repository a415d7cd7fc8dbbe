r"""DINO-4scale, ResNet-50, 24 epochs (Zhang et al., ICLR 2023).

Published: AP 50.4 on COCO val2017 after 24 epochs at batch 16; 279 GFLOPs, 47 M parameters. The learning rate drops
after epoch 20; the epoch of the published run is not in its repository.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/dino_r50_4scale_24ep.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DINOConfig, LossConfig, OptimConfig, TrainConfig

config = Config(
    model=DINOConfig.r50_4scale(),
    loss=LossConfig.dino(),
    optim=OptimConfig(lr=1e-4, lr_batch_size=16, offsets_lr_factor=1.0, drop_at=20 / 24),
    train=TrainConfig(output_dir="runs/dino_r50_4scale_24ep", batch_size=16, epochs=24),
)
