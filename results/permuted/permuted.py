"""The control of "over-optimisation": JPEG rewards that are permuted over the pictures of a call.

A picture gets the reward of a random one, so there is nothing to learn: what the pictures lose is
lost to the size of the step. The mean over a call, and so eval_reward, stays as it was.

    python ddpo_is.py --reward results/permuted/permuted.py:compress
"""

import io
import zlib

import numpy as np
from PIL import Image


def compress(images, prompts):
    """Minus the size in kB as JPEG of quality 95. images uint8 (N, H, W, 3) -> (N,)."""
    sizes = np.zeros(len(images))
    for i, image in enumerate(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        sizes[i] = len(buffer.getvalue()) / 1000
    # the pictures seed it, so that a resumed run permutes as the uninterrupted one
    return -np.random.default_rng(zlib.crc32(images.tobytes())).permutation(sizes)
