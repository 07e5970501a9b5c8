"""ONNX Runtime behind one backend: its library, its sessions, and graphs that it made before."""
