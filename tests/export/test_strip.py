"""Stripping files: what is written, what the certificate says, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser
from PIL import Image
from torch import Tensor, nn

from srdeploy.cli.output_shares import likely_main, output_shares
from srdeploy.errors import UserError
from srdeploy.export import strip
from srdeploy.export.certificate import Certificate, Line, certify_files, read_model
from srdeploy.export.output_parity import same_outputs
from srdeploy.export.strip import strip_file
from srdeploy.graph.signature import read_signature
from srdeploy.imaging import Pixels

HEAD = '<ir_version: 9, opset_import: ["" : 20, "own" : 1]>'
MODEL = """heads (float[N,3,H,W] images) => (float[N,3,H,W] out, float[N,3,H,W] aux)
{
  features = Conv(images, stem)
  side = Relu(features)
  aux = Conv(side, aux_head)
  out = Conv(features, head)
}"""
WEIGHTS = {"stem": (4, 3, 1, 1), "aux_head": (3, 4, 1, 1), "head": (3, 4, 1, 1)}


def model_of(text: str = MODEL, **weights: tuple[int, ...]) -> ModelProto:
    model = parser.parse_model(HEAD + text)
    rng = np.random.default_rng(0)
    for name, shape in (weights or WEIGHTS).items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    def save(model: ModelProto | None = None, name: str = "model.onnx") -> Path:
        onnx.save(model if model is not None else model_of(), str(tmp_path / name))
        return tmp_path / name

    return save


Saved = Callable[..., Path]


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    table = {"names": ["sky", "road", "tree"], "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({**table, "ignore_index": 255, "mean": [0.5, 0.5, 0.5]}))
    return path


def line_of(certificate: Certificate, name: str) -> Line:
    (line,) = (line for line in certificate.lines if line.name == name)
    return line


def test_the_file_is_written_beside_the_original_with_a_certificate(saved: Saved) -> None:
    source = saved()
    before = source.read_bytes()
    result = strip_file(source, ["out"])
    assert result.file == source.parent / "model.stripped.onnx"
    assert result.certificate_file == source.parent / "model.stripped.certificate.json"
    written = json.loads(result.certificate_file.read_text())
    assert written == json.loads(json.dumps(result.certificate.summary()))
    assert [line["name"] for line in written["lines"]] == [
        "identity",
        "survivors",
        "parity",
        "provenance",
    ]
    assert written["passed"] is True
    assert [v.name for v in read_model(result.file).graph.output] == ["out"]
    assert source.read_bytes() == before
    assert sorted(path.name for path in source.parent.iterdir()) == [
        "model.onnx",
        "model.stripped.certificate.json",
        "model.stripped.onnx",
    ]


def test_parity_runs_odd_sizes_and_batches_where_the_graph_leaves_them_open(saved: Saved) -> None:
    parity = line_of(strip_file(saved(), ["out"]).certificate, "parity")
    shapes = {tuple(case["inputs"]["images"]) for case in parity.figures["cases"]}
    assert {(1, 3, 97, 131), (2, 3, 64, 96)} <= shapes
    assert all(case["bits_equal"] for case in parity.figures["cases"])
    assert "drawn pictures" in parity.detail


def test_a_fixed_shape_is_run_as_it_is(saved: Saved) -> None:
    source = saved(model_of(MODEL.replace("N,3,H,W", "1,3,48,56")))
    parity = line_of(strip_file(source, ["out"]).certificate, "parity")
    assert [case["inputs"]["images"] for case in parity.figures["cases"]] == [[1, 3, 48, 56]]


def test_photos_are_used_where_they_are_given(saved: Saved, photos: list[Pixels]) -> None:
    source = saved()
    folder = source.parent / "photos"
    folder.mkdir()
    for index, photo in enumerate(photos):
        Image.fromarray(photo).save(folder / f"{index}.png")
    parity = line_of(strip_file(source, ["out"], images=folder).certificate, "parity")
    assert "(2 photos)" in parity.detail


def test_sizes_that_the_original_refuses_do_not_count_against_the_result(saved: Saved) -> None:
    """A graph with a fixed grid inside, as exporters write it, takes one size whatever it says."""
    model = model_of()
    model.graph.initializer.append(
        numpy_helper.from_array(np.zeros((1, 3, 256, 256), np.float32), "grid")
    )
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("Add", ["raw", "grid"], ["out"]))
    certificate = strip_file(saved(model), ["out"]).certificate
    parity = line_of(certificate, "parity")
    assert certificate.passed
    assert [case["inputs"]["images"] for case in parity.figures["cases"]] == [[1, 3, 256, 256]]
    assert len(parity.figures["refused"]) == 5


def test_any_inputs_will_do(saved: Saved) -> None:
    text = """many
    (float[N,3,H,W] images, int64[N] index, bool flag, float[N,L] extra, uint8[2] raw)
    => (float[A,B,C,D] out, float[N,L] aux)
    {
      half = Cast<to=1>(flag)
      bytes = Cast<to=1>(raw)
      sum = ReduceSum<keepdims=0>(bytes)
      scaled = Mul(images, half)
      moved = Add(scaled, sum)
      out = Gather<axis=0>(moved, index)
      aux = Neg(extra)
    }"""
    model = parser.parse_model(HEAD + text)
    result = strip_file(saved(model), ["out"])
    assert result.passed, result.certificate
    assert result.removed.inputs == ("extra",)


def test_an_original_that_can_not_be_run_leaves_parity_unproved(saved: Saved) -> None:
    text = MODEL.replace("side = Relu(features)", "side = own.Secret(features)")
    result = strip_file(saved(model_of(text)), ["out"])
    assert result.file.exists()
    assert not result.passed
    assert line_of(result.certificate, "identity").passed
    parity = line_of(result.certificate, "parity")
    assert parity.passed is False
    assert "not shown to be equal: onnxruntime can't load model.onnx" in parity.detail


def test_an_original_that_is_random_is_said_to_be(saved: Saved) -> None:
    """onnxruntime draws by a node's position, which changes where nodes before it go."""
    text = """noisy (float[N,3,H,W] images) => (float[N,3,H,W] out, float[N,3,H,W] aux)
    {
      aux = Neg(images)
      out = RandomNormalLike(images)
    }"""
    parity = line_of(strip_file(saved(model_of(text)), ["out"]).certificate, "parity")
    assert parity.passed is False
    assert "the original itself gives other values from run to run" in parity.detail


@pytest.mark.parametrize("change", [1e-6, 1e-2])
def test_other_values_fail_parity_however_close(saved: Saved, change: float) -> None:
    other = model_of()
    tensor = other.graph.initializer[2]
    values = numpy_helper.to_array(tensor) * np.float32(1 + change)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    original, changed = saved(), saved(other, "changed.onnx")
    found = same_outputs(model_of(), (original, changed), ["out"])
    line = found.line(["out"])
    assert line.passed is False
    assert "equal bit for bit in 0 of 4 runs" in line.detail
    assert found.cases[0].largest_difference == pytest.approx(
        change * found.cases[0].largest_value, rel=0.2
    )


def test_other_labels_fail_parity(saved: Saved) -> None:
    text = (
        "ids (float[N,3,H,W] images) => (int64[N,H,W] out) { out = ArgMax<axis=1, keepdims=0>(%s) }"
    )
    plain = saved(model_of(text % "images", w=(1,)))
    negative = model_of(text.replace("{ ", "{ minus = Neg(images) ") % "minus", w=(1,))
    found = same_outputs(
        model_of(text % "images", w=(1,)), (plain, saved(negative, "n.onnx")), ["out"]
    )
    assert min(case.moved for case in found.cases) > 0.5
    assert found.line(["out"]).passed is False
    assert "of labels differ" in found.line(["out"]).detail


def test_not_a_number_equals_itself_and_nothing_else(saved: Saved) -> None:
    text = "root (float[N,3,H,W] images) => (float[N,3,H,W] out) { out = Sqrt(%s) }"
    plain = saved(model_of(text % "images", w=(1,)))
    model = model_of(text % "images", w=(1,))
    assert same_outputs(model, (plain, plain), ["out"]).line(["out"]).passed
    positive = saved(model_of(text.replace("{ ", "{ p = Abs(images) ") % "p", w=(1,)), "p.onnx")
    assert not same_outputs(model, (plain, positive), ["out"]).line(["out"]).passed


def test_weights_in_side_files_are_brought_into_the_one_file(saved: Saved) -> None:
    source = saved().parent / "external.onnx"
    onnx.save(
        model_of(), str(source), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    result = strip_file(source, ["out"])
    (source.parent / "w.bin").rename(source.parent / "gone.bin")
    assert {t.name for t in read_model(result.file).graph.initializer} == {"stem", "head"}
    files = line_of(result.certificate, "provenance").figures["files"]
    assert str(source.parent / "w.bin") in files
    with pytest.raises(UserError, match="external.onnx"):
        strip_file(source, ["out"], source.parent / "again.onnx")
    assert not (source.parent / "again.onnx").exists()


def test_models_that_memory_formats_can_not_hold_are_refused(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved().parent / "external.onnx"
    onnx.save(
        model_of(), str(source), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    monkeypatch.setattr(strip, "LARGEST", source.stat().st_size + 100)
    with pytest.raises(UserError, match=r"external.onnx and its side files hold .* up to 2 GiB"):
        strip_file(source, ["out"])
    assert not source.with_suffix(".stripped.onnx").exists()


def test_the_original_is_replaced_only_when_forced(saved: Saved) -> None:
    source = saved()
    before = source.read_bytes()
    with pytest.raises(UserError, match=r"model.onnx is the original itself: .*--force"):
        strip_file(source, ["out"], source)
    assert source.read_bytes() == before
    result = strip_file(source, ["out"], source, force=True)
    assert result.passed
    assert len(read_model(source).graph.output) == 1
    files = line_of(result.certificate, "provenance").figures["files"]
    assert len({entry["sha256"] for entry in files.values()}) == 2


def test_an_older_result_is_replaced_only_when_forced(saved: Saved) -> None:
    source = saved()
    strip_file(source, ["out"])
    with pytest.raises(UserError, match=r"model.stripped.onnx exists: .*--force"):
        strip_file(source, ["aux"])
    assert strip_file(source, ["aux"], force=True).kept == ("aux",)


def test_an_unknown_output_is_refused_with_the_closest(saved: Saved) -> None:
    source = saved()
    with pytest.raises(UserError, match="has no output 'ouT': did you mean 'out'"):
        strip_file(source, ["ouT"])
    with pytest.raises(UserError, match=r"has 2 outputs \(out, aux\): say which"):
        strip_file(source)
    assert [path.name for path in source.parent.iterdir()] == ["model.onnx"]


def test_what_is_no_onnx_file_is_refused(tmp_path: Path, saved: Saved) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x09nothing")
    with pytest.raises(UserError, match="broken.onnx: not an ONNX file"):
        strip_file(tmp_path / "broken.onnx", ["out"])
    with pytest.raises(UserError, match="no such file"):
        strip_file(tmp_path / "absent.onnx", ["out"])
    with pytest.raises(UserError, match="give it that suffix"):
        strip_file(saved(), ["out"], tmp_path / "result.bin")
    with pytest.raises(UserError, match="no such folder of photos"):
        strip_file(saved(), ["out"], images=tmp_path / "absent")


def test_a_file_with_nothing_to_strip_is_said_to_be_and_copied_on_demand(saved: Saved) -> None:
    alone = saved(onnx.load(str(strip_file(saved(), ["out"]).file)), "alone.onnx")
    with pytest.raises(UserError, match="one output, 'out', and all of it leads there: nothing"):
        strip_file(alone)
    result = strip_file(alone, ["out"])
    assert result.removed.nothing
    assert result.passed
    assert "nothing was there to remove" in line_of(result.certificate, "survivors").detail


def test_classes_make_the_file_one_of_ours(saved: Saved, classes: Path) -> None:
    result = strip_file(saved(), ["out"], classes=classes)
    metadata = {entry.key: entry.value for entry in read_model(result.file).metadata_props}
    assert metadata["srdeploy.input"] == "float32"
    assert metadata["srdeploy.output"] == "logits"
    signature = read_signature(result.file)
    assert signature.spec is not None
    assert signature.spec.classes == ("sky", "road", "tree")
    assert signature.spec.mean == (0.5, 0.5, 0.5)
    assert result.passed


def test_classes_can_be_attached_where_there_is_nothing_to_strip(
    saved: Saved, classes: Path
) -> None:
    alone = saved(onnx.load(str(strip_file(saved(), ["out"]).file)), "alone.onnx")
    assert read_signature(strip_file(alone, classes=classes).file).spec is not None


def test_a_graph_of_one_size_gets_the_policy_of_one_size(saved: Saved, classes: Path) -> None:
    source = saved(model_of(MODEL.replace("N,3,H,W", "1,3,48,56")))
    spec = read_signature(strip_file(source, ["out"], classes=classes).file).spec
    assert spec is not None
    assert spec.input.fixed
    assert spec.input.usual == (48, 56)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MODEL.replace("float[N,3,H,W] out", "float[N,4,H,W] out"), "4 classes, .* list has 3"),
        (
            MODEL.replace("float[N,3,H,W] out", "float[1,48,56,3] out"),
            "'out' has its classes last",
        ),
        (
            MODEL.replace("float[N,3,H,W] images", "float[N,64,96,3] images"),
            "'images' is float .* is needed",
        ),
        (MODEL.replace("float[N,3,H,W] out", "float[N,3] out"), "'out' is float .*; labels"),
    ],
)
def test_classes_that_do_not_suit_the_graph_are_refused(
    saved: Saved, classes: Path, text: str, words: str
) -> None:
    source = saved(model_of(text))
    with pytest.raises(UserError, match=words):
        strip_file(source, ["out"], classes=classes)
    assert not source.with_suffix(".stripped.onnx").exists()


def test_a_class_count_that_the_file_leaves_open_is_seen_when_it_runs(
    saved: Saved, classes: Path
) -> None:
    text = MODEL.replace("float[N,3,H,W] out", "float[N,K,H,W] out")
    model = model_of(text, **{**WEIGHTS, "head": (5, 4, 1, 1)})
    source = saved(model)
    with pytest.raises(UserError, match=r"gives 'out' \[1, 5, .* needs \[N, 3, H, W\]"):
        strip_file(source, ["out"], classes=classes)
    assert not source.with_suffix(".stripped.onnx").exists()


def test_our_own_file_with_its_exits_becomes_the_plain_one(
    tmp_path: Path, tiny_file: Path, tiny_file_with_exit: Path, classes: Path
) -> None:
    result = strip_file(tiny_file_with_exit, ["labels"], tmp_path / "plain.onnx")
    assert result.passed, result.certificate
    assert certify_files(tiny_file, result.file).passed
    assert not certify_files(tiny_file, tiny_file_with_exit).passed
    metadata = {entry.key: entry.value for entry in read_model(result.file).metadata_props}
    assert metadata["srdeploy.output"] == "labels"
    with pytest.raises(UserError, match="has its own classes"):
        strip_file(tiny_file_with_exit, ["labels"], tmp_path / "p.onnx", classes=classes)


def test_a_line_that_fails_is_written_down_and_so_is_the_file(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(model: ModelProto, part: object, keep: object) -> ModelProto:
        rest = ModelProto()
        rest.CopyFrom(model)
        del rest.graph.output[1]
        return rest

    monkeypatch.setattr(strip, "restricted", careless)
    result = strip_file(saved(), ["out"])
    assert not result.passed
    assert result.file.exists()
    assert json.loads(result.certificate_file.read_text())["passed"] is False
    assert "node 'side' (Relu)" in line_of(result.certificate, "survivors").detail


class TwoHeads(nn.Module):
    """A network as people write them: auxiliary logits beside the main ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(4, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
        self.aux = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        features = self.stem(images)
        out = nn.functional.interpolate(self.head(features), scale_factor=2.0, mode="bilinear")
        aux = self.aux(features)
        return {"out": out, "aux": aux} if self.kind == "dict" else (out, aux)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")
def test_what_torch_exports_is_stripped_of_its_auxiliary_head(tmp_path: Path, kind: str) -> None:
    """Files with side files and names of torch's own choice, as torch.onnx.export leaves them."""
    source = tmp_path / "two.onnx"
    network = TwoHeads(kind).eval()
    torch.onnx.export(
        network, (torch.zeros(1, 3, 64, 96),), str(source), dynamo=True, verbose=False
    )
    model = read_model(source)
    shares = output_shares(model)
    main = likely_main(model, shares)
    assert [share.name == main for share in shares] == [True, False]
    result = strip_file(source, [main])
    assert result.passed, result.certificate
    assert (
        result.removed.parameters
        == sum(parameter.numel() for parameter in network.aux.parameters()) - 2 * 5
    )  # the batch norm is folded


def test_the_shares_say_what_each_output_alone_needs() -> None:
    model = model_of()
    out, aux = output_shares(model)
    assert (out.name, out.nodes, out.parameters) == ("out", 1, 12)
    assert (aux.name, aux.nodes, aux.parameters) == ("aux", 2, 12)
    assert (out.dtype, out.shape) == ("float", ("N", 3, "H", "W"))
    assert likely_main(model, (out, aux)) == "out"


def test_the_main_output_is_guessed_by_type_before_size(saved: Saved) -> None:
    model = model_of()
    model.graph.output[0].name = model.graph.node[-1].output[0] = "x1"
    shares = output_shares(model)
    assert likely_main(model, shares) == "aux"
    vector = helper.make_tensor_value_info("aux", TensorProto.FLOAT, ["N", 3])
    model.graph.output[1].CopyFrom(vector)
    assert likely_main(model, shares) == "x1"
