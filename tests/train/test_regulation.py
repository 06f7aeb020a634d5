"""SelfRegulation as a whole: what enters the loss, who learns from it, and what stays as it was."""

import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from srdeploy import SelfRegulation
from srdeploy.errors import UserError
from srdeploy.models import make_network
from srdeploy.train import losses
from srdeploy.train.regulation_config import RegulationConfig
from srdeploy.validation import validated

K = 4
OFF = RegulationConfig(enabled=False)
FEATURE = RegulationConfig(srf_form="feature", labels="proportion", temperature=2.0)
ALL = {
    "lean": RegulationConfig(),
    "soft": RegulationConfig(srf_where="everywhere"),
    "hard": RegulationConfig(srf_form="hard", srf_where="everywhere"),
    "feature": FEATURE,
    "authors": RegulationConfig.authors(),
}


class Staged(nn.Module):
    """Three stages, a head at stride 8, and a second supervised head; logits at full size."""

    stages = ("one", "two", "three")

    def __init__(self, auxiliary_heads: dict[str, float] | None = None) -> None:
        super().__init__()
        self.auxiliary_heads = auxiliary_heads or {}
        self.one = self._stage(3, 4)
        self.two = self._stage(4, 6)
        self.three = self._stage(6, 8)
        self.coarse = nn.Conv2d(6, K, 1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Conv2d(8, K, 1)

    @staticmethod
    def _stage(channels: int, width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        two = self.two(self.one(images))
        self.coarse(two)
        logits = self.head(self.drop(self.three(two)))
        return functional.interpolate(logits, images.shape[2:], mode="bilinear")


def batch(height: int = 40, width: int = 56) -> tuple[Tensor, Tensor]:
    """Images [2, 3, H, W] and blocky uint8 labels [2, H, W] with a tenth of the pixels ignored."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randint(K, (2, 1, 5, 7), generator=generator).float()
    labels = functional.interpolate(coarse, size=(height, width))[:, 0].to(torch.uint8)
    holes = torch.rand(labels.shape, generator=generator) < 0.1
    images = torch.randn(2, 3, height, width, generator=generator)
    return images, torch.where(holes, 255, labels)


def seeded(settings: RegulationConfig, network: nn.Module | None = None) -> SelfRegulation:
    torch.manual_seed(0)
    return SelfRegulation(network if network is not None else Staged(), K, settings=settings)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_of_network_and_exits_learns(name: str) -> None:
    regulated = seeded(ALL[name])
    images, labels = batch()
    regulated.losses(images, labels).total.backward()
    for key, parameter in regulated.named_parameters():
        if "coarse" not in key:  # not an own exit of this network: nothing reads it
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["unet", "segnet", "deeplabv2-resnet18"])
def test_the_networks_of_the_house_are_regulated_by_their_stages(name: str) -> None:
    network = make_network(name, K, width=8)
    regulated = SelfRegulation(network, K, settings=RegulationConfig(width=8))
    assert regulated.taps == network.stages
    images, labels = batch(64, 64)
    found = regulated.losses(images, labels)
    assert set(found.terms) == {"main", "seg", "cls", "srf", "srl"}
    found.total.backward()
    without = [key for key, p in regulated.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("name", ALL)
def test_the_total_is_the_weighted_sum_of_terms_built_from_the_outputs(name: str) -> None:
    settings = ALL[name]
    regulated = seeded(settings).eval()
    images, labels = batch()
    outputs = regulated(images)
    found = regulated.losses_of(outputs, labels, progress=1.0)
    t, shallow = settings.temperature, outputs.logits[:-1]
    small = [losses.shrink_labels(labels, tuple(z.shape[2:])) for z in shallow]
    if settings.labels == "nearest":
        seg = [
            functional.cross_entropy(z, y.long(), ignore_index=255)
            for z, y in zip(shallow, small, strict=True)
        ]
    else:
        enlarged = [
            functional.interpolate(z, labels.shape[1:], mode="nearest-exact") for z in shallow
        ]
        seg = [functional.cross_entropy(z, labels.long(), ignore_index=255) for z in enlarged]
    shown = torch.stack([torch.stack([(y == k).any() for k in range(K)]) for y in labels]).float()
    bce = functional.binary_cross_entropy_with_logits
    cls = [bce(c, shown) for c in outputs.class_logits]
    teacher = outputs.class_logits[-1] / t
    srl = [t * t * bce(c / t, teacher.sigmoid()) for c in outputs.class_logits[:-1]]
    expected = {
        "main": [functional.cross_entropy(outputs.logits[-1], labels.long(), ignore_index=255)],
        "seg": seg,
        "cls": cls,
        "srl": srl,
    }
    for term, values in expected.items():
        torch.testing.assert_close(found.terms[term], torch.stack(values).sum().detach())
    s, terms = settings, found.terms
    total = terms["main"] + s.seg_weight * terms["seg"] + s.cls_weight * terms["cls"]
    total = total + s.srf_weight * terms["srf"] + s.srl_weight * terms["srl"]
    torch.testing.assert_close(found.total.detach(), total)


def test_srf_sums_the_shallowest_exits_lessons_to_every_deeper_one() -> None:
    images, labels = batch()
    for name in ("soft", "hard", "feature"):
        regulated = seeded(ALL[name]).eval()
        outputs = regulated(images)
        # One grid for all but the main output, which is enlarged from it.
        valid = losses.shrink_labels(labels, (5, 7)) != 255
        main = functional.interpolate(outputs.logits[-1], size=(5, 7), mode="bilinear")
        z = [*outputs.logits[:-1], main]
        if name == "hard":
            found = [losses.hard_feedback(one, z[0], valid) for one in z[1:]]
        elif name == "soft":
            found = [losses.soft_feedback(one, z[0], valid, 1.0) for one in z[1:]]
        else:
            first, *deeper = [one for one in outputs.hidden if one is not None]
            found = [losses.feature_feedback(one, first, valid, 2.0) for one in deeper]
            assert len(found) == 2
        terms = regulated.losses_of(outputs, labels).terms
        torch.testing.assert_close(terms["srf"], torch.stack(found).sum())


def test_a_finer_teacher_is_interpolated_for_logits_and_averaged_for_hidden_maps() -> None:
    images, labels = batch()
    valid = losses.shrink_labels(labels, (5, 7)) != 255
    taps = ("one", "three")
    for settings in (
        RegulationConfig(min_stride=1, taps=taps, srf_where="everywhere"),
        RegulationConfig(min_stride=1, taps=taps, srf_form="feature"),
    ):
        regulated = seeded(settings).eval()
        outputs = regulated(images)
        if settings.srf_form == "soft":
            teacher = outputs.logits[0]  # at stride 2; the student at stride 8, the main one at 1
            coarse = functional.interpolate(teacher, size=(5, 7), mode="bilinear")
            expected = losses.soft_feedback(outputs.logits[1], coarse, valid, 1.0)
            main = functional.interpolate(outputs.logits[2], size=(20, 28), mode="bilinear")
            finer = losses.shrink_labels(labels, (20, 28)) != 255
            expected = expected + losses.soft_feedback(main, teacher, finer, 1.0)
        else:
            hidden, student, _ = outputs.hidden
            assert hidden is not None
            assert student is not None
            coarse = functional.avg_pool2d(hidden, 4)
            expected = losses.feature_feedback(student, coarse, valid, 1.0)
        terms = regulated.losses_of(outputs, labels).terms
        torch.testing.assert_close(terms["srf"], expected.detach())


def test_a_teacher_that_may_only_be_right_is_followed_where_it_has_ground_truths_label() -> None:
    images, labels = batch()
    regulated = seeded(RegulationConfig(srf_where="right")).eval()
    outputs = regulated(images)
    found = []
    for deeper in outputs.logits[1:]:
        student, teacher = losses.on_one_grid(deeper, outputs.logits[0])
        truth = losses.shrink_labels(labels, (student.shape[2], student.shape[3]))
        right = teacher.argmax(1) == truth
        assert 0 < right.sum() < right.numel()
        found.append(losses.soft_feedback(student, teacher, truth != 255, 1.0, right))
    terms = regulated.losses_of(outputs, labels).terms
    torch.testing.assert_close(terms["srf"], torch.stack(found).sum().detach())


@pytest.mark.parametrize("form", ["hard", "soft", "feature"])
def test_the_shallow_teacher_learns_nothing_from_srf(form: Any) -> None:
    regulated = seeded(
        RegulationConfig(srf_form=form, seg_weight=1e-30, cls_weight=0, srl_weight=0)
    )
    images, labels = batch()
    outputs = regulated(images)
    main = losses.pixel_cross_entropy(outputs.logits[-1], labels, 255)
    srf = regulated.losses_of(outputs, labels).total - main
    exits = regulated.exits
    assert exits is not None
    teacher = list(exits.get_submodule("taps.0").parameters())
    part = "mix" if form == "feature" else "segmenter"
    student = list(exits.get_submodule(f"taps.1.{part}").parameters())
    grads = torch.autograd.grad(srf, teacher, retain_graph=True, allow_unused=True)
    assert all(grad is None or grad.abs().max() < 1e-20 for grad in grads)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(srf, student))


def test_the_deep_teacher_learns_nothing_from_srl() -> None:
    regulated = seeded(RegulationConfig(cls_weight=1e-30, srf_weight=0, seg_weight=0))
    images, labels = batch()
    assert regulated.exits is not None
    regulated.losses(images, labels).total.backward()
    deep = regulated.exits.own_classifier.weight.grad
    shallow = regulated.exits.get_parameter("taps.0.classifier.weight").grad
    assert deep is not None
    assert deep.abs().max() < 1e-20
    assert shallow is not None
    assert shallow.abs().max() > 1e-6


def test_the_schedule_adds_feedback_after_the_start_and_ramps_it() -> None:
    regulated = seeded(RegulationConfig(start=0.25, ramp=0.5)).eval()
    images, labels = batch()
    outputs = regulated(images)
    before = regulated.losses_of(outputs, labels, progress=0.25)
    half = regulated.losses_of(outputs, labels, progress=0.5)
    full = regulated.losses_of(outputs, labels, progress=0.75)
    assert set(before.terms) == {"main", "seg", "cls"}
    assert set(half.terms) == set(full.terms) == {"main", "seg", "cls", "srf", "srl"}
    torch.testing.assert_close(half.total - before.total, (full.total - before.total) / 2)


def test_the_baselines_loss_is_plain_cross_entropy_and_has_no_exits() -> None:
    baseline = seeded(OFF).eval()
    images, labels = batch()
    found = baseline.losses(images, labels)
    expected = functional.cross_entropy(baseline.network(images), labels.long(), ignore_index=255)
    torch.testing.assert_close(found.total, expected)
    assert baseline.exits is None
    assert baseline.taps == ()
    assert set(found.terms) == {"main"}


def test_a_baseline_and_a_regulated_run_share_init_and_dropout() -> None:
    images, labels = batch()
    mains, nexts, weights = [], [], []
    for settings in (OFF, RegulationConfig()):
        regulated = seeded(settings)
        mains.append(regulated.losses(images, labels).terms["main"])
        nexts.append(torch.rand(3))
        weights.append(regulated.network.state_dict())
    assert torch.equal(mains[0], mains[1])
    assert torch.equal(nexts[0], nexts[1])
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_exits_at_weight_zero_train_the_network_exactly_like_the_baseline() -> None:
    off = RegulationConfig(seg_weight=0, cls_weight=0, srf_weight=0, srl_weight=0)
    images, labels = batch()
    states = []
    for settings in (OFF, off):
        regulated = seeded(settings)
        optimizer = torch.optim.SGD(regulated.network.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            regulated.losses(images, labels).total.backward()
            optimizer.step()
        states.append(regulated.network.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.parametrize("name", ALL)
def test_a_batch_without_labels_costs_nothing_and_teaches_nothing(name: str) -> None:
    regulated = seeded(ALL[name], Staged(auxiliary_heads={"coarse": 0.4}))
    images, labels = batch()
    found = regulated.losses(images, torch.full_like(labels, 255))
    found.total.backward()
    assert found.total.item() == 0
    for key, parameter in regulated.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), key


def test_ignored_pixels_change_no_loss() -> None:
    class Pixelwise(nn.Module):
        stages = ("one", "two")

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.head = nn.Conv2d(4, K, 1)

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.head(self.two(self.one(images)))
            return result

    # Image-level terms see the whole photo, so they are off; exits' 3x3 see one pixel further.
    settings = RegulationConfig(min_stride=1, cls_weight=0, srl_weight=0)
    regulated = seeded(settings, Pixelwise()).eval()
    images, labels = batch()
    labels[:, :, 20:] = 255
    changed = images.clone()
    changed[:, :, :, 22:] += 9
    first, second = (regulated.losses(one, labels) for one in (images, changed))
    torch.testing.assert_close(first.total, second.total)


def test_own_exits_are_supervised_in_the_baseline_and_under_regulation() -> None:
    images, labels = batch()
    for settings in (OFF, RegulationConfig()):
        regulated = seeded(settings, Staged(auxiliary_heads={"coarse": 0.4})).eval()
        outputs = regulated(images)
        found = regulated.losses_of(outputs, labels)
        enlarged = functional.interpolate(outputs.own["coarse"], labels.shape[1:], mode="bilinear")
        expected = functional.cross_entropy(enlarged, labels.long(), ignore_index=255)
        torch.testing.assert_close(found.terms["own"], 0.4 * expected)
        if settings is OFF:
            torch.testing.assert_close(
                found.total.detach(), found.terms["main"] + found.terms["own"]
            )


def test_class_weights_enter_ground_truth_terms_as_in_torch() -> None:
    weights = torch.tensor([0.1, 1.0, 2.0, 5.0])
    torch.manual_seed(0)
    regulated = SelfRegulation(Staged(), K, class_weights=weights).eval()
    images, labels = batch()
    outputs = regulated(images)
    small = [losses.shrink_labels(labels, tuple(z.shape[2:])).long() for z in outputs.logits[:-1]]
    pairs = [*zip(outputs.logits, [*small, labels.long()], strict=True)]
    values = [functional.cross_entropy(z, y, weight=weights, ignore_index=255) for z, y in pairs]
    terms = regulated.losses_of(outputs, labels).terms
    torch.testing.assert_close(terms["main"], values[-1])
    torch.testing.assert_close(terms["seg"], torch.stack(values[:-1]).sum())
    assert "class_weights" not in regulated.state_dict()


def test_losses_under_autocast_are_float32_and_close_to_full_precision() -> None:
    regulated = seeded(RegulationConfig()).eval()
    images, labels = batch()
    exact = regulated.losses(images, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = regulated(images)
        mixed = regulated.losses(images, labels)
    assert outputs.logits[0].dtype == torch.bfloat16
    assert {value.dtype for value in mixed.terms.values()} == {torch.float32}
    assert mixed.total.dtype == torch.float32
    torch.testing.assert_close(mixed.total, exact.total, rtol=0.03, atol=0.03)


class Wrapped(nn.Module):
    """A foreign network: small logits inside a dict or an object."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(
            OrderedDict(a=nn.Conv2d(3, 4, 3, 4, 1), r=nn.ReLU(), b=nn.Conv2d(4, K, 3, 2, 1))
        )

    def forward(self, images: Tensor) -> Any:
        logits = self.body(images)
        if self.kind == "dict":
            return {"out": logits}
        return SimpleNamespace(logits=logits) if self.kind == "object" else (logits, images)


@pytest.mark.parametrize("kind", ["dict", "object", "tuple"])
def test_foreign_outputs_are_understood_and_their_logits_enlarged(kind: str) -> None:
    torch.manual_seed(0)
    regulated = SelfRegulation(Wrapped(kind), K, taps=["body.r"])
    images, labels = batch()
    outputs = regulated(images)
    assert outputs.logits[-1].shape == (2, K, 5, 7)
    found = regulated.losses_of(outputs, labels)
    enlarged = functional.interpolate(outputs.logits[-1], size=(40, 56), mode="bilinear")
    expected = functional.cross_entropy(enlarged, labels.long(), ignore_index=255)
    torch.testing.assert_close(found.terms["main"], expected)


def test_the_network_stays_the_very_module_without_hooks_or_new_keys() -> None:
    network = Staged()
    keys = list(network.state_dict())
    regulated = SelfRegulation(network, K)
    images, labels = batch()
    regulated.losses(images, labels).total.backward()
    assert regulated.network is network
    assert list(network.state_dict()) == keys
    assert all(not module._forward_hooks for module in network.modules())


def test_exits_are_saved_and_loaded_apart_from_the_network() -> None:
    one, two = seeded(RegulationConfig()), seeded(RegulationConfig())
    assert one.exits is not None
    assert two.exits is not None
    for parameter in one.exits.parameters():
        torch.nn.init.normal_(parameter)
    assert not any("network" in key for key in one.exits.state_dict())
    two.exits.load_state_dict(one.exits.state_dict())
    images, _ = batch()
    one.eval()
    two.eval()
    for a, b in zip(one(images).logits, two(images).logits, strict=True):
        assert torch.equal(a, b)


def test_a_regulated_network_can_be_copied_and_the_copy_stands_alone() -> None:
    regulated = seeded(RegulationConfig())
    twin = copy.deepcopy(regulated)
    images, labels = batch()
    twin.losses(images, labels).total.backward()
    assert all(parameter.grad is None for parameter in regulated.parameters())


def test_a_users_own_loop_learns_the_labels() -> None:
    regulated = seeded(RegulationConfig(width=8))
    optimizer = torch.optim.SGD(regulated.parameters(), lr=0.1, momentum=0.9)
    images, labels = batch()
    images = images + 3 * functional.one_hot(labels.long().clamp(max=3), 4)[..., :3].permute(
        0, 3, 1, 2
    )
    values = []
    for step in range(30):
        optimizer.zero_grad()
        found = regulated.losses(images, labels, progress=step / 30)
        found.total.backward()
        optimizer.step()
        values.append(found.terms["main"].item())
    assert values[-1] < 0.7 * values[0]


def test_a_negative_ignore_index_ignores_no_class_of_uint8_labels() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 200, 1))
    images = torch.randn(1, 3, 8, 8)
    labels = torch.full((1, 8, 8), 156, dtype=torch.uint8)  # -100 as a byte
    terms = [
        SelfRegulation(network, 200, settings=OFF, ignore_index=index).losses(images, labels).total
        for index in (-100, 255)
    ]
    assert torch.equal(terms[0], terms[1])
    assert terms[0] > 0


def training_work(settings: RegulationConfig) -> int:
    """Multiply-adds of a DeepLab-v2 ResNet-101 forward at 321 x 321, counted, not computed."""
    with torch.device("meta"):
        network = make_network("deeplabv2-resnet101", 21)
    regulated = SelfRegulation(network, 21, settings=settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        regulated(torch.zeros(2, 3, 321, 321, device="meta"))
    return int(counter.get_total_flops()) // 2


def test_lean_exits_add_little_work_to_deeplab_and_the_authors_heads_much() -> None:
    baseline = training_work(OFF)
    assert training_work(RegulationConfig()) / baseline < 1.02
    assert training_work(RegulationConfig.authors()) / baseline > 1.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 1}, "classes is 1: between 2 and 255"),
        ({"classes": 9}, "the network gives 4 logits per pixel, but classes is 9"),
        ({"ignore_index": 0}, "ignore_index 0 is also the id of a class"),
        ({"class_weights": torch.ones(3)}, r"class_weights has shape \(3,\), not \(4,\)"),
        ({"taps": ["fore"]}, "Staged has no module 'fore' to tap"),
        (
            {"taps": ["one"], "settings": FEATURE},
            "srf_form 'feature' needs two taps",
        ),
    ],
)
def test_what_can_not_be_regulated_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SelfRegulation(Staged(), **{"classes": K, **arguments})


def test_labels_that_do_not_fit_are_refused() -> None:
    regulated = seeded(RegulationConfig())
    images, labels = batch()
    with pytest.raises(UserError, match=r"labels of shape \(2, 5, 5\) do not fit images"):
        regulated.losses(images, labels[:, :5, :5])
    with pytest.raises(UserError, match="labels hold the id 37: ids are 0..3, or 255"):
        regulated.losses(images, torch.where(labels == 2, 37, labels))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seg_wieght": 1}, "regulation: unknown key 'seg_wieght': did you mean 'seg_weight'"),
        ({"seg_weight": -1}, "'seg_weight' is '-1': input should be greater than or equal to 0"),
        ({"seg_weight": float("nan")}, "'seg_weight' is 'nan': input should be a finite"),
        ({"seg_weight": 0}, "srf_weight needs seg_weight > 0"),
        ({"cls_weight": 0}, "srl_weight needs cls_weight > 0"),
        ({"taps": []}, "taps is empty"),
        ({"taps": ["a", "a"]}, "taps must differ"),
        ({"srf_form": "firm"}, "'srf_form' is 'firm'"),
        ({"temperature": 0}, "'temperature' is '0': input should be greater"),
    ],
)
def test_wrong_settings_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validated(RegulationConfig, values, "regulation")


def test_settings_come_back_from_their_json() -> None:
    for settings in (*ALL.values(), RegulationConfig(taps=("one", "two"))):
        values = settings.model_dump(mode="json")
        assert validated(RegulationConfig, values, "config.yaml") == settings


def test_by_default_ground_truth_outweighs_the_shallow_teacher() -> None:
    settings = RegulationConfig()
    assert settings.srf_weight < settings.seg_weight
