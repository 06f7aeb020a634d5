"""From an ONNX file to a TensorRT engine and its sidecar: TensorRT 10 and 11, TensorRT for RTX."""
