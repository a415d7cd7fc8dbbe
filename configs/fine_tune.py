"""Fine-tuning on your own data set: the config of `detr-jax train --init-from CHECKPOINT`, with the file's model.

For hundreds to tens of thousands of images: a short warm-up, a moving average of the parameters, which is evaluated and
saved, one drop of the learning rate, and early stopping after ten evaluations without a better AP. The best checkpoint
is kept. The learning rate is for a global batch of 8; with another one it is scaled by the square root of the ratio.
Not measured: there is no published row.

    python train.py --config configs/fine_tune.py --data.root FOLDER --init-from CHECKPOINT
"""

from detr_jax.config import Config, DeformableDETRConfig, OptimConfig, TrainConfig

config = Config(
    model=DeformableDETRConfig.r50_two_stage(),
    optim=OptimConfig(lr=5e-5, lr_batch_size=8, lr_scaling="sqrt", warmup_steps=200, drop_at=0.8, ema_decay=0.998),
    train=TrainConfig(
        output_dir="runs/fine_tune", batch_size=8, epochs=50, patience=10, log_every=20, checkpoint_every=500
    ),
)
