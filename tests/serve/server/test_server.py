"""The server as clients meet it: a process, its port, and graphs whose labels are known."""

import http.client
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from srdeploy.imaging import Pixels
from srdeploy.spec import Spec
from tests.serve.server.live import LiveServer

MakeGraph = Callable[..., Path]
FAST = ("--set", "sessions=2", "--set", "threads=1", "--set", "max_batch=2", "--set", "drain=0.1")
COLOURS = np.array([[40, 160, 60], [200, 60, 40], [40, 70, 200]], np.uint8)


def photo(height: int = 40, width: int = 48, seed: int = 0) -> tuple[Pixels, bytes]:
    """Labels uint8 [H, W], and a photo of their colours as PNG."""
    labels = np.random.default_rng(seed).integers(0, 3, (height, width)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(COLOURS[labels]).save(buffer, "PNG")
    return labels, buffer.getvalue()


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, tiny_spec: Spec) -> Path:
    """A folder with night.onnx, and day.onnx, which takes one size."""
    import onnx

    from tests.conftest import colour_model

    folder = tmp_path_factory.mktemp("graphs")
    for name, size in (("night", ("N", "H", "W")), ("day", ("N", "H", "W"))):
        model = colour_model("uint8", "labels", size, onnx.TensorProto.UINT8, 1, 0)
        model.metadata_props.add(key="srdeploy.spec", value=tiny_spec.to_json())
        onnx.save(model, str(folder / f"{name}.onnx"))
    return folder


@pytest.fixture(scope="module")
def server(graphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    limits = ("--set", "max_body_mib=1", "--set", "max_megapixels=0.05", "--set", "max_images=3")
    live = LiveServer(
        tmp_path_factory.mktemp("live"),
        graphs / "night.onnx",
        f"sun={graphs / 'day.onnx'}",
        *FAST,
        *limits,
    )
    yield live
    live.kill()


@pytest.fixture(scope="module")
def tritonclient() -> Any:
    reason = "no tritonclient here: Triton's client was NOT tried on the server"
    return pytest.importorskip("tritonclient.http", reason=reason)


@pytest.fixture(scope="module")
def triton(server: LiveServer, tritonclient: Any) -> Iterator[Any]:
    with tritonclient.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def test_tritons_client_sees_a_live_and_ready_server(triton: Any) -> None:
    assert triton.is_server_live()
    assert triton.is_server_ready()
    assert triton.is_model_ready("night")
    assert triton.is_model_ready("sun", "1")
    assert not triton.is_model_ready("moon")
    assert triton.get_server_metadata()["name"] == "srdeploy"


def test_tritons_client_reads_the_models_metadata(triton: Any, tiny_spec: Spec) -> None:
    metadata = triton.get_model_metadata("night")
    assert metadata["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert metadata["outputs"] == [{"name": "labels", "datatype": "UINT8", "shape": [-1, -1, -1]}]
    assert Spec.model_validate_json(metadata["parameters"]["srdeploy.spec"]) == tiny_spec
    assert [model["name"] for model in triton.get_model_repository_index()] == ["night", "sun"]


def test_tritons_client_gets_the_labels_that_predict_writes(
    triton: Any,
    tritonclient: Any,
    graphs: Path,
    tmp_path: Path,
    srdeploy: Callable[..., tuple[int, str, str]],
) -> None:
    labels, content = photo()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(content)
    images = np.array(Image.open(io.BytesIO(content)))[None]
    tensor = tritonclient.InferInput("images", images.shape, "UINT8")
    tensor.set_data_from_numpy(images, binary_data=True)
    wanted = tritonclient.InferRequestedOutput("labels", binary_data=True)
    answer = triton.infer("night", [tensor], outputs=[wanted], request_id="seven")
    code, _, _ = srdeploy(
        "predict", graphs / "night.onnx", tmp_path / "photos", "--out", tmp_path / "masks"
    )
    assert code == 0
    predicted = np.array(Image.open(tmp_path / "masks" / "a.png"))
    assert answer.as_numpy("labels").tobytes() == predicted.tobytes() == labels.tobytes()
    assert answer.get_response()["id"] == "seven"


def test_a_batch_of_tensors_is_answered_whole(triton: Any, tritonclient: Any) -> None:
    labels = np.stack([photo(seed=seed)[0] for seed in range(3)])
    images = COLOURS[labels]
    tensor = tritonclient.InferInput("images", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    np.testing.assert_array_equal(triton.infer("sun", [tensor]).as_numpy("labels"), labels)


def test_tensors_may_be_plain_json(server: LiveServer) -> None:
    labels, _ = photo(32, 32)
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 32, 32, 3]}
    body = {"inputs": [tensor | {"data": COLOURS[labels].ravel().tolist()}]}
    (output,) = server.post("/v2/models/night/infer", json=body).json()["outputs"]
    assert output["data"] == labels.ravel().tolist()


def test_tritons_client_reads_statistics(triton: Any, tritonclient: Any) -> None:
    (before,) = triton.get_inference_statistics("night")["model_stats"]
    images = COLOURS[photo()[0]][None]
    tensor = tritonclient.InferInput("images", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    triton.infer("night", [tensor])
    (after,) = triton.get_inference_statistics("night")["model_stats"]
    success = [stats["inference_stats"]["success"] for stats in (before, after)]
    assert success[1]["count"] == success[0]["count"] + 1
    assert success[1]["ns"] > success[0]["ns"]


def test_statistics_count_failures(server: LiveServer, triton: Any) -> None:
    counts = []
    for content in (b"", b"no image"):  # the first is refused before it reaches the model
        server.post("/v1/segment", content=content)
        (stats,) = triton.get_inference_statistics("night")["model_stats"]
        counts.append(stats["inference_stats"]["fail"]["count"])
    assert counts[1] == counts[0] + 1


@pytest.mark.wheel
def test_a_mask_is_the_file_that_predict_writes(
    server: LiveServer, graphs: Path, tmp_path: Path, srdeploy: Callable[..., tuple[int, str, str]]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(photo()[1])
    srdeploy("predict", graphs / "night.onnx", tmp_path / "photos", "--out", tmp_path / "masks")
    answer = server.post("/v1/segment", content=photo()[1])
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == (tmp_path / "masks" / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("text/html, application/json;q=0.9", "application/json"),
        ("application/zip", "application/zip"),
    ],
)
def test_the_accept_header_chooses_the_answer(server: LiveServer, accept: str, kind: str) -> None:
    answer = server.post("/v1/segment", content=photo()[1], headers={"Accept": accept})
    assert answer.headers["content-type"] == kind


def test_json_lists_areas_and_run_lengths(server: LiveServer) -> None:
    labels, content = photo()
    answer = server.post("/v1/segment?output=json&regions=rle&model=sun", content=content).json()
    assert (answer["model"], answer["version"]) == ("sun", "1")
    (image,) = answer["images"]
    assert (image["width"], image["height"], image["ignored_pixels"]) == (48, 40, 0)
    rebuilt = np.full(labels.shape, 255, np.uint8)
    for one in image["classes"]:
        assert one["pixels"] == (labels == one["id"]).sum()
        values = np.arange(len(one["rle"]["counts"])) % 2
        mask = np.repeat(values, one["rle"]["counts"]).reshape(labels.shape[::-1]).T
        rebuilt[mask == 1] = one["id"]
    np.testing.assert_array_equal(rebuilt, labels)
    assert set(answer["timing_ms"]) == {"decode", "wait", "compute", "encode", "total", "batch"}


def test_several_photos_come_back_as_a_zip(server: LiveServer) -> None:
    files = [("image", (name, photo(seed=i)[1])) for i, name in enumerate(("../a.png", "b.png"))]
    answer = server.post("/v1/segment", files=files)
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["a.png", "b.png"]
        for i, name in enumerate(archive.namelist()):
            mask = np.array(Image.open(io.BytesIO(archive.read(name))))
            np.testing.assert_array_equal(mask, photo(seed=i)[0])


def test_several_photos_come_back_in_order_as_json(server: LiveServer) -> None:
    files = [("image", (f"{i}.png", photo(seed=i)[1])) for i in range(3)]
    answer = server.post("/v1/segment?output=json", files=files).json()
    assert [image["name"] for image in answer["images"]] == ["0.png", "1.png", "2.png"]
    for i, image in enumerate(answer["images"]):
        areas = {one["id"]: one["pixels"] for one in image["classes"]}
        assert areas == dict(enumerate(np.bincount(photo(seed=i)[0].ravel()).tolist()))


def big_header(width: int, height: int) -> bytes:
    """A PNG that claims a size; its pixels are missing."""
    content = bytearray(photo()[1])
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("path", "options", "status", "words"),
    [
        ("/v1/segment", {"content": b""}, 400, "the body is empty"),
        ("/v1/segment", {"content": b"no image"}, 400, "not a readable image"),
        ("/v1/segment", {"content": photo()[1][:200]}, 400, "not a readable image"),
        ("/v1/segment", {"content": photo(8, 8)[1]}, 400, "too small"),
        ("/v1/segment", {"content": big_header(60_000, 60_000)}, 413, "megapixels"),
        ("/v1/segment", {"content": b"x" * 1_100_000}, 413, "larger than 1 MiB"),
        ("/v1/segment?model=moon", {"content": photo()[1]}, 404, "no model 'moon'.*night, sun"),
        ("/v1/segment?output=video", {"content": photo()[1]}, 400, "output: input should be"),
        ("/v1/segment?opacity=7", {"content": photo()[1]}, 400, "opacity: "),
        ("/v1/segment?timeout_ms=0", {"content": photo()[1]}, 400, "timeout_ms: "),
        ("/v1/segment", {"content": b"{}", "headers": {"Content-Type": "text/csv"}}, 415, "text/"),
        (
            "/v1/segment",
            {"content": photo()[1], "headers": {"Content-Encoding": "gzip"}},
            415,
            "Content-Encoding gzip",
        ),
        (
            "/v1/segment",
            {"content": photo()[1], "headers": {"Accept": "video/mp4"}},
            400,
            "Accept: video/mp4",
        ),
        ("/v1/segment", {"data": {"image": "text"}, "files": {}}, 400, "not a readable image"),
        ("/v1/segment", {"files": [("i", ("a", photo()[1]))] * 4}, 413, "3 images|3 are allowed"),
        (
            "/v1/segment",
            {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
            400,
            "boundary",
        ),
        ("/v2/models/night/infer", {"content": b"{"}, 400, "JSON"),
        ("/v2/models/night/versions/9/infer", {"content": b"{}"}, 404, "no version"),
        ("/v2/repository/models/night/load", {"json": {"parameters": {"x": 1}}}, 400, "load takes"),
        ("/v2/repository/models/night/load", {"content": b"x" * 70_000}, 413, "none is needed"),
        ("/v3", {"content": b""}, 404, "no such address: /v3"),
        ("/v1/models", {"content": b""}, 405, "does not take POST"),
    ],
)
def test_what_cannot_be_served_gets_one_line(
    server: LiveServer, path: str, options: dict[str, Any], status: int, words: str
) -> None:
    answer = server.post(path, **options)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert re.search(words, answer.json()["error"]), answer.text
    assert "\n" not in answer.json()["error"]


def test_one_bad_photo_is_named_among_several(server: LiveServer) -> None:
    files = [("image", ("good.png", photo()[1])), ("image", ("bad.png", b"oops"))]
    answer = server.post("/v1/segment", files=files)
    assert answer.status_code == 400
    assert "image 2 ('bad.png')" in answer.json()["error"]


def test_bodies_without_a_length_are_limited_too(server: LiveServer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    answer = server.post("/v1/segment", content=endless())
    assert answer.status_code == 413


def test_requests_are_known_by_their_id(server: LiveServer) -> None:
    given = server.post("/v1/segment", content=photo()[1], headers={"X-Request-Id": "walk-7"})
    assert given.headers["x-request-id"] == "walk-7"
    assert "compute;dur=" in given.headers["server-timing"]
    forged = server.get("/v2", headers={"X-Request-Id": "a b{}"})
    assert re.fullmatch("[0-9a-f]{32}", forged.headers["x-request-id"])
    (event,) = [event for event in server.events if event.get("request_id") == "walk-7"]
    assert (event["status"], event["model"], event["images"]) == (200, "night", 1)
    assert event["ms"] >= event["compute_ms"]


def test_metrics_count_requests_and_their_steps(server: LiveServer) -> None:
    names = (
        r'srdeploy_requests_total\{model="night",route="/v1/segment",status="200"\}',
        r'srdeploy_step_seconds_count\{model="night",step="compute"\}',
        r'srdeploy_refused_total\{reason="bad request"\}',
    )
    before = [server.metric(name) for name in names]
    server.post("/v1/segment", content=photo()[1])
    server.post("/v1/segment", content=b"no")
    after = [server.metric(name) for name in names]
    assert after == [count + 1 for count in before]
    assert server.metric("srdeploy_ready ") == 1
    assert server.metric("srdeploy_waiting_requests") == 0


@pytest.mark.wheel
def test_the_api_is_described_without_other_hosts(server: LiveServer) -> None:
    docs = server.get("/docs").text
    assert not re.search(r"https?://", re.sub(r"https?://(www\.)?w3\.org", "", docs))
    for path in re.findall(r'(?:src|href)="([^"]+)"', docs):
        assert server.get(path).status_code == 200
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/segment", "/v2/models/{name}/infer", "/v2/health/ready"} <= set(paths)


@pytest.mark.wheel
def test_the_page_has_samples_and_models_to_show(server: LiveServer) -> None:
    page = server.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    facts = server.get("/v1/models").json()
    assert [model["name"] for model in facts["models"]] == ["night", "sun"]
    assert facts["models"][0]["classes"][1] == {"id": 1, "name": "box", "colour": [200, 60, 40]}
    assert facts["models"][0]["plan"]["shared"] == {"sessions": 2, "threads": 1}
    sample = server.get(facts["samples"][0]["url"])
    assert Image.open(io.BytesIO(sample.content)).format == "JPEG"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example:80"}, 400),
        ({"Host": "[::1"}, 400),
        ({"Host": ""}, 400),
        ({"Host": "localhost:1"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
    ],
)
def test_pages_of_other_sites_cannot_use_it(
    server: LiveServer, headers: dict[str, str], status: int
) -> None:
    answer = server.post("/v1/segment", content=photo()[1], headers=headers)
    assert answer.status_code == status


def test_nothing_that_a_client_sends_names_a_file_or_an_address(server: LiveServer) -> None:
    address = server.url.removeprefix("http://")
    for path in ("/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd"):
        connection = http.client.HTTPConnection(address)  # sends the path as it is
        connection.request("GET", path)
        assert connection.getresponse().status == 404
        connection.close()
    for text in ("file:///etc/passwd", "http://127.0.0.1:1/a.png", "/etc/hostname"):
        assert server.post("/v1/segment", content=text.encode()).status_code == 400


def test_reloading_keeps_the_model_and_counts_its_version(server: LiveServer, triton: Any) -> None:
    before = int(triton.get_model_metadata("sun")["versions"][0])
    triton.load_model("sun")
    assert triton.get_model_metadata("sun")["versions"] == [str(before + 1)]
    answer = server.post("/v1/segment?model=sun&output=json", content=photo()[1])
    assert answer.json()["version"] == str(before + 1)


def test_a_reload_that_fails_leaves_the_old_model(
    server: LiveServer, graphs: Path, triton: Any
) -> None:
    file = graphs / "day.onnx"
    content = file.read_bytes()
    file.write_bytes(content[:-200])
    try:
        answer = server.post("/v2/repository/models/sun/load")
    finally:
        file.write_bytes(content)
    assert answer.status_code == 400
    assert "ONNX" in answer.json()["error"]
    assert server.post("/v1/segment?model=sun", content=photo()[1]).status_code == 200


def test_the_log_is_one_json_object_a_line(server: LiveServer) -> None:
    for line in server.log_file.read_text().splitlines():
        assert {"time", "level", "message"} <= set(json.loads(line))
