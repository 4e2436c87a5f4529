"""torchvision's image classifiers as encoders: cut at a stride of 16, with frozen normalisation.

Nothing is downloaded: weights start random, and `run.init` names a file to take them from
(`pipeline.warm_start`). The layers keep torchvision's names, so its state dicts fit as they are.

Tensor names carry their shape: B batch, C image channels, H height, W width, F grid features.
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

BackboneName = Literal["resnet18", "resnet50", "efficientnet_b0"]
STRIDE = 16
FEATURE_DIMS: dict[BackboneName, int] = {
    "resnet18": 256,
    "resnet50": 1024,
    "efficientnet_b0": 112,
}
"""Features of a grid cell."""

_RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
_EFFICIENTNET_STAGES = 6
# Of ImageNet in [0,1], red, green, blue: what torchvision's weights were trained on.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Sequential):
    """The layers of a torchvision model up to the last of stride 16, initialised at random.

    BatchNorm is frozen: its scales, shifts and statistics are buffers that a state dict fills and
    training leaves alone, so that a sample's result does not depend on its batch. Without such a
    file they do nothing, and EfficientNet's features come out near 1e-9: training refuses that.

    Each layer that halves a size takes n to ceil(n / 2), so the grid of an image is
    ceil(height / 16) x ceil(width / 16).

    "Deep Residual Learning for Image Recognition" (He et al., 2015, arXiv:1512.03385),
    "EfficientNet" (Tan and Le, 2019, arXiv:1905.11946).
    """

    def __init__(self, name: BackboneName, image_channels: int) -> None:
        """Raises ValueError for images of other than 1 or 3 channels."""
        if image_channels not in (1, 3):
            raise ValueError(
                f'model.encoder = "{name}" takes images of 1 or 3 channels, and these have '
                f'{image_channels}: pack them with --channels 3, or set model.encoder = "cnn"'
            )
        # Imported where it is used: it takes a while, and default runs do without it.
        from torchvision import models
        from torchvision.ops import FrozenBatchNorm2d

        whole = getattr(models, name)(weights=None, norm_layer=FrozenBatchNorm2d)
        if name == "efficientnet_b0":
            layers = {"features": whole.features[:_EFFICIENTNET_STAGES]}
        else:
            layers = {layer: getattr(whole, layer) for layer in _RESNET_LAYERS}
        super().__init__(OrderedDict(layers))
        self.mean_1C11 = nn.Buffer(torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.std_1C11 = nn.Buffer(torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """`grid_BFHW` of images in [0,1]; grey ones are shown as red, green and blue alike."""
        feature_BFHW = (image_BCHW - self.mean_1C11) / self.std_1C11
        for layer in self:
            feature_BFHW = layer(feature_BFHW)
        return feature_BFHW
