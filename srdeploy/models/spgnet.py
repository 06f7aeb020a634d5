"""SPGNet on ResNet-50: two encoder-decoder stages, the first one's prediction guiding the second.

Source: Cheng et al., "SPGNet: Semantic Prediction Guidance for Scene Parsing", ICCV 2019 (arXiv
1908.09798). **This is an interpretation**: the authors published no code.

Known: two encoder-decoder stages of ResNet bottlenecks; decoder units that add BN(1x1 of the
encoder's map) and BN(1x1 of the coarser map, raised bilinearly), then ReLU; global average
pooling; "supervise-and-excite" between the stages: features weighed by sigmoid(1x1 of a supervised
pixel-wise prediction); stage 2 starts from ReLU(BN(1x1 256 -> 64)) of stage 1's finest decoder map,
and at each level adds ReLU(BN(1x1)) of stage 1's encoder map and of its decoder map (as in MSPN,
arXiv 1901.00148).

Ours: ResNet-50 in both stages (stage 2 without the stem), at output stride 32; decoder maps of 256
channels; the pooled vector goes through a 1x1 convolution into the coarsest decoder unit; the
prediction that guides is stage 1's own, read from its finest decoder map by 3x3 BN ReLU 1x1, as is
stage 2's; its weight of 0.4 in training, which is that of OCRNet's coarse head.
"""

from torch import Tensor, nn
from torch.nn import functional

from srdeploy.models.initialisation import check_width, initialise, initialise_logits
from srdeploy.models.resnet import RESNETS, Bottleneck, ResNet
from srdeploy.outputs import resize_logits

ARCHITECTURE = "resnet50"
LEVELS = 4


def unit(inputs: int, outputs: int, kernel: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU; the size stays."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class CoarsestUnit(nn.Module):
    """The decoder's start: ReLU(BN(1x1 of the encoder's last map) + 1x1 of its mean over pixels).

    The pooled vector has a bias and no BatchNorm, which could not be trained on a batch of one.
    """

    def __init__(self, lateral: int, channels: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(lateral, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.pooled = nn.Conv2d(lateral, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        seen = self.pooled(features.mean((2, 3), keepdim=True))
        return functional.relu(self.bn(self.lateral(features)) + seen)


class DecoderUnit(nn.Module):
    """ReLU(BN(1x1 of the encoder's map) + BN(1x1 of the coarser map at that map's exact size))."""

    def __init__(self, lateral: int, channels: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(lateral, channels, 1, bias=False)
        self.lateral_bn = nn.BatchNorm2d(channels)
        self.coarser = nn.Conv2d(channels, channels, 1, bias=False)
        self.coarser_bn = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor, coarser: Tensor) -> Tensor:
        # Before raising they cost a quarter. The 1x1 commutes with bilinear interpolation, and so
        # does BatchNorm once trained; in training its statistics are those of the coarse map.
        raised = resize_logits(
            self.coarser_bn(self.coarser(coarser)), (features.shape[-2], features.shape[-1])
        )
        return functional.relu(self.lateral_bn(self.lateral(features)) + raised)


class Decoder(nn.Module):
    """Encoder maps, fine to coarse -> decoder maps [N, channels, h, w] of the same sizes."""

    def __init__(self, laterals: list[int], channels: int) -> None:
        super().__init__()
        self.coarsest = CoarsestUnit(laterals[-1], channels)
        self.units = nn.ModuleList(DecoderUnit(count, channels) for count in laterals[:-1])

    def forward(self, encoded: list[Tensor]) -> list[Tensor]:
        maps = [self.coarsest(encoded[-1])]
        for features, decode in zip(encoded[-2::-1], reversed(self.units), strict=True):
            maps.append(decode(features, maps[-1]))
        return maps[::-1]


class Prediction(nn.Sequential):
    """Decoder map [N, channels, h, w] -> logits [N, K, h, w]."""

    def __init__(self, channels: int, classes: int) -> None:
        logits = nn.Conv2d(channels, classes, 1)
        super().__init__(unit(channels, channels, 3), logits)
        initialise(self)
        initialise_logits(logits)


class Guidance(nn.Module):
    """Excitation: features [N, C, h, w] times sigmoid(1x1 of logits [N, K, h, w]), per channel."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(classes, channels, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        gate: Tensor = self.gate(logits)
        return features * gate.sigmoid()


class GuidedLevel(nn.Module):
    """One level of stage 2's encoder: its layer, plus what stage 1 saw and decoded at that level.

    Stage 1's maps have the layer's size: both stages halve with the same strides.
    """

    def __init__(self, layer: nn.Sequential, channels: int, decoded: int) -> None:
        super().__init__()
        self.layer = layer
        self.from_encoder = unit(channels, channels)
        self.from_decoder = unit(decoded, channels)

    def forward(self, features: Tensor, encoded: Tensor, decoded: Tensor) -> Tensor:
        guided: Tensor = self.layer(features) + self.from_encoder(encoded)
        guided += self.from_decoder(decoded)
        return guided


class SPGNet(nn.Module):
    """images float32 [N, 3, H, W] -> logits float32 [N, K, H, W], any H, W >= 32.

    An interpretation (see the module's text). `backbone` is stage 1's encoder, under torchvision's
    names; `width` is its base width, 64 in ResNet-50, and scales everything. `stages` names the
    encoder levels of stage 1 and then of stage 2, each fine to coarse, as they run.
    `auxiliary_heads` holds stage 1's prediction, which guides stage 2 and so stays in the deployed
    network.
    """

    def __init__(self, classes: int, *, width: int = 64) -> None:
        super().__init__()
        check_width(width)
        channels = [width * Bottleneck.expansion * 2**level for level in range(LEVELS)]
        decoded = width * Bottleneck.expansion
        self.backbone = ResNet(ARCHITECTURE, 32, width=width)
        self.decoder = Decoder(channels, decoded)
        self.prediction = Prediction(decoded, classes)
        self.guidance = Guidance(classes, decoded)
        self.enter = unit(decoded, width)
        self.second = nn.ModuleList(second_encoder(width, channels, decoded))
        self.second_decoder = Decoder(channels, decoded)
        for part in (self.decoder, self.guidance, self.enter, self.second, self.second_decoder):
            initialise(part)
        self.second_prediction = Prediction(decoded, classes)
        self.stages = (
            *(f"backbone.layer{level + 1}" for level in range(LEVELS)),
            *(f"second.{level}" for level in range(LEVELS)),
        )
        self.auxiliary_heads = {"prediction": 0.4}

    def forward(self, images: Tensor) -> Tensor:
        encoded = self._first_encoder(images)
        decoded = self.decoder(encoded)
        guided = self.guidance(decoded[0], self.prediction(decoded[0]))
        features, again = self.enter(guided), []
        for level, seen, read in zip(self.second, encoded, decoded, strict=True):
            features = level(features, seen, read)
            again.append(features)
        logits = self.second_prediction(self.second_decoder(again)[0])
        return resize_logits(logits, (images.shape[-2], images.shape[-1]))

    def _first_encoder(self, images: Tensor) -> list[Tensor]:
        """The backbone's four maps, at strides 4, 8, 16 and 32."""
        backbone = self.backbone
        features = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images))))
        maps = []
        for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
            features = layer(features)
            maps.append(features)
        return maps


def second_encoder(width: int, channels: list[int], decoded: int) -> list[GuidedLevel]:
    """ResNet-50's layers after the stem, each with what it takes from stage 1."""
    _, depths = RESNETS[ARCHITECTURE]
    levels, inputs = [], width
    for level, (depth, outputs) in enumerate(zip(depths, channels, strict=True)):
        inner, stride = width * 2**level, 1 if level == 0 else 2
        layer = nn.Sequential(
            Bottleneck(inputs, inner, stride, (1, 1)),
            *(Bottleneck(outputs, inner, 1, (1, 1)) for _ in range(1, depth)),
        )
        levels.append(GuidedLevel(layer, outputs, decoded))
        inputs = outputs
    return levels
