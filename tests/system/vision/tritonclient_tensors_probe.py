"""Calls of `tritonclient`, unmodified, which `test_tensor_networks.py` runs in a separate process.

The stubs of `tritonclient` and of this package cannot be loaded in one process. Writes the answers
to an NPZ file.
"""

from __future__ import annotations

import sys

import numpy as np
import tritonclient.grpc as triton


def probe(address: str, inputs: str, answers: str) -> None:
    """Send the images and videos in an NPZ file, and write the tensors of the answers."""
    client = triton.InferenceServerClient(address)
    found = {}
    with np.load(inputs) as arrays:
        for model, name, outputs in (("two", "images", ("best", "maps")), ("video", "video", None)):
            tensor = triton.InferInput(name, list(arrays[name].shape), "FP32")
            tensor.set_data_from_numpy(arrays[name])
            asked = None if outputs is None else [triton.InferRequestedOutput(o) for o in outputs]
            answer = client.infer(model, [tensor], outputs=asked)
            for output in answer.get_response().outputs:
                found[output.name] = answer.as_numpy(output.name)
    client.close()
    np.savez(answers, **found)


if __name__ == "__main__":
    probe(*sys.argv[1:])
