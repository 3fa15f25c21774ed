"""What we make of a contract: ONNX files, and the weights they point to."""
