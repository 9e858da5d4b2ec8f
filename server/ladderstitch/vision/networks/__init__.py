"""Networks of the user as ONNX files: read, inspected, cut into units, joined by affine maps."""
