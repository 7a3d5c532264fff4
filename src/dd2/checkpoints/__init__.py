"""Reading and writing models as folders of safetensors and JSON."""
