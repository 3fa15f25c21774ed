"""One ONNX file: exported from a contract, read back, checked against one."""
