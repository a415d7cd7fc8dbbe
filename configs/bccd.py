"""A small two-stage Deformable DETR from scratch on blood-cell images (BCCD): what `make demo` trains.

ResNet-18 with GroupNorm, 128 wide, 2 + 3 layers, 3 levels, 240 x 320 pixels: about ten minutes on two CPU cores.

    python train.py --config configs/bccd.py
"""

from detr_jax.config import BackboneConfig, Config, DataConfig, DeformableDETRConfig, OptimConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig(
        backbone=BackboneConfig(depth=18, norm="group", freeze_at=0),
        hidden_dim=128,
        encoder_layers=2,
        decoder_layers=3,
        ffn_dim=512,
        dropout=0.0,
        num_queries=50,
        num_levels=3,
        box_refinement=True,
        two_stage=True,
    ),
    data=DataConfig(
        root="tests/data/bccd", scales=(240,), max_size=320, crop=False, eval_scale=240, max_source_side=320, cache=True
    ),
    optim=OptimConfig(
        lr=4e-4,
        lr_batch_size=2,
        backbone_lr_factor=1.0,
        offsets_lr_factor=1.0,
        warmup_steps=50,
        drop_at=0.7,
        ema_decay=0.99,
    ),
    train=TrainConfig(
        output_dir="runs/bccd", batch_size=2, epochs=11, log_every=25, eval_every=4, checkpoint_every=200
    ),
)
