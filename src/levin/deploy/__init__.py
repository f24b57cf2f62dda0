"""Trained policies as files that other programs run without Levin: ONNX, or `torch.export`.

Start reading at `graph.py`, the policy as one function of tensors. `package.py` writes and checks the files.
"""
