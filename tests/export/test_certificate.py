"""The certificate names what is wrong, and passes where nothing is."""

import json
from pathlib import Path

import onnx
import pytest
from torch import nn

import srdeploy.export.certificate as certificate_module
from srdeploy.deployable import Deployable
from srdeploy.errors import UserError
from srdeploy.export.certificate import Certificate, Line, certify_files
from srdeploy.export.to_onnx import export_onnx
from srdeploy.spec import Spec


def lines_of(certificate: Certificate) -> dict[str, Line]:
    return {line.name: line for line in certificate.lines}


def test_an_exit_left_in_fails_and_its_first_node_is_named(
    tiny_file: Path, tiny_file_with_exit: Path
) -> None:
    certificate = certify_files(tiny_file, tiny_file_with_exit)
    lines = lines_of(certificate)
    assert not certificate.passed
    assert lines["identity"].passed is False
    assert lines["survivors"].passed is False
    assert lines["oracles"].passed is True
    survivors = lines["survivors"].figures["first"]
    assert survivors[0].startswith("node 'regulated/exits/")
    assert f"first {survivors[0]}" in lines["survivors"].detail
    assert "output 'exit'" in survivors
    assert not any("network/" in name for name in survivors)


def test_one_changed_attribute_fails_and_is_named(tmp_path: Path, tiny_file: Path) -> None:
    model = onnx.load(str(tiny_file))
    node = next(n for n in model.graph.node if n.name == "network/body/0/Conv")
    next(a for a in node.attribute if a.name == "dilations").ints[:] = [2, 2]
    next(a for a in node.attribute if a.name == "pads").ints[:] = [2, 2, 2, 2]
    onnx.save(model, str(tmp_path / "b.onnx"))
    lines = lines_of(certify_files(tiny_file, tmp_path / "b.onnx"))
    assert lines["identity"].passed is False
    expected = "node 'network/body/0/Conv' (Conv): attribute dilations [1, 1] became [2, 2]"
    assert lines["identity"].detail == expected
    assert lines["survivors"].passed is True
    assert lines["oracles"].passed is True


def test_equal_graphs_with_renamed_values_and_other_weights_pass(
    tmp_path: Path, tiny_file: Path
) -> None:
    model = onnx.load(str(tiny_file))
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        node.name = f"n{len(node.name)}"
        node.input[:] = [n if n in kept or not n else f"renamed {n}" for n in node.input]
        node.output[:] = [n if n in kept else f"renamed {n}" for n in node.output]
    for tensor in model.graph.initializer:
        weights = onnx.numpy_helper.to_array(tensor)
        heavier = weights * 2 if tensor.name.startswith("network.") else weights
        tensor.CopyFrom(onnx.numpy_helper.from_array(heavier, f"renamed {tensor.name}"))
    onnx.save(model, str(tmp_path / "b.onnx"))
    certificate = certify_files(tiny_file, tmp_path / "b.onnx")
    assert certificate.passed, certificate.summary()


def test_another_normalisation_is_another_graph(
    tmp_path: Path, spec: Spec, tiny: type[nn.Module], tiny_file: Path
) -> None:
    other = spec.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    export_onnx(Deployable(tiny(), other), other, tmp_path / "b.onnx")
    lines = lines_of(certify_files(tiny_file, tmp_path / "b.onnx"))
    assert lines["identity"].passed is False
    assert "initialiser 'normalise.offset'" in lines["identity"].detail


def test_oracles_that_disagree_fail_a_line_of_their_own(
    tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(("one", "another"))
    monkeypatch.setattr(certificate_module, "graph_digest", lambda _: next(digests))
    lines = lines_of(certify_files(tiny_file, tiny_file))
    assert lines["oracles"].passed is False
    assert "disagree (digest: different, side-by-side walk: equal)" in lines["oracles"].detail
    assert lines["identity"].passed is False


def test_provenance_records_files_and_versions_without_judging(tiny_file: Path) -> None:
    line = lines_of(certify_files(tiny_file, tiny_file))["provenance"]
    assert line.passed is None
    files = line.figures["files"]
    assert files[str(tiny_file)]["bytes"] == tiny_file.stat().st_size
    assert {"srdeploy", "torch", "onnx", "onnxruntime"} <= line.figures["environment"].keys()


def test_the_written_certificate_reads_back(tmp_path: Path, tiny_file: Path) -> None:
    certificate = certify_files(tiny_file, tiny_file)
    certificate.write(tmp_path / "certificate.json")
    values = json.loads((tmp_path / "certificate.json").read_text())
    assert values.pop("passed") is True
    assert Certificate.model_validate(values) == certificate


def test_what_is_not_an_onnx_file_is_refused_in_one_line(tmp_path: Path, tiny_file: Path) -> None:
    content = tiny_file.read_bytes()
    files = {
        "text.onnx": b"this is not a graph\n" * 9,
        "empty.onnx": b"",
        "classes.json": b'{"names": ["a", "b"]}',
        "truncated.onnx": content[: len(content) // 2],
        "beheaded.onnx": content[:-40],
    }
    for name, damaged in files.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{name}: not an? (valid )?ONNX"):
            certify_files(tiny_file, tmp_path / name)
    with pytest.raises(UserError, match=r"no such file or folder: .*absent\.onnx"):
        certify_files(tmp_path / "absent.onnx", tiny_file)
    with pytest.raises(UserError, match=r"has no model\.onnx"):
        certify_files(tmp_path, tiny_file)
