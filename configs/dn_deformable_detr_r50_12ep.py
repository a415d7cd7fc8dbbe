r"""Deformable DETR with denoising, ResNet-50, 12 epochs: what DINO adds to DN-Deformable-DETR, taken away again.

Published: AP 43.4 on COCO val2017 after 12 epochs at batch 16, for DN-Deformable-DETR (Li et al., CVPR 2022). This is
that model in DINO's terms: learned boxes, positive denoising queries only, boxes detached between layers. Noise and
padding are DINO's, so the numbers need not be the same. 47 M parameters.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone.

    python train.py --config configs/dn_deformable_detr_r50_12ep.py --data.root /data/coco \
        --train.init-backbone resnet50.safetensors
"""

from detr_jax.config import Config, DINOConfig, LossConfig, OptimConfig, TrainConfig

config = Config(
    model=DINOConfig.dn_deformable_r50(),
    loss=LossConfig.dino(),
    optim=OptimConfig(lr=1e-4, lr_batch_size=16, offsets_lr_factor=1.0, drop_at=11 / 12),
    train=TrainConfig(output_dir="runs/dn_deformable_detr_r50_12ep", batch_size=16, epochs=12),
)
