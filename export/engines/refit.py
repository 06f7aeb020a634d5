"""The refit proof: the regulated network's weights are all that its engine has of its own.

On a GPU an engine built from the baseline is refitted with the regulated weights. Ahead of time,
without one, TensorRT for RTX can't build refittable plans (nor ones without weights); there the
plans of both networks are compared byte by byte instead, at one fixed shape, where builds repeat.
"""

import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, numpy_helper

from srdeploy.artifacts.artifact import EngineSidecar, write_sidecar
from srdeploy.errors import UserError
from srdeploy.export.certificate import Line, read_model
from srdeploy.export.engines.build import (
    BuildOptions,
    build_engine,
    build_plan,
    explain_failure,
    explain_parser,
    input_shape,
    parse_onnx,
    target_gpu,
)
from srdeploy.export.source import synthetic_pictures
from srdeploy.files import sha256_of, write_whole
from srdeploy.graph.signature import read_signature
from srdeploy.imaging import Pixels, fit
from srdeploy.runtimes.registry import open_runtime
from srdeploy.runtimes.trt.engine import collecting_logger, import_tensorrt
from srdeploy.spec import Spec

NAME = "refit"
AGREEMENT = {"fp32": 0.999, "tf32": 0.995, "fp16": 0.995, "bf16": 0.99, "int8": 0.99}
"""Share of pixels at which a refitted engine and one built from the same weights must agree: their
kernels differ, and with them the last bits."""
_SLACK = 256
"""Bytes that a plan may leave between two tensors of weights, for alignment."""


def refit_line(baseline: Path, regulated: Path, options: BuildOptions) -> Line:
    """The line `refit`: does the engine of `baseline` with the weights of `regulated` do as one
    built from `regulated`? Says what was done: a refit on a GPU, or a comparison of plans.

    Raises UserError where either can't be built, and where both files are one.
    """
    if sha256_of(baseline) == sha256_of(regulated):
        raise UserError(f"{baseline} and {regulated} are the same: a refit would show nothing")
    if target_gpu(options) is None:
        return _compared(baseline, regulated, options)
    return _refitted(baseline, regulated, options)


def _compared(baseline: Path, regulated: Path, options: BuildOptions) -> Line:
    plans = [_fixed_plan(path, options) for path in (baseline, baseline, regulated)]
    model = read_model(regulated)
    names = " and ".join(options.sm)
    done = f"plans of TensorRT for RTX for compute capability {names}, built without a GPU"
    if plans[0] != plans[1]:
        return Line(
            name=NAME,
            passed=None,
            detail=f"not judged: two {done}, from the same file differ, so nothing follows from it",
            figures={"method": "compared plans", "repeatable": False},
        )
    verdict = compare_plans(plans[0], plans[2], *weight_bytes(model))
    if options.precision == "int8" and not verdict["same_plan"]:
        return Line(
            name=NAME,
            passed=None,
            detail=(
                "not judged: in int8 the measured ranges can be part of the code, and each "
                f"network has its own, so plans that differ say nothing ({done}: {verdict['why']})"
            ),
            figures={"method": "compared plans", "repeatable": True, **verdict},
        )
    share = weights_found(model, plans[2])
    detail = (
        f"{done}: the regulated network's is the baseline's but for its weights "
        f"({verdict['bytes_that_differ']:,} of {verdict['plan_bytes']:,} bytes differ, all in the "
        f"{verdict['span']:,} where the weights stand; {100 * share:.1f} % of the regulated "
        "weights are found there byte for byte); no refit was run, which needs a GPU"
        if verdict["same_plan"]
        else f"{done}: the regulated network's differs from the baseline's beyond its weights "
        f"({verdict['why']})"
    )
    return Line(
        name=NAME,
        passed=verdict["same_plan"],
        detail=detail,
        figures={
            "method": "compared plans",
            "repeatable": True,
            "weights_found": share,
            **verdict,
        },
    )


def compare_plans(baseline: bytes, regulated: bytes, weights: int, tensors: int) -> dict[str, Any]:
    """Whether two plans differ in only one stretch that has no room for more than the weights:
    `weights` bytes in `tensors` pieces. Weights that don't differ at all are no new weights."""
    found: dict[str, Any] = {"plan_bytes": len(baseline), "weight_bytes": weights}
    if len(baseline) != len(regulated):
        why = f"{len(baseline):,} and {len(regulated):,} bytes long"
        return {**found, "same_plan": False, "why": why}
    left, right = (np.frombuffer(plan, np.uint8) for plan in (baseline, regulated))
    different = np.flatnonzero(left != right)
    if not different.size:
        return {**found, "same_plan": False, "why": "no byte differs, not even of the weights"}
    span = int(different[-1] - different[0]) + 1
    found |= {"bytes_that_differ": int(different.size), "span": span, "from": int(different[0])}
    room = weights + _SLACK * tensors
    if span > room:
        why = f"differences spread over {span:,} bytes, weights take at most {room:,}"
        return {**found, "same_plan": False, "why": why}
    return {**found, "same_plan": True}


def weight_bytes(model: ModelProto) -> tuple[int, int]:
    """Bytes of the tensors stored in a graph, and how many they are."""
    stored = [numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer]
    return sum(stored), len(stored)


def weights_found(model: ModelProto, plan: bytes) -> float:
    """Share (by bytes) of the tensors stored in a graph that a plan holds byte for byte, in some
    order of their axes. Tensors of less than 16 bytes are left out: chance would find them."""
    total = found = 0
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.nbytes < 16:
            continue
        total += values.nbytes
        orders = permutations(range(values.ndim)) if values.ndim > 1 else [(0,)]
        if any(np.transpose(values, order).tobytes() in plan for order in orders):
            found += values.nbytes
    return found / total if total else 0.0


def _fixed_plan(path: Path, options: BuildOptions) -> bytes:
    """The plan for one image of the usual size. With sizes that vary, the code that computes them
    comes in another order in every build."""
    signature = read_signature(path)
    if signature.spec is None:
        raise UserError(f"{path} has no spec in it: attach one with srdeploy strip --classes")
    parsed = parse_onnx(path, options.builder)
    shape = (1, *signature.spec.input.usual)
    parsed.network.get_input(0).shape = input_shape(shape, signature)
    ahead = options.model_copy(update={"refittable": False, "timing_cache": None})
    return build_plan(parsed, signature, (), ahead, None).content


def _refitted(baseline: Path, regulated: Path, options: BuildOptions) -> Line:
    """Builds two engines: the baseline's, which is refitted, and as a control the regulated one,
    as it is deployed: not refittable."""
    with tempfile.TemporaryDirectory(prefix="srdeploy-") as folder:
        before, after, control = (
            Path(folder) / f"{name}.engine" for name in ("baseline", "refitted", "regulated")
        )
        refittable = options.model_copy(update={"refittable": True})
        sidecar = build_engine(baseline, before, refittable)
        build_engine(regulated, control, options.model_copy(update={"refittable": False}))
        same_layers, same_plan = _refit(before, after, regulated, sidecar)
        pictures = [fit(picture, sidecar.spec) for picture in _usual_pictures(sidecar.spec)]
        labels = [_labels(engine, pictures) for engine in (before, after, control)]
    own = float(np.mean(labels[1] == labels[2]))
    others = float(np.mean(labels[1] == labels[0]))
    least = AGREEMENT[options.precision]
    passed = same_layers and own >= least and own >= others
    return Line(
        name=NAME,
        passed=passed,
        detail=(
            f"the baseline's engine was refitted on {sidecar.gpu}: its layers and kernels are "
            f"{'the same' if same_layers else 'OTHERS'} afterwards, and its labels agree with an "
            f"engine built from the regulated weights on {100 * own:.3f} % of the pixels (with "
            f"the baseline's own on {100 * others:.3f} %)"
        ),
        figures={
            "method": "refit on a GPU",
            "gpu": sidecar.gpu,
            "builder": f"{sidecar.builder} {sidecar.builder_version}",
            "same_layers": same_layers,
            "same_plan_without_weights": same_plan,
            "agreement_with_regulated": own,
            "agreement_with_baseline": others,
            "least_agreement": least,
        },
    )


def _refit(before: Path, after: Path, regulated: Path, sidecar: EngineSidecar) -> tuple[bool, bool]:
    """Writes the engine `before` with the weights of `regulated` to `after`; whether its layers,
    and its plan with weights left out, stayed the same. Raises UserError."""
    trt = import_tensorrt(sidecar.builder)
    logger = collecting_logger(trt)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(before.read_bytes())
    if engine is None:
        raise explain_failure(logger, f"the engine built from {sidecar.onnx}")
    layers, plan = _layers(trt, engine), _without_weights(trt, engine)
    refitter = trt.Refitter(engine, logger)
    parser_refitter = trt.OnnxParserRefitter(refitter, logger)
    if not parser_refitter.refit_from_file(str(regulated)):
        raise explain_parser(parser_refitter, f"{regulated}, refitted into {sidecar.onnx}")
    missing = refitter.get_missing_weights()
    if missing:
        raise UserError(
            f"{regulated}: {len(missing)} weights of the engine have no counterpart in it, the "
            f"first {missing[0]}"
        )
    if not refitter.refit_cuda_engine():
        raise explain_failure(logger, f"{regulated}, refitted into {sidecar.onnx}")
    write_whole(after, bytes(engine.serialize()))
    described = {
        "engine_sha256": sha256_of(after),
        "engine_bytes": after.stat().st_size,
        "onnx": regulated.name,
        "onnx_sha256": sha256_of(regulated),
    }
    write_sidecar(after, sidecar.model_copy(update=described))
    return layers == _layers(trt, engine), plan == _without_weights(trt, engine)


def _layers(trt: Any, engine: Any) -> str:
    """Layers, their tensors, formats and kernels, as the engine tells them."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _without_weights(trt: Any, engine: Any) -> bytes:
    serialization_config = engine.create_serialization_config()
    serialization_config.set_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    return bytes(engine.serialize_with_config(serialization_config))


def _usual_pictures(spec: Spec) -> list[Pixels]:
    """Drawn pictures at the usual size, which every profile of ours covers."""
    from PIL import Image

    height, width = spec.input.usual
    return [
        np.asarray(Image.fromarray(picture).resize((width, height)))
        for picture in synthetic_pictures(spec)
    ]


def _labels(engine: Path, pictures: list[Pixels]) -> Pixels:
    with open_runtime(engine, "cuda") as runtime:
        return np.concatenate([runtime.run(picture[None]) for picture in pictures])
