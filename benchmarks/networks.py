"""Layers of networks whose times were published, as shapes: what the papers' and TensorFlow's own definitions compute.

Batch norm is folded, as the published converters do. Pooling, additions and concatenations are no layers here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mpq.layers import LayerSpec

# Channels, kernel, and the stride of a convolution without padding.
Step = tuple[int, int | tuple[int, int]] | tuple[int, int | tuple[int, int], int]


class Net:
    """A network under construction: each call adds a layer that reads the current tensor."""

    def __init__(self, size: int, channels: int = 3) -> None:
        self.layers: list[LayerSpec] = []
        self.shape = (channels, size, size)

    def conv(
        self, out: int, kernel: int | tuple[int, int] = 3, stride: int = 1, *, groups: int = 1, valid: bool = False
    ) -> Net:
        """A convolution; ``groups=0`` makes it depthwise."""
        k = (kernel, kernel) if isinstance(kernel, int) else kernel
        channels, *sizes = self.shape
        groups = groups or channels
        sides = [(s - (n - 1 if valid else 0) + stride - 1) // stride for s, n in zip(sizes, k, strict=True)]
        shape = (out, channels // groups, *k)
        self._add("conv2d", shape, (out, *sides), math.prod(shape) * math.prod(sides))
        return self

    def linear(self, out: int) -> Net:
        """A product after global pooling."""
        self.shape = (self.shape[0],)
        self._add("linear", (out, self.shape[0]), (out,), out * self.shape[0])
        return self

    def pool(self, stride: int = 2, *, valid: bool = False) -> Net:
        """What is no layer changes shapes all the same; ``valid`` is a kernel of 3 without padding."""
        side = (self.shape[1] - (2 if valid else 0) + stride - 1) // stride
        self.shape = (self.shape[0], side, side)
        return self

    def branches(self, *branches: list[Step], pooled: int = 0) -> Net:
        """Convolutions side by side on one tensor, joined; ``pooled`` channels come from a branch without any."""
        start, total, end = self.shape, pooled, self.shape
        for branch in branches:
            self.shape = start
            for step in branch:
                stride = step[2] if len(step) == 3 else 1
                self.conv(step[0], step[1], stride, valid=len(step) == 3)
            total, end = total + self.shape[0], self.shape
        self.shape = (total, *end[1:])
        return self

    def _add(self, op: str, weight: tuple[int, ...], output: tuple[int, ...], macs: int) -> None:
        i = len(self.layers)
        found = LayerSpec(f"{op}{i}", op, weight, weight, self.shape, output, macs, math.prod(weight), 1, i, i)
        self.layers.append(found)
        self.shape = output


def mobilenet_v1(width: float = 1.0, size: int = 224, *, classifier: bool = True) -> Net:
    """MobileNet V1 (Howard et al., 2017, table 1)."""
    net = Net(size).conv(round(32 * width), 3, 2)
    for out, stride in [
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ]:
        net.conv(net.shape[0], 3, stride, groups=0).conv(round(out * width), 1)
    return net.linear(1001) if classifier else net


def mobilenet_v1_ssd() -> Net:
    """SSD with MobileNet V1 at 300 x 300 for COCO's 90 classes (Huang et al., 2017): backbone, more maps, heads."""
    net = mobilenet_v1(1.0, 300, classifier=False)
    maps = [(512, 19), (1024, 10)]
    for squeeze, out in [(256, 512), (128, 256), (128, 256), (64, 128)]:
        net.conv(squeeze, 1).conv(out, 3, 2)
        maps.append((out, net.shape[1]))
    for i, (channels, side) in enumerate(maps):
        for values in (4, 91):
            net.shape = (channels, side, side)
            net.conv(values * (3 if i == 0 else 6), 1)
    return net


def mobilenet_v2(size: int = 224) -> Net:
    """MobileNet V2 (Sandler et al., 2018, table 2)."""
    net = Net(size).conv(32, 3, 2)
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for factor, out, repeats, first in rows:
        for i in range(repeats):
            hidden = net.shape[0] * factor
            if factor > 1:
                net.conv(hidden, 1)
            net.conv(hidden, 3, first if i == 0 else 1, groups=0).conv(out, 1)
    return net.conv(1280, 1).linear(1001)


def resnet(blocks: tuple[int, ...], size: int) -> Net:
    """ResNet with bottlenecks as TF-Slim defines V1 and V2: the last unit of a stage has its stride, in the 3 x 3."""
    net = Net(size).conv(64, 7, 2).pool()
    for i, units in enumerate(blocks):
        width = 64 * 2**i
        for unit in range(units):
            start, stride = net.shape, 2 if unit == units - 1 and i < 3 else 1
            if unit == 0:
                net.conv(4 * width, 1, stride)
                net.shape = start
            net.conv(width, 1).conv(width, 3, stride).conv(4 * width, 1)
    return net.linear(1001)


RESNETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def inception_v3() -> Net:
    """Inception V3 (Szegedy et al., 2015) at 299 x 299 without its auxiliary head."""
    net = Net(299).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3).pool(valid=True)
    net.conv(80, 1).conv(192, 3, valid=True).pool(valid=True)
    for pooled in (32, 64, 64):
        net.branches([(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], [(pooled, 1)])
    net.branches([(384, 3, 2)], [(64, 1), (96, 3), (96, 3, 2)], pooled=288)
    for c in (128, 160, 160, 192):
        net.branches([(192, 1)], list(_sevens(c, c, 192, 2)), list(_sevens(c, c, 192, 4)), [(192, 1)])
    net.branches([(192, 1), (320, 3, 2)], [*_sevens(192, 192, 192, 2), (192, 3, 2)], pooled=768)
    for _ in range(2):
        wide = [(384, (1, 3))], [(384, (3, 1))]
        net.branches([(320, 1)], [(384, 1), *wide[0]], [(448, 1), (384, 3), *wide[0]], [(192, 1)])
        _beside(net, wide[1][0], 2)
    return net.linear(1001)


def inception_v4() -> Net:
    """Inception V4 (Szegedy et al., 2016, figures 3 to 9) at 299 x 299."""
    net = Net(299).conv(32, 3, 2, valid=True).conv(32, 3, valid=True).conv(64, 3)
    net.branches([(96, 3, 2)], pooled=64)
    net.branches([(64, 1), (96, 3, 1)], [(64, 1), (64, (7, 1)), (64, (1, 7)), (96, 3, 1)])
    net.branches([(192, 3, 2)], pooled=192)
    for _ in range(4):
        net.branches([(96, 1)], [(64, 1), (96, 3)], [(64, 1), (96, 3), (96, 3)], [(96, 1)])
    net.branches([(384, 3, 2)], [(192, 1), (224, 3), (256, 3, 2)], pooled=384)
    for _ in range(7):
        long = [(192, 1), (192, (1, 7)), (224, (7, 1)), (224, (1, 7)), (256, (7, 1))]
        net.branches([(384, 1)], [(192, 1), (224, (1, 7)), (256, (7, 1))], long, [(128, 1)])
    net.branches([(192, 1), (192, 3, 2)], [(256, 1), (256, (1, 7)), (320, (7, 1)), (320, 3, 2)], pooled=1024)
    for _ in range(3):
        deep = [(384, 1), (448, (1, 3)), (512, (3, 1)), (256, (1, 3))]
        net.branches([(256, 1)], [(384, 1), (256, (1, 3))], deep, [(256, 1)])
        _beside(net, (256, (3, 1)), 1, 384)
        _beside(net, (256, (3, 1)), 1, 512)
    return net.linear(1001)


def _sevens(first: int, middle: int, last: int, count: int) -> Iterator[tuple[object, ...]]:
    """A 1 x 1 and then so many 1 x 7 and 7 x 1 in turn."""
    yield (first, 1)
    for i in range(count):
        yield (last if i == count - 1 else middle, (1, 7) if i % 2 == 0 else (7, 1))


def _beside(net: Net, conv: tuple[int, tuple[int, int]], count: int, channels: int = 384) -> None:
    """Convolutions beside ones already there, reading the same tensor; their channels join."""
    total, side, _ = net.shape
    for _ in range(count):
        net.shape = (channels, side, side)
        net.conv(*conv)
        total += conv[0]
    net.shape = (total, side, side)
