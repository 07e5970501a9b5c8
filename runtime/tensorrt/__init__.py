"""TensorRT and TensorRT-RTX behind one backend: ``tensorrt`` 10.x and 11.x, ``tensorrt_rtx`` 1.x.

What differs between them is asked for by ``hasattr``, never by version. Networks are always strongly typed: precision
is what the graph says.
"""
