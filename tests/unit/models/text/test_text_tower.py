"""The text tower against open_clip's and by FLIP's options, tokenizers of files, and the masking of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.text.tokenizer import VOCAB_SIZE, CaptionTokenizer
from pipeline.models.text.tower import TextConfig, TextTower
from tests.support.convert_peers import close, shaken

SMALL = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
CAPTIONS = ["a photo of a red circle", "two blue squares, one above the other", "x", ""]


def tower(**changes: Any) -> TextTower:
    torch.manual_seed(0)
    config = validate(TextConfig, {**SMALL, **changes}, where="test")
    return shaken(TextTower(config, 24, config.build_tokenizer().vocabulary))


def as_open_clips(ours: TextTower) -> dict[str, Tensor]:
    """Its names for our tensors."""
    names = {"norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc"}
    names |= {"mlp.fc2": "mlp.c_proj", "attn.qkv.": "attn.in_proj_", "blocks.": "transformer.resblocks."}
    names |= {"pos_embed": "positional_embedding", "cls_token": "cls_emb", "projection": "text_projection"}
    state = {}
    for name, value in ours.state_dict().items():
        for part, official_part in names.items():
            name = name.replace(part, official_part)
        state["ln_final." + name.removeprefix("norm.") if name.startswith("norm.") else name] = value
    if "text_projection.bias" not in state:
        state["text_projection"] = state.pop("text_projection.weight").T
    return state


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"causal": False, "pooling": "first"}, {"no_causal_mask": True, "pool_type": "first"}),
        (
            {"causal": False, "pooling": "last", "projection": "linear_bias"},
            {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        ),
        ({"pooling": "cls"}, {"embed_cls": True, "correct_cls_mask": True}),
        ({"causal": False, "mask_padding": True}, {"no_causal_mask": True, "use_pad_mask": True}),
    ],
    ids=["clip", "first", "siglip", "cls", "padding hidden"],
)  # fmt: skip
def test_features_equal_open_clips_text_tower(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    from open_clip.transformer import TextTransformer

    mine = tower(**ours)
    peer = TextTransformer(vocab_size=VOCAB_SIZE, output_dim=24, **SMALL, **theirs).eval()
    peer.load_state_dict(as_open_clips(mine))
    text = CaptionTokenizer("clip", 16)(CAPTIONS)
    with torch.no_grad():
        assert close(mine(text), peer(text))


def test_what_follows_the_end_token_is_not_computed_and_changes_nothing() -> None:
    mine = tower()
    text = CaptionTokenizer("clip", 16)(CAPTIONS)
    seen: list[int] = []
    mine.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        features = mine(text)
        text[:, 12:] = 77
        assert torch.equal(mine(text), features)
    assert seen == [10, 10]


@pytest.mark.parametrize("how", ["random", "padding_first"])
def test_masked_tokens_keep_their_positions_and_the_pooled_one_stays(how: str) -> None:
    mine = tower()
    text = CaptionTokenizer("clip", 16)(CAPTIONS)
    keep = mine.text_masking(text, torch.arange(4), 0.5, how)  # type: ignore[arg-type]
    assert keep.shape == (4, 8)
    assert (keep.diff(dim=1) > 0).all()
    ends = (text == VOCAB_SIZE - 1).int().argmax(1, keepdim=True)
    assert (keep == ends).any(1).all()
    padding = (text == 0).gather(1, keep).sum(1)
    if how == "padding_first":
        assert torch.equal(padding, ((text == 0).sum(1) - 8).clamp(min=0))
    everything = torch.arange(16).expand(4, -1)
    with torch.no_grad():
        torch.testing.assert_close(mine(text, everything), mine(text))
        assert not torch.allclose(mine(text, keep), mine(text), atol=1e-4)


def test_a_smaller_vocabulary_is_the_same_merges_cut_short() -> None:
    whole, small = CaptionTokenizer("clip", 77), CaptionTokenizer("clip", 77, 2000)
    assert small.vocabulary == (2000, 1999, 0)
    for caption in [*CAPTIONS, "Ünïcödé ✓ 中文"]:
        assert small.decode(small([caption])[0]) == whole.decode(whole([caption])[0])
    tokens = small(["the photo of a dog"])[0]
    assert tokens[0] == 1998
    assert tokens.max() == 1999
    assert torch.equal(tokens[1:4], whole(["the photo of a dog"])[0][1:4])
    assert CaptionTokenizer("clip", 77)(["again"])[0].max() == VOCAB_SIZE - 1, "the whole one isn't changed"


def test_wordpiece_is_berts_without_special_tokens(tmp_path: Path) -> None:
    """As the official FLIP cuts captions: lower case, nothing before or after, padding 0."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circ", "##le", "##s", ",", "cafe", "two"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    ours = CaptionTokenizer(str(tmp_path / "vocab.txt"), 8)
    peer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    for caption in ["Two RED circles, a Café", "zebra", ""]:
        expected = peer(caption, add_special_tokens=False)["input_ids"]
        assert ours([caption])[0].tolist() == expected + [0] * (8 - len(expected))
    assert ours.vocabulary == (13, None, 0)


def test_a_tokenizer_json_is_used_as_it_is(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    numbers = {"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3, "circle": 4}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    ours = CaptionTokenizer(str(tmp_path / "tokenizer.json"), 5)
    assert ours(["red circle", "red red red red red red"]).tolist() == [[3, 4, 1, 0, 0], [3, 3, 3, 3, 1]]
    assert ours.vocabulary == (5, 1, 0)


def test_captions_that_are_cut_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = CaptionTokenizer("clip", 4)
    tokenizer(["a b c d e f"] * 12 + ["a"])
    assert (tokenizer.num_cut, tokenizer.num_seen) == (12, 13)
    assert [record.getMessage() for record in caplog.records] == [
        "a caption of 8 tokens was cut to the context of 4; 1 of 1 captions so far in this process",
        "a caption of 8 tokens was cut to the context of 4; 10 of 10 captions so far in this process",
    ]


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    (tmp_path / "broken.json").write_text(json.dumps({"model": 1}))
    for name, message in (
        ("bert", "no tokenizer is called 'bert'"),
        (str(tmp_path / "none.txt"), "no such file"),
        (str(tmp_path / "names.txt"), "isn.t a WordPiece vocabulary"),
        (str(tmp_path / "broken.json"), "can't be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            CaptionTokenizer(name, 8)(["a"])


def test_towers_that_do_not_fit_their_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    file = {"tokenizer": str(tmp_path / "vocab.txt"), "causal": False, "pooling": "first"}
    assert tower(**file, vocab_size=4).token_embedding.num_embeddings == 4
    with pytest.raises(ValueError, match=r"has 3 tokens, but text\.vocab_size is only 2"):
        tower(**file, vocab_size=2)
    with pytest.raises(ValueError, match="needs a tokenizer with an end token"):
        tower(**file | {"pooling": "eot"})
    with pytest.raises(ConfigError, match="would attend to nothing else"):
        tower(pooling="first")
