"""All that a device needs to build a model's engine and to check it by itself, in one directory.

`bundle.bundle` is the verb. What stands in ``device/`` travels to devices as it is: programs for Python 3.8, which
JetPack 5 has, and templates. They use the files of moe-edge in `LIBRARY`, which travel too and so keep to Python 3.8.
"""
