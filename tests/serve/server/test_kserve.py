"""The protocol without HTTP, checked against Triton's client and with invalid requests."""

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from srdeploy import __version__
from srdeploy.imaging import Pixels
from srdeploy.serve.server.admission import BadRequest, NotFound, Refusal, TooLarge
from srdeploy.serve.server.config import ServerLimits
from srdeploy.serve.server.kserve import (
    InferRequest,
    check_version,
    format_infer,
    model_metadata,
    parse_infer,
    read_header_length,
    repository_index,
    server_metadata,
)
from srdeploy.serve.server.registry import ModelMetadata
from srdeploy.serve.server.strict_json import MAX_JSON_MIB
from srdeploy.spec import InputPolicy, Spec

triton = pytest.importorskip(
    "tritonclient.http", reason="no tritonclient here: the protocol was NOT compared with Triton's"
)

SPEC = Spec(
    classes=("field", "box"),
    palette=((40, 160, 60), (200, 60, 40)),
    input=InputPolicy(smallest=(2, 2), usual=(8, 8), largest=(64, 64)),
)
MODEL = ModelMetadata("night", "1", SPEC, "onnxruntime", "cpu", "float32", (None, None, None, 3))
LIMITS = ServerLimits(images=4, network_megapixels=0.01)

IMAGES = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9), st.just(3)),
    elements=st.integers(0, 255),
)
LABELS = st.sampled_from([1, 10, 11, 100, 101, 256]).flatmap(
    lambda classes: hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
        elements=st.integers(0, classes - 1),
    )
)


def parse(
    body: bytes, header_length: int | None = None, model: ModelMetadata = MODEL
) -> InferRequest:
    return parse_infer(body, header_length, model, LIMITS)


def triton_body(
    images: Pixels, binary: bool = True, outputs: Any = None, **more: Any
) -> tuple[bytes, int | None]:
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    body, length = triton.InferenceServerClient.generate_request_body([tensor], outputs, **more)
    return body, length


def plain(**changes: Any) -> dict[str, Any]:
    """A request in JSON: one image of 2 x 2, with changes at the paths that dots spell."""
    request: dict[str, Any] = {
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [7] * 12}]
    }
    for key, value in changes.items():
        if key in ("name", "datatype", "shape", "data"):
            request["inputs"][0][key] = value
        elif key == "tensor":
            request["inputs"][0] |= value
        else:
            request[key] = value
    return request


def joined(request: object, payload: bytes = b"") -> tuple[bytes, int]:
    text = json.dumps(request).encode()
    return text + payload, len(text)


def binary(size: Any = 12, **changes: Any) -> dict[str, Any]:
    request = plain(tensor={"parameters": {"binary_data_size": size}}, **changes)
    del request["inputs"][0]["data"]
    return request


# Round trips with Triton's client.


@settings(max_examples=40, deadline=None)
@given(IMAGES, st.booleans(), st.sampled_from([None, True, False]))
def test_what_tritons_client_sends_is_read(
    images: Pixels, in_binary: bool, out_binary: bool | None
) -> None:
    outputs = None
    if out_binary is not None:
        outputs = [triton.InferRequestedOutput("labels", binary_data=out_binary)]
    body, length = triton_body(images, in_binary, outputs, request_id="photo 1", timeout=250_000)
    request = parse(body, length)
    assert request.images.dtype == np.uint8
    np.testing.assert_array_equal(request.images, images)
    assert request.id == "photo 1"
    assert request.timeout_s == 0.25
    # Its default is binary.
    assert request.binary == (out_binary is not False)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.booleans(), st.none() | st.text(max_size=8))
def test_tritons_client_reads_the_answer(labels: Pixels, binary: bool, id: str | None) -> None:
    images = np.zeros((*labels.shape, 3), np.uint8)
    request = InferRequest(images, binary, id, None)
    body, headers = format_infer(request, replace(MODEL, version="3"), labels)
    length = headers.get("Inference-Header-Content-Length")
    assert (length is not None) == binary
    assert headers["Content-Type"] == ("application/octet-stream" if binary else "application/json")
    result = triton.InferenceServerClient.parse_response_body(
        body, header_length=int(length) if length else None
    )
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"]) == ("night", "3")
    assert answer.get("id") == id
    assert result.get_output("labels")["datatype"] == "UINT8"
    read = result.as_numpy("labels")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, labels)


def test_labels_that_do_not_lie_in_one_piece_are_written_in_order() -> None:
    labels = np.arange(48, dtype=np.uint8).reshape(2, 4, 6)[:, ::-1, ::2]
    for binary in (True, False):
        request = InferRequest(np.zeros((2, 4, 3, 3), np.uint8), binary, None, None)
        body, headers = format_infer(request, MODEL, labels)
        length = headers.get("Inference-Header-Content-Length")
        result = triton.InferenceServerClient.parse_response_body(
            body, header_length=int(length) if length else None
        )
        np.testing.assert_array_equal(result.as_numpy("labels"), labels)


# The protocol's rules.


@settings(max_examples=20, deadline=None)
@given(IMAGES)
def test_data_may_be_nested_or_flat(images: Pixels) -> None:
    shape = list(images.shape)
    for data in (images.tolist(), images.ravel().tolist()):
        body, _ = joined(plain(shape=shape, data=data))
        np.testing.assert_array_equal(parse(body).images, images)


def test_binary_images_are_the_bodys_own_memory() -> None:
    body, length = triton_body(np.zeros((1, 2, 2, 3), np.uint8))
    received = bytearray(body)
    for view in (received, memoryview(received)):
        images = parse_infer(view, length, MODEL, LIMITS).images
        assert np.shares_memory(images, np.frombuffer(received, np.uint8))


def test_answers_are_json_unless_binary_was_asked_for() -> None:
    wanted = {"name": "labels", "parameters": {"binary_data": False}}
    for request, is_binary in (
        (plain(), False),
        (plain(outputs=[]), False),
        (plain(outputs=[{"name": "labels"}]), False),
        (plain(parameters={"binary_data_output": True}), True),
        (plain(parameters={"binary_data_output": True}, outputs=[{"name": "labels"}]), True),
        (plain(parameters={"binary_data_output": True}, outputs=[wanted]), False),
        (plain(outputs=[{"name": "labels", "parameters": {"binary_data": True}}]), True),
    ):
        assert parse(joined(request)[0]).binary == is_binary


def test_what_may_be_left_out_may_be_null_and_unknown_parameters_are_ignored() -> None:
    request = plain(
        id=None,
        outputs=None,
        model_name="night",
        model_version="1",
        tensor={"parameters": None},
        parameters={"priority": 2, "own": "value", "sequence_id": 0, "timeout": 0},
    )
    read = parse(joined(request)[0])
    assert (read.id, read.timeout_s, read.binary) == (None, None, False)


def test_a_length_of_the_whole_body_means_that_no_binary_data_follow() -> None:
    body, length = joined(plain())
    np.testing.assert_array_equal(parse(body, length).images, parse(body).images)


def test_the_server_says_which_extensions_it_has() -> None:
    metadata = server_metadata()
    assert metadata["name"] == "srdeploy"
    assert metadata["version"] == __version__
    assert "binary_tensor_data" in metadata["extensions"]


def test_a_models_metadata_hold_its_tensors_and_its_spec() -> None:
    metadata = json.loads(json.dumps(model_metadata(MODEL)))
    assert metadata["name"] == "night"
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert metadata["outputs"] == [{"name": "labels", "datatype": "UINT8", "shape": [-1, -1, -1]}]
    assert Spec.model_validate_json(metadata["parameters"]["srdeploy.spec"]) == SPEC
    fixed = model_metadata(replace(MODEL, input_shape=(None, 32, 48, 3)))
    assert fixed["inputs"][0]["shape"] == [-1, 32, 48, 3]
    assert fixed["outputs"][0]["shape"] == [-1, 32, 48]


def test_the_index_lists_each_model_as_triton_does() -> None:
    assert repository_index([MODEL, replace(MODEL, name="day", version="2")]) == [
        {"name": "night", "version": "1", "state": "READY", "reason": ""},
        {"name": "day", "version": "2", "state": "READY", "reason": ""},
    ]


def test_only_the_loaded_version_is_there() -> None:
    check_version(MODEL, "1")
    with pytest.raises(NotFound, match='model night has no version "2": 1 is loaded'):
        check_version(MODEL, "2")
    with pytest.raises(NotFound, match='no version "01"'):
        parse(joined(plain(model_version="01"))[0])


@pytest.mark.parametrize("text", ["", "-1", "1_0", " 5", "5.0", "\u0665", "9" * 30, "1e3"])
def test_a_header_length_is_a_plain_number(text: str) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length: .* number of bytes"):
        read_header_length(text)
    assert read_header_length("512") == 512
    assert read_header_length(None) is None


# Refusals.

SHARED = {"shared_memory_region": "r", "shared_memory_byte_size": 12}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "the request's JSON is an array of 0: an object is needed"),
        ("text", 'the request\'s JSON is "text": an object is needed'),
        ({}, "inputs is missing: an array is needed"),
        ({"inputs": {}}, "inputs: an object was sent, an array is needed"),
        ({"inputs": []}, 'inputs has 0 tensors, one is needed: "images"'),
        ({"inputs": [1]}, "inputs[0]: 1 was sent, an object is needed"),
        ({"inputs": [{}, {}]}, "inputs has 2 tensors"),
        (plain(name="x"), 'inputs[0].name: "x" was sent, "images" is needed'),
        (plain(name=None), "inputs[0].name is missing: a string is needed"),
        (plain(name=3), "inputs[0].name: 3 was sent, a string is needed"),
        (plain(datatype="FP32"), 'inputs[0].datatype: "FP32" was sent, "UINT8" is needed'),
        (plain(shape=[2, 2, 3]), "inputs[0].shape has 3 axes, 4 are needed: [N, H, W, 3]"),
        (plain(shape=[1, 3, 2, 2]), "inputs[0].shape[3]: C is 2, 3 is needed: RGB"),
        (plain(shape=[1, 2, 2, 4]), "inputs[0].shape[3]: C is 4, 3 is needed: RGB"),
        (plain(shape=[0, 2, 2, 3]), "inputs[0].shape[0]: N is 0, a whole number from 1 on"),
        (plain(shape=[1, -2, -2, 3]), "inputs[0].shape[1]: H is -2, a whole number from 1 on"),
        (plain(shape=[1, 2.0, 2, 3]), "inputs[0].shape[1]: H is 2.0, a whole number"),
        (plain(shape=[1, "2", 2, 3]), 'inputs[0].shape[1]: H is "2", a whole number'),
        (plain(shape=[True, 2, 2, 3]), "inputs[0].shape[0]: N is true, a whole number"),
        (plain(shape=[1, 1, 2, 3]), "inputs[0].shape: 1 x 2 (height x width) are too small"),
        (plain(data=[7] * 11), "inputs[0].data has 11 values, but shape [1, 2, 2, 3] needs 12"),
        (plain(data=[]), "inputs[0].data has 0 values"),
        (plain(data=[256] + [7] * 11), "inputs[0].data holds 256: whole numbers 0..255"),
        (plain(data=[-1] + [7] * 11), "inputs[0].data holds -1: whole numbers 0..255"),
        (plain(data=[10**30] + [7] * 11), f"inputs[0].data holds {10**30}: whole numbers"),
        (plain(data=[7] * 11 + [1.0]), "inputs[0].data holds 1.0: whole numbers 0..255"),
        (plain(data=[7] * 11 + [True]), "inputs[0].data holds true: whole numbers 0..255"),
        (plain(data=[7] * 11 + ["7"]), 'inputs[0].data holds "7": whole numbers 0..255'),
        (plain(data=[7] * 11 + [None]), "inputs[0].data holds null: whole numbers 0..255"),
        (plain(data=[7] * 11 + [[7]]), "inputs[0].data holds an array of 1: whole numbers"),
        (plain(data=[[7] * 12]), "inputs[0].data has an array of 12 where shape [1, 2, 2, 3]"),
        (plain(data=[[[[7] * 3] * 2, [[7] * 3, [7] * 2]]]), "array of 2 where shape [1, 2, 2, 3]"),
        (plain(data=[[[[7] * 3] * 2, 7]]), "inputs[0].data is not nested down to W everywhere"),
        (plain(data=[[[7, 7]] * 2]), "inputs[0].data is not nested down to C everywhere"),
        (plain(data="AAAA"), 'inputs[0].data: "AAAA" was sent, an array is needed'),
        (plain(data=None), "inputs[0] has neither data nor parameters.binary_data_size"),
        (
            plain(tensor={"parameters": SHARED}),
            "inputs[0].parameters: shared memory is not offered",
        ),
        (plain(tensor={"parameters": {"binary_data_size": 12}}), "inputs[0] has both data and"),
        (binary(), "binary_data_size is given, but the header Inference-Header-Content-Length"),
        (plain(id=5), "id: 5 was sent, a string is needed"),
        (plain(parameters=[]), "parameters: an array of 0 was sent, an object is needed"),
        (plain(parameters={"timeout": -1}), "parameters.timeout: -1 was sent, microseconds"),
        (plain(parameters={"timeout": 10**400}), "parameters.timeout: 1000"),
        (plain(parameters={"timeout": 0.5}), "parameters.timeout: 0.5 was sent, a whole number"),
        (plain(parameters={"binary_data_output": 1}), "parameters.binary_data_output: 1 was sent"),
        (plain(parameters={"sequence_id": 4}), "parameters.sequence_id: the model keeps nothing"),
        (plain(parameters={"sequence_start": True}), "parameters.sequence_start: the model"),
        (plain(outputs=["labels"]), 'outputs[0]: "labels" was sent, an object is needed'),
        (plain(outputs=[{"name": "logits"}]), 'outputs[0].name: "logits" was requested, the only'),
        (plain(outputs=[{"name": "labels"}] * 2), 'outputs[1].name: "labels" is requested twice'),
        (
            plain(outputs=[{"name": "labels", "parameters": {"classification": 1}}]),
            "outputs[0].parameters.classification: the model gives classes without scores",
        ),
        (plain(outputs=[{"name": "labels", "parameters": SHARED}]), "shared memory is not offered"),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_an_invalid_request_is_refused_naming_the_field(request_: Any, message: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(joined(request_)[0])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "the request's JSON is broken at character 0: Expecting value"),
        (b'{"inputs": [}', "the request's JSON is broken at character 12"),
        (b'{"id": "\xff"}', "the request's JSON is not UTF-8 (byte 8): where binary data follow"),
        ('{"id": "1"}'.encode("utf-16"), "the request's JSON is not UTF-8 (byte 0)"),
        ('{"id": "1"}'.encode("utf-16-le"), "the request's JSON is broken at character 1"),
        (b'\xef\xbb\xbf{"id": "1"}', "the request's JSON is broken at character 0"),
        (b'{"id": NaN}', "the request's JSON has NaN, which is not JSON"),
        (b'{"inputs": [-Infinity]}', "the request's JSON has -Infinity, which is not JSON"),
        (b"[" * 100_000, "the request's JSON is nested too deeply"),
        (b'{"a":' * 100_000, "the request's JSON is nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}", "the request's JSON has a number of too many digits"),
        (b'{"id": "1", "id": "2"}', 'the request\'s JSON has "id" twice in one object'),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_not_plain_json_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(text)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("request_", "payload", "message"),
    [
        (binary(12), b"7" * 11, "binary_data_size is 12, but 11 bytes follow the JSON"),
        (binary(12), b"7" * 13, "binary_data_size is 12, but 13 bytes follow the JSON"),
        (binary(12), b"", "binary_data_size is 12, but 0 bytes follow the JSON"),
        (binary(13), b"7" * 13, "is 13, but a UINT8 tensor of shape [1, 2, 2, 3] has 12 bytes"),
        (binary(-12), b"7" * 12, "is -12, but a UINT8 tensor"),
        (binary(10**40), b"7" * 12, "000, but a UINT8 tensor"),
        (binary(12.0), b"7" * 12, "binary_data_size: 12.0 was sent, a whole number is needed"),
        (binary("12"), b"7" * 12, 'binary_data_size: "12" was sent, a whole number is needed'),
        (plain(), b"7" * 12, "12 bytes follow the JSON, but inputs[0] has no parameters.binary"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_binary_data_must_have_the_size_that_shape_and_parameter_say(
    request_: Any, payload: bytes, message: str
) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(*joined(request_, payload))
    assert message in str(refused.value)


@pytest.mark.parametrize("length", [0, -1, 10**6, 10**30])
def test_the_json_must_end_within_the_body(length: int) -> None:
    with pytest.raises(BadRequest, match="Inference-Header-Content-Length is .* the body has"):
        parse(joined(plain())[0], length)


def test_axes_that_the_model_fixes_must_match() -> None:
    model = replace(MODEL, input_shape=(1, 32, 48, 3))
    for shape, message in (
        ([2, 32, 48, 3], "inputs[0].shape[0]: N is 2, 1 is needed by model night"),
        ([1, 48, 32, 3], "inputs[0].shape[1]: H is 48, 32 is needed by model night"),
        ([1, 32, 47, 3], "inputs[0].shape[2]: W is 47, 48 is needed by model night"),
    ):
        with pytest.raises(BadRequest) as refused:
            parse(joined(plain(shape=shape))[0], model=model)
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([5, 2, 2, 3], "inputs[0].shape[0]: 5 images in one request, at most 4 are taken"),
        ([1, 101, 100, 3], "101 x 100 (height x width) are more than 0.01 million pixels"),
        ([1, 10**40, 10**40, 3], "million pixels"),
        ([2**64, 2, 2, 3], "18446744073709551616 images"),
    ],
)
def test_more_than_the_limits_is_too_large_whatever_the_body_holds(
    shape: list[int], message: str
) -> None:
    with pytest.raises(TooLarge) as refused:
        parse(*joined(binary(12, shape=shape), b"7" * 12))
    assert message in str(refused.value)


def test_a_shape_alone_takes_no_memory() -> None:
    limits = ServerLimits(images=1000, network_megapixels=1000)
    body, length = joined(binary(10**9 * 3, shape=[1, 10**5, 10**4, 3]), b"7")
    data, _ = joined(plain(shape=[1000, 10**5, 10**4, 3]))
    tracemalloc.start()
    with pytest.raises(BadRequest, match="binary_data_size is 3000000000, but 1 bytes follow"):
        parse_infer(body, length, MODEL, limits)
    with pytest.raises(BadRequest, match="12 values"):
        parse_infer(data, None, MODEL, limits)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_long_json_is_pointed_to_binary_data() -> None:
    with pytest.raises(TooLarge, match="send the tensor as binary data"):
        parse(b" " * (MAX_JSON_MIB * 2**20 + 1))


# Random requests.

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**4000, 1e308, 12.0]),
    st.floats(allow_nan=True),
    st.text(max_size=6),
    st.sampled_from(["\ud800", "\n\r\0", "x" * 500, "labels", "images"]),
    st.lists(st.integers(-2, 300) | st.booleans(), max_size=13),
    st.just({}),
    st.just([[[]]]),
    st.just({"shared_memory_region": "r"}),
)


def replaced(value: Any, at: int, odd: Any) -> tuple[Any, int]:
    """The value with the part that is `at` steps ahead in depth first order replaced."""
    if at == 0:
        return odd, -1
    at -= 1
    if isinstance(value, dict | list):
        keys: Any = list(value) if isinstance(value, dict) else range(len(value))
        copy: Any = value.copy()
        for key in keys:
            if at >= 0:
                copy[key], at = replaced(value[key], at, odd)
        return copy, at
    return value, at


def answered_or_refused(body: bytes, length: int | None) -> None:
    """One of both, whatever is sent; and a refusal is one line that any encoding can carry."""
    try:
        request = parse(body, length)
    except Refusal as refusal:
        line = str(refusal)
        assert line.isascii()
        assert "\n" not in line
        assert len(line) < 400
    else:
        assert request.images.dtype == np.uint8
        assert request.images.ndim == 4
        labels = np.zeros(request.images.shape[:3], np.uint8)
        answer, headers = format_infer(request, MODEL, labels)
        length = int(headers.get("Inference-Header-Content-Length", len(answer)))
        assert json.loads(answer[:length]).get("id") == request.id


@settings(max_examples=250, deadline=None)
@given(st.booleans(), st.lists(st.tuples(st.integers(0, 26), ODD), min_size=1, max_size=3))
def test_whatever_stands_in_a_field_is_answered_or_refused(
    in_binary: bool, changes: list[tuple[int, Any]]
) -> None:
    whole = {
        "id": "1",
        "parameters": {"timeout": 5, "binary_data_output": True},
        "outputs": [{"name": "labels", "parameters": {"binary_data": False}}],
    }
    request: Any = binary(**whole) if in_binary else plain(**whole)
    for at, odd in changes:
        request, _ = replaced(request, at, odd)
    body, length = joined(request, b"7" * 12 if in_binary else b"")
    answered_or_refused(body, length if in_binary else None)


@settings(max_examples=250, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(
            st.integers(0, 250),
            st.integers(0, 2),
            st.sampled_from([*b'[]{}",:-.0123456789eE\\ut ']).map(lambda byte: bytes([byte]))
            | st.binary(max_size=5),
        ),
        max_size=3,
    ),
    st.sampled_from([0, 0, 0, None, -1, 1, 12, 10**9]),
)
def test_whatever_bytes_come_are_answered_or_refused(
    in_binary: bool, changes: list[tuple[int, int, bytes]], shift: int | None
) -> None:
    body, length = triton_body(np.full((1, 2, 2, 3), 7, np.uint8), in_binary, request_id="1")
    for at, dropped, added in changes:
        body = body[:at] + added + body[at + dropped :]
    answered_or_refused(body, None if shift is None else (length or len(body)) + shift)


@settings(max_examples=150, deadline=None)
@given(
    IMAGES,
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 255) | st.lists(st.integers(0, 255)) | ODD),
        max_size=2,
    ),
)
def test_data_that_are_taken_are_what_numpy_reads(
    images: Pixels, changes: list[tuple[int, Any]]
) -> None:
    shape, data = list(images.shape), images.tolist()
    for at, odd in changes:
        data, _ = replaced(data, at, odd)
    try:
        read = parse(joined(plain(shape=shape, data=data))[0]).images
    except Refusal:
        return
    numbers = np.array(data)
    assert numbers.dtype == np.int64
    np.testing.assert_array_equal(read, numbers.reshape(shape))
