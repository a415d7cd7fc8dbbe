r"""Deformable DETR ++ two-stage (with refinement), ResNeXt-101 64x4d + DCN v2 (Zhu et al., ICLR 2021, Table 3).

Published: AP 50.1 on COCO test-dev (not val2017) after 50 epochs at batch 32; 52.3 with test-time augmentation.
The paper does not say which ResNeXt-101, nor which scales the augmentation has.
Not reproduced here: that needs COCO and torchvision's ImageNet weights of the backbone, which has no deformable
convolutions; they start as its plain ones.

    python train.py --config configs/deformable_detr_x101_dcn_two_stage.py --data.root /data/coco \
        --train.init-backbone resnext101_64x4d.safetensors
    python eval.py --checkpoint runs/deformable_detr_x101_dcn_two_stage --tta --results results.json \
        --data.val-annotations annotations/image_info_test-dev2017.json --data.val-images test2017
"""

from detr_jax.config import Config, DeformableDETRConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.x101_dcn_two_stage(),
    train=TrainConfig(output_dir="runs/deformable_detr_x101_dcn_two_stage", batch_size=32, epochs=50),
)
