"""run → bundle: ONNX export with proven parity, and the contract that training and serving share.

`bundle`, `preprocess` and `runtime` are free of torch; training and service import those three and nothing else here.
"""
