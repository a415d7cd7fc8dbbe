"""Small problems, and what torchvision's op makes of them."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call of `deform_conv`."""

    size: tuple[int, int] = (7, 9)
    """Height and width."""
    channels: int = 8
    outputs: int = 6
    k: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    offset_groups: int = 1
    modulated: bool = True
    spread: float = 1.0
    """Standard deviation of the offsets in pixels."""
    batch: int = 2

    @property
    def options(self) -> dict[str, int]:
        """Of the convolution."""
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    @property
    def output_size(self) -> list[int]:
        """Height and width."""
        reach = self.dilation * (self.k - 1) + 1
        return [max(0, (n + 2 * self.padding - reach) // self.stride + 1) for n in self.size]

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """x, offsets, modulation and kernel, float32, as `deform_conv` takes them."""
        rng = np.random.default_rng(seed)
        samples = (self.batch, *self.output_size, self.offset_groups, self.k**2)
        x = rng.standard_normal((self.batch, *self.size, self.channels), np.float32)
        offsets = self.spread * rng.standard_normal((*samples, 2), np.float32)
        modulation = rng.uniform(0, 1, samples).astype(np.float32) if self.modulated else None
        kernel = rng.standard_normal((self.k, self.k, self.channels // self.groups, self.outputs), np.float32)
        return x, offsets, modulation, kernel / (self.k * (self.channels // self.groups) ** 0.5)

    def cotangent(self) -> np.ndarray:
        """The gradient of the output."""
        return np.random.default_rng(1).standard_normal((self.batch, *self.output_size, self.outputs), np.float32)


CASES = {
    "v1": Case(modulated=False),
    "v2": Case(),
    "groups": Case(channels=12, groups=2, offset_groups=3),
    "stride_2": Case(size=(8, 11), stride=2),
    "dilation_2": Case(padding=2, dilation=2, modulated=False),
    "outside": Case(spread=8.0),
}
"""What `tests/data/deform_conv` holds, one file each."""


def run_torchvision(case: Case, inputs, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """Output and gradients of `torchvision.ops.deform_conv2d`, in the layouts of `deform_conv`."""
    import torch
    import torchvision

    b, (h, w) = case.batch, case.output_size
    x, offsets, modulation, kernel = (None if z is None else torch.from_numpy(z).requires_grad_() for z in inputs)
    output = torchvision.ops.deform_conv2d(
        x.permute(0, 3, 1, 2),
        offsets.flip(-1).permute(0, 3, 4, 5, 1, 2).reshape(b, -1, h, w),  # channels: group, tap, (y, x)
        kernel.permute(3, 2, 0, 1),
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        mask=None if modulation is None else modulation.permute(0, 3, 4, 1, 2).reshape(b, -1, h, w),
    ).permute(0, 2, 3, 1)
    output.backward(torch.from_numpy(cotangent))
    names = ("grad_x", "grad_offsets", "grad_modulation", "grad_kernel")
    gradients = {
        name: z.grad.numpy() for name, z in zip(names, (x, offsets, modulation, kernel), strict=True) if z is not None
    }
    return {"output": output.detach().numpy(), **gradients}
