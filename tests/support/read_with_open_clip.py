"""Read shards with open_clip's training pipeline, unchanged, in a process of its own; tell what came as JSON.

python tests/support/read_with_open_clip.py 'folder/{00000..00002}.tar'
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from typing import Any

import numpy as np
import webdataset
from open_clip_train.data import get_wds_dataset


def read(shards: str, *, is_train: bool) -> tuple[int, list[tuple[str, str]]]:
    """How many samples the loader announces, and (caption, sha256 of the pixels) of those that come."""
    arguments = argparse.Namespace(
        train_data=shards,
        val_data=shards,
        dataset_resampled=False,
        train_num_samples=None,  # taken from sizes.json
        val_num_samples=None,
        train_data_upsampling_factors=None,
        batch_size=4,
        workers=1,
        world_size=1,
        seed=0,
    )
    loader = get_wds_dataset(arguments, preprocess, is_train=is_train, tokenizer=lambda text: [text]).dataloader
    found = [pair for images, texts in loader for pair in zip(texts, images, strict=True)]
    return loader.num_samples, found


def preprocess(image: Any) -> str:
    """What stands for the model's transform: here every pixel counts."""
    return hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()


if __name__ == "__main__":
    told = {"webdataset": webdataset.__version__}
    told |= {name: read(sys.argv[1], is_train=name == "train") for name in ("train", "validation")}
    sys.stdout.write(json.dumps(told) + "\n")
