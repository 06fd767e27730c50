"""The tokenizer, with and without the rest of open_clip."""

from __future__ import annotations

import subprocess
import sys

import torch

from pipeline.models.text.tokenizer import CaptionTokenizer

CAPTION = "A small RED circle, two café tables & a don't-know"


def test_a_worker_tokenizes_as_open_clip_does_without_loading_it() -> None:
    """In a process of its own, as loader workers are; the stages that have no text don't load it either."""
    code = (
        "import sys, pipeline.stages.mae, pipeline.stages.probe;"
        "from pipeline.models.text.tokenizer import CaptionTokenizer;"
        f"print(CaptionTokenizer('clip', 24)([{CAPTION!r}])[0].tolist(), 'open_clip' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    import open_clip

    expected = open_clip.tokenize([CAPTION], context_length=24)
    assert output == f"{expected[0].tolist()} False"
    assert torch.equal(CaptionTokenizer("clip", 24)([CAPTION]), expected)


def test_decoding_gives_the_caption_back() -> None:
    tokenizer = CaptionTokenizer("clip", 16)
    assert tokenizer.decode(tokenizer(["A photo of a  Red circle."])[0]) == "a photo of a red circle ."
    assert tokenizer.decode(tokenizer([""])[0]) == ""
