"""A deploy folder as a model of a Triton repository, read by Triton's own schema."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srdeploy.artifacts.artifact import Builder, EngineSidecar, Profile, write_sidecar
from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.export.to_onnx import export_onnx
from srdeploy.export.triton import Enum, to_pbtxt, write_repository
from srdeploy.files import sha256_of
from srdeploy.graph.signature import read_signature
from srdeploy.spec import InputPolicy, Spec

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
text_format = pytest.importorskip("google.protobuf.text_format")

NAMES = ("sky", 'a "quoted" \\ name', "two\nlines", "тротуар", "")


def config_of(model: Path) -> Any:
    """The configuration as Triton reads it; an unknown field or a wrong type would raise."""
    return text_format.Parse((model / "config.pbtxt").read_text(), schema.ModelConfig())


@pytest.fixture
def deploy(tmp_path: Path, tiny_file: Path) -> Path:
    folder = tmp_path / "deploy" / "night"
    folder.mkdir(parents=True)
    shutil.copy(tiny_file, folder / "model.onnx")
    return folder


@pytest.fixture
def add_engine(deploy: Path) -> Callable[..., Path]:
    """Puts a file that stands for an engine into the deploy folder, with its sidecar."""

    def add(
        name: str,
        capabilities: tuple[str, ...] = ("8.9",),
        builder: Builder = "tensorrt",
        batches: tuple[int, ...] = (4,),
        onnx_sha256: str | None = None,
    ) -> Path:
        signature = read_signature(deploy / "model.onnx")
        assert signature.spec is not None
        engine = deploy / f"model.{name}.engine"
        engine.write_bytes(f"plan of {name}".encode())
        profiles = tuple(
            Profile(smallest=(1, 32, 32), usual=(1, 40, 56), largest=(n, 64, 80)) for n in batches
        )
        sidecar = EngineSidecar(
            builder=builder,
            builder_version="11.4.0.106",
            compute_capabilities=capabilities,
            gpu=None,
            cuda_driver=None,
            precision="fp32",
            layer_types={"float32": 3},
            read_from="network",
            profiles=profiles,
            engine_sha256=sha256_of(engine),
            engine_bytes=engine.stat().st_size,
            onnx="model.onnx",
            onnx_sha256=onnx_sha256 or sha256_of(deploy / "model.onnx"),
            command="srdeploy export",
            spec=signature.spec,
            signature=signature,
        )
        write_sidecar(engine, sidecar)
        return engine

    return add


def test_a_deploy_folder_becomes_a_model_that_tritons_schema_reads(
    tmp_path: Path, deploy: Path, spec: Spec
) -> None:
    model = write_repository(deploy, tmp_path / "repository")
    assert model == tmp_path / "repository" / "night"
    files = sorted(str(f.relative_to(model)) for f in model.rglob("*") if f.is_file())
    assert files == ["1/model.onnx", "config.pbtxt", "labels.txt"]
    assert (model / "1" / "model.onnx").read_bytes() == (deploy / "model.onnx").read_bytes()
    config = config_of(model)
    assert (config.name, config.backend, config.platform) == (
        "night",
        "onnxruntime",
        "onnxruntime_onnx",
    )
    assert config.default_model_filename == "model.onnx"
    assert config.version_policy.latest.num_versions == 1
    assert config.max_batch_size == 8
    (images,), (labels,) = config.input, config.output
    assert (images.name, images.data_type, list(images.dims)) == (
        "images",
        schema.TYPE_UINT8,
        [-1, -1, 3],
    )
    assert (labels.name, labels.data_type, list(labels.dims)) == (
        "labels",
        schema.TYPE_UINT8,
        [-1, -1],
    )
    assert labels.label_filename == "labels.txt"
    assert (model / "labels.txt").read_text().splitlines() == list(spec.classes)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1000
    (group,) = config.instance_group
    assert (group.kind, group.count, list(group.profile)) == (group.KIND_AUTO, 1, [])
    (warmup,) = config.model_warmup
    assert (warmup.batch_size, list(warmup.inputs["images"].dims)) == (1, [48, 64, 3])
    stored = json.loads(config.parameters["srdeploy.spec"].string_value)
    assert Spec.model_validate(stored) == spec
    assert config.parameters["srdeploy.output"].string_value == "labels"


def test_batching_device_and_instances_can_be_chosen(tmp_path: Path, deploy: Path) -> None:
    options: dict[str, Any] = {"largest_batch": 3, "queue_delay_us": 0, "instances": 2}
    config = config_of(write_repository(deploy, tmp_path / "r", "n", device="cpu", **options))
    assert (config.name, config.max_batch_size) == ("n", 3)
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 3]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    (group,) = config.instance_group
    assert (group.kind, group.count) == (group.KIND_CPU, 2)
    alone = config_of(write_repository(deploy, tmp_path / "r", "one", largest_batch=1))
    assert alone.max_batch_size == 1
    assert not alone.HasField("dynamic_batching")


def test_a_graph_that_fixes_its_batch_and_size_takes_part_in_no_batching(
    tmp_path: Path, deploy: Path
) -> None:
    model = onnx.load(str(deploy / "model.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        for axis, size in zip(value.type.tensor_type.shape.dim, (1, 48, 64), strict=False):
            axis.dim_value = size
    onnx.save(model, str(deploy / "model.onnx"))
    config = config_of(write_repository(deploy, tmp_path / "r"))
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [1, 48, 64, 3]
    assert list(config.output[0].dims) == [1, 48, 64]
    assert list(config.model_warmup[0].inputs["images"].dims) == [1, 48, 64, 3]
    assert not config.HasField("dynamic_batching")
    with pytest.raises(UserError, match="largest batch 4: the graph only takes batches of 1"):
        write_repository(deploy, tmp_path / "r", "other", largest_batch=4)


def test_normalised_floats_in_and_both_outputs_keep_their_layout(
    tmp_path: Path, tiny: Callable[[], Any]
) -> None:
    spec = Spec(
        classes=NAMES[:3],
        palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)),
        input=InputPolicy(smallest=(48, 64), usual=(48, 64), largest=(48, 64)),
    )
    (tmp_path / "both").mkdir()
    module = Deployable(tiny(), spec, input="float32", output="both")
    path = tmp_path / "both" / "model.onnx"
    export_onnx(module, spec, path, input="float32", output="both")
    config = config_of(write_repository(tmp_path / "both", tmp_path / "r"))
    assert (config.input[0].data_type, list(config.input[0].dims)) == (
        schema.TYPE_FP32,
        [3, 48, 64],
    )
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("labels", schema.TYPE_UINT8, [48, 64]),
        ("logits", schema.TYPE_FP32, [3, 48, 64]),
    ]
    assert list(config.model_warmup[0].inputs["images"].dims) == [3, 48, 64]


def test_awkward_class_names_keep_one_line_each_and_stand_whole_in_the_spec(
    tmp_path: Path, deploy: Path
) -> None:
    palette = tuple((n, n, n) for n in range(len(NAMES)))
    spec = Spec(classes=NAMES, palette=palette)
    model = onnx.load(str(deploy / "model.onnx"))
    next(p for p in model.metadata_props if p.key == "srdeploy.spec").value = spec.to_json()
    onnx.save(model, str(deploy / "model.onnx"))
    written = write_repository(deploy, tmp_path / "r")
    lines = (written / "labels.txt").read_text(encoding="utf-8").split("\n")
    assert lines == ["sky", 'a "quoted" \\ name', "two lines", "тротуар", "", ""]
    stored = json.loads(config_of(written).parameters["srdeploy.spec"].string_value)
    assert tuple(stored["classes"]) == NAMES


def test_an_engine_is_handed_over_with_its_profiles(
    tmp_path: Path, deploy: Path, add_engine: Callable[..., Path]
) -> None:
    engine = add_engine("sm89", batches=(1, 6))
    model = write_repository(deploy, tmp_path / "r")
    assert [path.name for path in (model / "1").iterdir()] == ["model.plan"]
    assert (model / "1" / "model.plan").read_bytes() == engine.read_bytes()
    config = config_of(model)
    assert (config.backend, config.platform, config.default_model_filename) == (
        "tensorrt",
        "tensorrt_plan",
        "model.plan",
    )
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (group.KIND_GPU, ["0", "1"])
    assert config.max_batch_size == 6
    assert list(config.model_warmup[0].inputs["images"].dims) == [40, 56, 3]
    built = config.parameters["srdeploy.engine.model_sm89"].string_value
    assert built == "TensorRT 11.4.0.106, compute capability 8.9"
    as_onnx = config_of(write_repository(deploy, tmp_path / "r", "onnx", kind="onnx"))
    assert as_onnx.platform == "onnxruntime_onnx"


def test_engines_of_several_gpus_go_by_compute_capability(
    tmp_path: Path, deploy: Path, add_engine: Callable[..., Path]
) -> None:
    add_engine("a", ("8.6",), batches=(8,))
    add_engine("b", ("8.9", "9.0"), batches=(2,))
    model = write_repository(deploy, tmp_path / "r")
    config = config_of(model)
    assert dict(config.cc_model_filenames) == {
        "8.6": "model_sm86.plan",
        "8.9": "model_sm89_sm90.plan",
        "9.0": "model_sm89_sm90.plan",
    }
    assert sorted(path.name for path in (model / "1").iterdir()) == [
        "model_sm86.plan",
        "model_sm89_sm90.plan",
    ]
    assert config.max_batch_size == 2
    assert config.default_model_filename == ""


@pytest.mark.parametrize(
    ("engines", "options", "expected"),
    [
        ([], {"kind": "engine"}, "has no engine for Triton (there is none)"),
        ([{"builder": "rtx"}], {"kind": "engine"}, "(Triton can't load those of TensorRT for RTX)"),
        ([{"onnx_sha256": "0" * 64}], {}, "was not built from this model.onnx"),
        ([{}, {}], {}, "are both for compute capability 8.9"),
        ([{}], {"device": "cpu"}, "only runs on GPUs"),
        ([{}], {"largest_batch": 5}, "largest batch 5: the engine's profiles take 4 at most"),
        ([], {"largest_batch": 0}, "largest batch 0: 1 or more is needed"),
        ([], {"instances": 0}, "instances 0: 1 or more is needed"),
        ([], {"queue_delay_us": -1}, "queue delay -1: 0 or more is needed"),
        ([], {"kind": "plan"}, "kind 'plan': one of auto, onnx, engine is needed"),
        ([], {"device": "tpu"}, "device 'tpu': one of auto, cpu, gpu is needed"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    tmp_path: Path,
    deploy: Path,
    add_engine: Callable[..., Path],
    engines: list[dict[str, Any]],
    options: dict[str, Any],
    expected: str,
) -> None:
    for index, engine in enumerate(engines):
        add_engine(f"e{index}", **engine)
    with pytest.raises(UserError, match=re.escape(expected)):
        write_repository(deploy, tmp_path / "r", **options)
    assert not (tmp_path / "r").exists()


def test_without_an_engine_for_triton_auto_takes_the_onnx_file(
    tmp_path: Path, deploy: Path, add_engine: Callable[..., Path]
) -> None:
    add_engine("rtx", builder="rtx")
    assert config_of(write_repository(deploy, tmp_path / "r")).backend == "onnxruntime"


@pytest.mark.parametrize(
    ("name", "fitting"),
    [("a/b", "a_b"), ("..", "segmentation"), (".hidden", "hidden"), ("ночь 1", "1"), ("", "segm")],
)
def test_names_that_no_address_can_hold_are_refused_with_one_that_can(
    tmp_path: Path, deploy: Path, name: str, fitting: str
) -> None:
    with pytest.raises(UserError, match=f"can't be a Triton model's name.*such as {fitting}"):
        write_repository(deploy, tmp_path / "r", name)
    assert not (tmp_path / "r").exists()


def test_our_own_model_is_replaced_whole_and_others_are_left_alone(
    tmp_path: Path, deploy: Path
) -> None:
    repository = tmp_path / "r"
    other = repository / "other"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text('name: "other"')
    model = write_repository(deploy, repository, largest_batch=2)
    write_repository(deploy, repository, largest_batch=16)
    assert config_of(model).max_batch_size == 16
    assert sorted(path.name for path in repository.iterdir()) == ["night", "other"]
    with pytest.raises(UserError, match="another tool's model is in it"):
        write_repository(deploy, repository, "other")
    assert (other / "config.pbtxt").read_text() == 'name: "other"'
    (model / "2").mkdir()
    with pytest.raises(UserError, match=r"night was not written only by srdeploy \(2 is in it\)"):
        write_repository(deploy, repository)
    assert (model / "2").is_dir()


def test_a_folder_that_is_a_model_or_no_deploy_folder_is_refused(
    tmp_path: Path, deploy: Path
) -> None:
    with pytest.raises(UserError, match="is itself a model"):
        write_repository(deploy, deploy)
    model = write_repository(deploy, tmp_path / "r")
    with pytest.raises(UserError, match="is itself a model"):
        write_repository(deploy, model)
    with pytest.raises(UserError, match=r"has no model\.onnx: give a deploy folder"):
        write_repository(tmp_path, tmp_path / "r")


@settings(max_examples=40)
@given(text=st.text(), number=st.integers(-(2**31), 2**31 - 1), sizes=st.lists(st.integers(1, 9)))
def test_any_text_and_number_comes_back_from_the_text_format(
    text: str, number: int, sizes: list[int]
) -> None:
    message = {
        "name": text,
        "max_batch_size": number,
        "dynamic_batching": {"preferred_batch_size": sizes, "preserve_ordering": True},
        "input": [{"name": text + "1", "data_type": Enum("TYPE_UINT8"), "dims": [-1]}],
        "parameters": [{"key": text, "value": {"string_value": "7" + text}}],
    }
    config = text_format.Parse(to_pbtxt(message), schema.ModelConfig())
    assert (config.name, config.max_batch_size) == (text, number)
    assert list(config.dynamic_batching.preferred_batch_size) == sizes
    assert config.dynamic_batching.preserve_ordering
    assert (config.input[0].name, list(config.input[0].dims)) == (text + "1", [-1])
    assert config.parameters[text].string_value == "7" + text
