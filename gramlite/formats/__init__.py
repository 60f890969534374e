"""What lies on disk: checkpoints, GGUF, safetensors, ONNX graphs, quantized linears, manifests. May import the ground floor."""
