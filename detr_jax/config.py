"""Configuration: frozen dataclasses, one constructor per published variant.

A config in `configs/` is a Python file that assigns a `Config` to the name `config`; the command line overrides any of
its fields (`--train.batch-size 16`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from detr_jax.errors import UserError

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "layers", "all"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's red, green and blue in 0-1: what images are normalized with."""


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """A ResNet or ResNeXt with torchvision's semantics (stride in the 3x3 convolution)."""

    depth: Literal[18, 34, 50, 101] = 50
    """Number of layers."""
    norm: Literal["frozen_batch", "group"] = "frozen_batch"
    """`frozen_batch` for pretrained weights (statistics and affine are constants), `group` to train from scratch."""
    dilation: bool = False
    """DC5: the last stage keeps stride 16 and dilates its 3x3 convolutions by 2."""
    freeze_at: Literal[0, 1, 2] = 2
    """Layers that are not trained: 0 none, 1 the stem, 2 the stem and the first stage (the published configs)."""
    mask_padding: bool = False
    """Zero the padding after every layer: an image gives the same boxes in any bucket. Off in the official code."""
    groups: int = 1
    """Groups of the 3x3 convolutions: ResNeXt's cardinality (Xie et al., CVPR 2017)."""
    group_width: int = 64
    """Channels of a group in the first stage; each stage has twice as many as the one before."""
    deform_version: Literal[0, 1, 2] = 0
    """Deformable 3x3 convolutions in C3 to C5: 1 (Dai et al., 2017), 2 with modulation (Zhu et al., 2019), 0 none."""
    deform_groups: int = 1
    """Groups of channels with offsets of their own, in a deformable convolution."""

    def __post_init__(self):
        for name in ("groups", "group_width", "deform_groups"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"model.backbone.{name}={value} must be at least 1")
        width = self.groups * self.group_width
        if self.depth < 50 and (self.groups, self.group_width) != (1, 64):
            raise UserError(
                f"model.backbone.groups={self.groups} with group_width={self.group_width} needs bottleneck blocks: "
                f"set model.backbone.depth to 50 or 101, got {self.depth}"
            )
        if self.norm == "group" and width % 32:
            raise UserError(f"model.backbone.groups * group_width = {width} must be a multiple of 32 for norm='group'")
        if 2 * width % self.deform_groups:
            raise UserError(
                f"model.backbone.deform_groups={self.deform_groups} must divide the {2 * width} channels of C3's 3x3 "
                "convolutions"
            )

    @classmethod
    def resnext101_32x8d(cls) -> "BackboneConfig":
        """ResNeXt-101 32x8d."""
        return cls(depth=101, groups=32, group_width=8)

    @classmethod
    def resnext101_64x4d(cls) -> "BackboneConfig":
        """ResNeXt-101 64x4d."""
        return cls(depth=101, groups=64, group_width=4)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What of the model is trained, besides `backbone.freeze_at`: all of it, if nothing is said here."""

    freeze: tuple[str, ...] = ()
    """Parts that are not trained, by names on the parameters' paths, such as `encoder` or `decoder.0.self_attn`."""
    lora_rank: int = 0
    """Rank of low-rank adapters on linear layers; 0 is none. Adapters are trained whatever is frozen."""
    lora_on: tuple[str, ...] = ("value_proj", "output_proj", "query", "value")
    """The linear layers that get one, named as in `freeze`."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What DETR and Deformable DETR have in common."""

    classification: ClassVar[Literal["focal", "softmax"]] = "focal"
    """What the class outputs mean, and so what `loss.classification` must be: see `LossConfig`."""

    backbone: BackboneConfig = BackboneConfig()
    """The convolutional backbone."""
    num_classes: int = 91
    """Object classes, without the no-object class. Training reads it off the annotations."""
    hidden_dim: int = 256
    """Width of the transformer."""
    num_heads: int = 8
    """Attention heads; must divide `hidden_dim`."""
    encoder_layers: int = 6
    """Transformer encoder layers."""
    decoder_layers: int = 6
    """Transformer decoder layers; each one is supervised."""
    ffn_dim: int = 2048
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.1
    """Dropout rate in training."""
    num_queries: int = 100
    """Object queries: the most boxes that an image can get."""
    max_detections: int = 100
    """Detections per image: the best pairs of a query and a class. (Softmax classifiers give one for each query.)"""
    dtype: Dtype = "float32"
    """Compute type; parameters, coordinates and losses stay float32."""
    remat: Remat = "none"
    """What is computed again in the backward pass instead of kept: `layers`, the inside of each encoder and decoder
    layer; `all`, that of the backbone's blocks too. Same results, less memory, more time."""
    tune: TuneConfig = TuneConfig()
    """What of it is trained."""


@dataclasses.dataclass(frozen=True)
class DETRConfig(TransformerConfig):
    """DETR (Carion et al., ECCV 2020). `hidden_dim` is a multiple of 4, for the sines and cosines of x and y."""

    classification: ClassVar[Literal["focal", "softmax"]] = "softmax"

    pre_norm: bool = False
    """LayerNorm before each block (and after the encoder) instead of after it."""
    position: Literal["sine", "learned"] = "sine"
    """Position encoding of the feature map."""

    def __post_init__(self):
        _check_model(self, multiple=4)

    @classmethod
    def r50(cls) -> "DETRConfig":
        """DETR-R50: AP 42.0 after 500 epochs."""
        return cls()

    @classmethod
    def r50_dc5(cls) -> "DETRConfig":
        """DETR-DC5-R50: AP 43.3 after 500 epochs."""
        return cls(backbone=BackboneConfig(dilation=True))

    @classmethod
    def r101(cls) -> "DETRConfig":
        """DETR-R101: AP 43.5 after 500 epochs."""
        return cls(backbone=BackboneConfig(depth=101))

    @classmethod
    def r101_dc5(cls) -> "DETRConfig":
        """DETR-DC5-R101: AP 44.9 after 500 epochs."""
        return cls(backbone=BackboneConfig(depth=101, dilation=True))


@dataclasses.dataclass(frozen=True)
class DeformableDETRConfig(TransformerConfig):
    """Deformable DETR (Zhu et al., ICLR 2021): sigmoid class outputs without a no-object class.

    `hidden_dim` is a multiple of 32, the groups of the input projections' GroupNorm. The APs are the official
    repository's, on val2017; the paper's own are 43.8 (multi-scale), 45.4 (refinement) and 46.2 (two-stage).
    """

    ffn_dim: int = 1024
    """Hidden width of the feed-forward blocks."""
    num_queries: int = 300
    """Object queries: the most boxes that an image can get."""
    num_levels: int = 4
    """Feature levels: 1 is C5, 2 are C4 and C5, 3 are C3 to C5; each further one is a stride-2 convolution."""
    encoder_points: int = 4
    """Sampling points per head and level in the encoder."""
    decoder_points: int = 4
    """Sampling points per head and level in the decoder."""
    box_refinement: bool = False
    """Each decoder layer refines the boxes of the layer before (section 4.2, iterative bounding box refinement)."""
    two_stage: bool = False
    """The encoder proposes the queries' boxes (section 4.2, two-stage); needs `box_refinement`."""
    implementation: str | None = None
    """Implementation of `pallas_kernels.ms_deform_attn`; `None` takes the best for the platform."""

    @property
    def feature_maps(self) -> int:
        """Levels that are maps of the backbone; each further one is a stride-2 convolution."""
        return min(self.num_levels, 3)

    @property
    def decoder_heads(self) -> int:
        """Class and box heads of the decoder layers: one each, or one for all. The proposals' come after them."""
        return self.decoder_layers if self.box_refinement else 1

    def attends_to_boxes(self, layer: int) -> bool:
        """Whether a decoder layer's references are boxes, in whose sizes its offsets count, rather than points."""
        return self.two_stage or (self.box_refinement and layer > 0)

    def __post_init__(self):
        _check_model(self, multiple=32)
        if self.two_stage and not self.box_refinement:
            raise UserError("model.two_stage needs model.box_refinement: pass --model.box-refinement too")

    @classmethod
    def r50_single_scale(cls) -> "DeformableDETRConfig":
        """Single-scale Deformable DETR: AP 39.4 after 50 epochs."""
        return cls(num_levels=1)

    @classmethod
    def r50_single_scale_dc5(cls) -> "DeformableDETRConfig":
        """Single-scale Deformable DETR, DC5: AP 41.5 after 50 epochs."""
        return cls(num_levels=1, backbone=BackboneConfig(dilation=True))

    @classmethod
    def r50(cls) -> "DeformableDETRConfig":
        """Multi-scale Deformable DETR: AP 44.5 after 50 epochs."""
        return cls()

    @classmethod
    def r50_refine(cls) -> "DeformableDETRConfig":
        """+ iterative bounding box refinement: AP 46.2 after 50 epochs."""
        return cls(box_refinement=True)

    @classmethod
    def r50_two_stage(cls) -> "DeformableDETRConfig":
        """++ two-stage: AP 46.9 after 50 epochs."""
        return cls(box_refinement=True, two_stage=True)

    @classmethod
    def r101_two_stage(cls) -> "DeformableDETRConfig":
        """++ two-stage, ResNet-101: AP 48.7 on test-dev (paper, Table 3)."""
        return cls(backbone=BackboneConfig(depth=101), box_refinement=True, two_stage=True)

    @classmethod
    def x101_two_stage(cls) -> "DeformableDETRConfig":
        """++ two-stage, ResNeXt-101: AP 49.0 on test-dev (paper, Table 3). The paper doesn't say which: 64x4d here."""
        return cls(backbone=BackboneConfig.resnext101_64x4d(), box_refinement=True, two_stage=True)

    @classmethod
    def x101_dcn_two_stage(cls) -> "DeformableDETRConfig":
        """++ two-stage, ResNeXt-101 + DCN: AP 50.1 on test-dev, 52.3 with test-time augmentation (paper, Table 3).

        The citation there is deformable convolution's second version, with modulation.
        """
        backbone = dataclasses.replace(BackboneConfig.resnext101_64x4d(), deform_version=2)
        return cls(backbone=backbone, box_refinement=True, two_stage=True)


@dataclasses.dataclass(frozen=True)
class DINOConfig(DeformableDETRConfig):
    """DINO (Zhang et al., ICLR 2023): Deformable DETR, its queries being boxes, trained with denoising queries too."""

    ffn_dim: int = 2048
    """Hidden width of the feed-forward blocks."""
    dropout: float = 0.0
    """Dropout rate in training."""
    num_queries: int = 900
    """Object queries: the most boxes that an image can get."""
    max_detections: int = 300
    """Detections per image: the best pairs of a query and a class."""
    box_refinement: bool = True
    """Always on: each decoder layer refines the boxes of the layer before."""
    two_stage: bool = True
    """Mixed query selection (paper section 3.4): the encoder proposes the queries' boxes, their content is learned.
    Off: the boxes are learned too."""
    backbone_maps: Literal[3, 4] = 3
    """Maps of the backbone among the levels: 3 are C3 to C5, 4 are C2 to C5 (the 5-scale model)."""
    look_forward_twice: bool = True
    """A layer's box loss also trains the box head of the layer before (paper section 3.5)."""
    shared_heads: bool = True
    """One class head and one box head for all decoder layers (official code); off: one of each per layer (detrex)."""
    position_temperature: float = 20.0
    """Temperature of the feature maps' sine encoding (detrex: 10000)."""
    half_pixel: bool = False
    """Whether that encoding takes pixel centers (detrex: yes)."""
    denoising_queries: int = 100
    """Noisy boxes of objects that an image is trained to put right, and as many to refuse; 0 is none. More where an
    image has more objects."""
    contrastive: bool = True
    """Denoising comes with as many queries that are noisier and must be refused (paper section 3.3)."""
    label_noise: float = 0.5
    """Half of this share of the denoising queries is given a random label."""
    box_noise: float = 1.0
    """Sides of denoising boxes move by up to this times half of the width or height; refused ones by up to twice that.
    (1.0 in all published runs; the official configuration file says 0.4.)"""

    @property
    def feature_maps(self) -> int:
        return min(self.num_levels, self.backbone_maps)

    @property
    def decoder_heads(self) -> int:
        return 1 if self.shared_heads else self.decoder_layers

    def attends_to_boxes(self, layer: int) -> bool:
        return True

    def __post_init__(self):
        super().__post_init__()
        if not self.box_refinement:
            raise UserError("model.box_refinement: DINO always refines its boxes; leave it on")
        for name in ("denoising_queries", "label_noise", "box_noise"):
            value = getattr(self, name)
            if value < 0:
                raise UserError(f"model.{name}={value} must be at least 0")

    @classmethod
    def r50_4scale(cls) -> "DINOConfig":
        """DINO-4scale: AP 49.0, 50.4, 50.9 after 12, 24, 36 epochs."""
        return cls()

    @classmethod
    def r50_5scale(cls) -> "DINOConfig":
        """DINO-5scale, with C2: AP 49.4, 51.3, 51.2 after 12, 24, 36 epochs."""
        return cls(num_levels=5, backbone_maps=4)

    @classmethod
    def dn_deformable_r50(cls) -> "DINOConfig":
        """Denoising without the rest, as in DN-Deformable-DETR (Li et al., CVPR 2022): AP 43.4 after 12 epochs there.

        Learned boxes, no queries to refuse, boxes detached between layers, 300 queries. Noise and padding are
        DINO's; DN-DETR's own code moves centers and sizes, and tells the two kinds of queries apart by one more input.
        """
        return cls(
            num_queries=300,
            two_stage=False,
            look_forward_twice=False,
            shared_heads=False,
            contrastive=False,
            label_noise=0.4,
            box_noise=0.4,
        )


ModelConfig = DETRConfig | DeformableDETRConfig | DINOConfig


def _check_model(model: ModelConfig, *, multiple: int) -> None:
    """Raises `ValueError` for sizes that cannot be built."""
    counts = (
        "num_heads",
        "num_queries",
        "num_classes",
        "decoder_layers",
        "num_levels",
        "encoder_points",
        "decoder_points",
    )
    for name in counts:
        value = getattr(model, name, 1)
        if value < 1:
            raise UserError(f"model.{name}={value} must be at least 1")
    if model.tune.lora_rank < 0:
        raise UserError(f"model.tune.lora_rank={model.tune.lora_rank} must be at least 0")
    for factor, what in ((multiple, str(multiple)), (model.num_heads, f"model.num_heads={model.num_heads}")):
        if model.hidden_dim % factor or model.hidden_dim < 1:
            raise UserError(f"model.hidden_dim={model.hidden_dim} must be a multiple of {what}")


def _check_at_least(least: int, field: str, value: float | None) -> None:
    """Raises `UserError` for a number that is less, infinite or NaN; `None` is no number."""
    if value is not None and not least <= value < math.inf:
        raise UserError(f"{field}={value}: expected a number of at least {least}")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Set prediction: matching costs and loss weights. The defaults are Deformable DETR's."""

    classification: Literal["focal", "softmax"] = "focal"
    """`focal` (sigmoid, Deformable DETR) or `softmax` with a last no-object class (DETR)."""
    class_weight: float = 2.0
    """Weight of the classification loss."""
    l1_weight: float = 5.0
    """Weight of the L1 box loss."""
    giou_weight: float = 2.0
    """Weight of the GIoU box loss."""
    class_cost: float = 2.0
    """Weight of the classification cost in the matching."""
    l1_cost: float = 5.0
    """Weight of the L1 cost in the matching."""
    giou_cost: float = 2.0
    """Weight of the GIoU cost in the matching."""
    focal_alpha: float = 0.25
    """Focal loss: weight of the positives."""
    focal_gamma: float = 2.0
    """Focal loss: focusing exponent."""
    no_object_weight: float = 0.1
    """Softmax loss: weight of the no-object class."""
    aux_loss: bool = True
    """Supervise every decoder layer, each matched on its own. The proposals of a two-stage model are supervised either
    way: their scores choose the queries. (The official code drops the proposals' loss with this.)"""
    giou_epsilon: float = 0.0
    """Added to the areas that IoU and GIoU divide by, in the loss and in the matching (DINO's code: 1e-6)."""
    matcher: Literal["device", "scipy"] = "device"
    """`device` matches inside the jitted step; `scipy` calls back to the host."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is float:
                _check_at_least(0, f"loss.{field.name}", getattr(self, field.name))
        if self.focal_alpha > 1:
            raise UserError(f"loss.focal_alpha={self.focal_alpha}: expected at most 1")

    @classmethod
    def detr(cls) -> "LossConfig":
        """DETR's softmax loss."""
        return cls(classification="softmax", class_weight=1.0, class_cost=1.0)

    @classmethod
    def dino(cls) -> "LossConfig":
        """DINO's: the class loss weighs 1, the class cost 2."""
        return cls(class_weight=1.0, giou_epsilon=1e-6)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how each one is augmented (all sizes in pixels)."""

    root: str = ""
    """A COCO-format folder: `train2017/ val2017/ annotations/`, or `images/` and `annotations.json`."""
    train_annotations: str | None = None
    """Training annotations, absolute or below `root`; `None` finds them."""
    train_images: str | None = None
    """Folder of the training images, absolute or below `root`; `None` finds it."""
    val_annotations: str | None = None
    """Validation annotations, absolute or below `root`; `None` finds them."""
    val_images: str | None = None
    """Folder of the validation images, absolute or below `root`; `None` finds it."""
    tfds: str | None = None
    """A prepared TFDS data set instead of `root`, such as `coco/2017` (ArrayRecord files)."""
    tfds_dir: str | None = None
    """TFDS data directory; `None` is the TFDS default."""
    engine: Literal["auto", "tf", "pillow"] = "auto"
    """Reads and decodes: tf.data, or Pillow and threads (same batches); `auto` is tf.data where it is installed."""
    workers: int = 8
    """Threads that read and decode, per host."""
    prefetch: int = 4
    """Batches prepared ahead of the step, per host."""
    cache: bool = False
    """Keep decoded images in the host's memory: for data sets of some hundred images."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or truncated image, or one of another size than annotated: stop before training, or skip and report."""
    on_bad_annotation: Literal["error", "skip"] = "error"
    """A box of an unknown image or category, or outside its image: stop before training, or skip and report."""
    max_source_side: int = 1333
    """Images with a longer side are shrunk on the host to this before they go to the device."""
    flip: bool = True
    """Flip half of the training images."""
    scales: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Training: the shorter side is resized to one of these."""
    max_size: int = 1333
    """The longer side is never larger than this, in training and evaluation."""
    crop: bool = True
    """Half of the training images are resized, cropped at random and resized again (the paper's crop branch)."""
    crop_scales: tuple[int, ...] = (400, 500, 600)
    """Crop branch: the shorter side before the crop."""
    crop_size: tuple[int, int] = (384, 600)
    """Crop branch: smallest and largest side of the crop."""
    eval_scale: int = 800
    """Evaluation: the shorter side."""
    buckets: tuple[tuple[int, int], ...] | None = None
    """Buckets (height, width) that batches are padded to, each compiled once; `None` derives them."""

    def __post_init__(self):
        for name in ("workers", "prefetch"):
            _check_at_least(0, f"data.{name}", getattr(self, name))
        for name in ("max_source_side", "max_size", "eval_scale"):
            _check_at_least(1, f"data.{name}", getattr(self, name))
        for bucket in self.buckets or ():
            if len(bucket) != 2 or min(bucket) < 1 or any(side % 32 for side in bucket):
                nearest = tuple(max(32, -(-side // 32) * 32) for side in bucket)
                raise UserError(
                    f"data.buckets: got {bucket}, expected (height, width) in multiples of 32: the nearest that holds "
                    f"it is {nearest}"
                )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with learning-rate groups and one drop (paper appendix A.4)."""

    lr: float = 2e-4
    """Learning rate of the transformer and the heads."""
    lr_batch_size: int = 32
    """The global batch that `lr` is for."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """With another `train.batch_size`, `lr` is multiplied by the square root of the ratio, or by the ratio."""
    backbone_lr_factor: float = 0.1
    """The backbone's learning rate, relative to `lr`."""
    offsets_lr_factor: float = 0.1
    """That of the layers which predict `sampling_offsets` and `reference_points`, relative to `lr`."""
    weight_decay: float = 1e-4
    """AdamW weight decay, on every trained parameter."""
    clip_norm: float = 0.1
    """Gradients are clipped to this global norm."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    drop_at: float = 0.8
    """The learning rate drops after this share of the training."""
    drop_factor: float = 0.1
    """... to this factor."""
    ema_decay: float = 0.0
    """Exponential moving average of the parameters, evaluated instead of them; 0 is off."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "lr_scaling":
                least = 1 if field.name == "lr_batch_size" else 0
                _check_at_least(least, f"optim.{field.name}", getattr(self, field.name))
        for name, below in (("drop_at", self.drop_at <= 1), ("ema_decay", self.ema_decay < 1)):
            if not below:
                raise UserError(f"optim.{name}={getattr(self, name)}: expected a share, less than 1")
        if self.clip_norm == 0:
            raise UserError("optim.clip_norm=0: expected more; it would clip every gradient to nothing")

    def scaled_lr(self, batch_size: int, scaling: str) -> float:
        """`lr` for a global batch of another size."""
        return self.lr * (batch_size / self.lr_batch_size) ** {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[scaling]

    def for_batch(self, batch_size: int) -> "OptimConfig":
        """The same with `lr` for this global batch, as `lr_scaling` says."""
        if self.lr_scaling == "none":
            return self
        lr = self.scaled_lr(batch_size, self.lr_scaling)
        return dataclasses.replace(self, lr=lr, lr_batch_size=batch_size)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run."""

    output_dir: str = "runs/default"
    """Checkpoints, logs and pictures. The same command again resumes from the newest checkpoint in it."""
    init_backbone: str | None = None
    """Start from these ResNet weights (for `norm="frozen_batch"`): a `.safetensors` or `.pth` file with torchvision's
    names, or a name on the Hugging Face hub such as `timm/resnet50.tv_in1k`."""
    init_from: str | None = None
    """Fine-tune: start from this checkpoint, ours or another implementation's, or one on the Hugging Face hub by its
    name. Classes are mapped by name; those that it does not have start anew."""
    batch_size: int = 32
    """Global batch over all devices and hosts."""
    accumulate: int = 1
    """Parts of each batch that go through the model one after another: as the whole batch, with less memory."""
    fsdp: int = 1
    """Devices that hold one copy together: parameters, moving average, optimizer's state. 1: each has all."""
    epochs: int = 50
    """Passes over the training images."""
    seed: int = 0
    """Seeds the parameters, the sampler and dropout."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int = 1
    """Epochs between evaluations, of which the first comes after one epoch; 0 evaluates only at the end."""
    num_pictures: int = 4
    """Validation images drawn into `output_dir/pictures` at each evaluation: ground truth beside detections."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is also saved at every evaluation, at the end and on SIGTERM or Ctrl-C."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 1
    """Best checkpoints, by validation AP, that are kept too."""
    max_steps: int | None = None
    """Stop after this many steps as if interrupted, for trying things out; the schedule still follows `epochs`."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better AP; `None` trains to the end."""
    resume_from: int | None = None
    """Go back to the checkpoint of this step; newer ones are renamed. `None` goes on from the newest."""
    compilation_cache: str | None = None
    """Folder of compiled programs, for the next start; `None` is `compilation_cache` in `output_dir`."""
    profile_steps: str | None = None
    """Trace these steps, such as `10:15` (without the last one), into `output_dir/profile`."""
    interrupted_status: int = 0
    """Exit status after SIGTERM or Ctrl-C. A Kubernetes Job takes 0 for finished: give it another one, such as 143."""
    storage_timeout: float = 300.0
    """Seconds without an answer from storage (images, checkpoints) that end the run; a warning comes after a fifth."""

    def __post_init__(self):
        counts = ("batch_size", "accumulate", "fsdp", "epochs", "log_every", "checkpoint_every", "keep_last")
        for name in (*counts, "max_steps"):
            _check_at_least(1, f"train.{name}", getattr(self, name))
        for name in ("seed", "eval_every", "num_pictures", "keep_best", "interrupted_status"):
            _check_at_least(0, f"train.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    model: ModelConfig = DeformableDETRConfig()
    """Architecture."""
    loss: LossConfig = LossConfig()
    """Matching and losses."""
    data: DataConfig = DataConfig()
    """Images and augmentation."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and schedule."""
    train: TrainConfig = TrainConfig()
    """The run."""

    def __post_init__(self):
        kind, wanted = type(self.model).__name__, self.model.classification
        if self.loss.classification != wanted:
            hint = "loss=LossConfig.detr() in the config" if wanted == "softmax" else "loss=LossConfig() in the config"
            raise UserError(
                f"loss.classification: got {self.loss.classification!r}, but the class outputs of {kind} are for "
                f"{wanted!r}: write {hint}, or pass --loss.classification {wanted}"
            )


@dataclasses.dataclass(frozen=True)
class TTAConfig:
    """Test-time augmentation: the views of an image, and how their boxes are merged (`detr_jax.tta`)."""

    scales: tuple[int, ...] | None = None
    """The shorter side in each view; the longest possible one grows with it. `None`: 0.75, 1, 1.25 and 1.5 times that
    of evaluation, which is 600, 800, 1000 and 1200 for the published models."""
    flip: bool = True
    """Each scale also flipped left to right."""
    iou: float = 0.55
    """Boxes of one class that overlap more than this are one object; the library's default."""

    def __post_init__(self):
        if self.scales is not None and (not self.scales or min(self.scales) < 1):
            raise UserError(f"tta.scales={self.scales}: expected at least one size in pixels")
        if not 0 <= self.iou < 1:
            raise UserError(f"tta.iou={self.iou}: expected at least 0 and less than 1")

    def views(self, eval_scale: int) -> list[tuple[int, bool]]:
        """(scale, flipped) of each view of a detector whose usual scale is `eval_scale`."""
        scales = self.scales or tuple(round(factor * eval_scale) for factor in (0.75, 1, 1.25, 1.5))
        return [(scale, flip) for scale in scales for flip in (False, True)[: 1 + self.flip]]


def from_dict(values: Mapping[str, Any], model: str, where: object = "config") -> Config:
    """The `Config` that `dataclasses.asdict` was called on, also after a round trip through JSON.

    Args:
        values: nested fields.
        model: class name of `Config.model`.
        where: the file, for errors.

    Raises:
        UserError: a field or a model that does not exist in this version, or a value that is not allowed.
    """
    parts = {"loss": LossConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
    sections: dict[str, Any] = {
        name: _section(cls, values.get(name), f"{where}: {name}") for name, cls in parts.items()
    }
    return Config(model=model_from_dict(values.get("model", {}), model, where), **sections)


def model_from_dict(values: Mapping[str, Any], model: str, where: object = "config") -> ModelConfig:
    """As `from_dict`, for `Config.model` alone."""
    known = {cls.__name__: cls for cls in (DETRConfig, DeformableDETRConfig, DINOConfig)}
    if model not in known:
        raise UserError(
            f"{where}: model: got {model!r}, expected one of {', '.join(known)}; if a newer version of detr_jax wrote "
            "it, update detr_jax"
        )
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: model: got {type(values).__name__}, expected its fields: the file is damaged")
    parts = {
        "backbone": _section(BackboneConfig, values.get("backbone"), f"{where}: model.backbone"),
        "tune": _section(TuneConfig, values.get("tune", {}), f"{where}: model.tune"),  # older checkpoints have none
    }
    return _section(known[model], {**values, **parts}, f"{where}: model")


def _section(cls: Any, values: Any, where: str) -> Any:
    """A section of a config that was stored."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: got {type(values).__name__}, expected its fields: the file is damaged")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise UserError(
            f"{where}.{unknown[0]}: this version of detr_jax has no such field; a newer one wrote it: update detr_jax"
        )
    try:
        return cls(**_tuples(values))
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _tuples(value: Any) -> Any:
    """Lists as tuples, nested ones too."""
    if isinstance(value, Mapping):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value
