"""Captions to ids: special tokens, cutting, padding, and tokenizers made of older files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from emkum.errors import UnsupportedNetwork, UsageError, WeightsUnavailable
from emkum.models.sentencepieces import EosPolicy, tokenizer_of
from emkum.models.tokenizer import differing, pad_id, read_tokenizer, text_ids

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "runs", "##ning", "run", "on", "grass"]


def bert_like(pad: str = "[PAD]") -> Tokenizer:
    vocabulary = {word if word != "[PAD]" else pad: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def as_bytes(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str().encode()


def test_ids_have_their_special_tokens_pads_and_true_lengths() -> None:
    ids, length = text_ids(as_bytes(bert_like()), ["A dog runs", "running on zebras", ""], 16)
    assert ids.shape == (3, 16)
    assert ids.dtype == length.dtype == np.int32
    assert length.tolist() == [5, 6, 2]
    assert ids[0, :6].tolist() == [2, 4, 5, 6, 3, 0]
    assert ids[1, :7].tolist() == [2, 8, 7, 9, 1, 3, 0]
    assert ids[2, :3].tolist() == [2, 3, 0]
    assert not ids[0, 5:].any()


def test_a_long_caption_is_cut_before_its_closing_token() -> None:
    ids, length = text_ids(as_bytes(bert_like()), ["dog " * 100, "dog " * 14, "dog " * 15], 16)
    assert length.tolist() == [16, 16, 16]
    assert ids[:, 0].tolist() == [2] * 3
    assert ids[:, -1].tolist() == [3] * 3
    assert set(ids[:, 1:-1].ravel().tolist()) == {5}


def test_padding_and_truncation_make_no_other_tokenizer_and_what_does_is_named() -> None:
    plain, cut, cased, other_pad = bert_like(), bert_like(), bert_like(), bert_like("<none>")
    cut.enable_truncation(5)
    cut.enable_padding(length=8)
    assert as_bytes(plain) != as_bytes(cut)
    assert differing(as_bytes(plain), as_bytes(cut)) == ()
    for found, same in zip(
        text_ids(as_bytes(cut), ["a dog"], 16), text_ids(as_bytes(plain), ["a dog"], 16), strict=True
    ):
        np.testing.assert_array_equal(found, same)
    cased.normalizer = normalizers.BertNormalizer(lowercase=False)
    assert differing(as_bytes(plain), as_bytes(cased)) == ("normalizer",)
    cut.enable_padding(pad_id=7)
    assert differing(as_bytes(plain), as_bytes(cut)) == ("pad id",)
    assert "model" in differing(as_bytes(plain), as_bytes(other_pad))


@pytest.mark.parametrize(("max_tokens", "width"), [(16, 16), (17, 32), (50, 64), (64, 64)])
def test_rows_are_as_long_as_the_next_multiple_of_sixteen(max_tokens: int, width: int) -> None:
    ids, length = text_ids(as_bytes(bert_like()), ["dog " * 100], max_tokens)
    assert ids.shape == (1, width)
    assert length.tolist() == [max_tokens]
    assert not ids[0, max_tokens:].any()


def test_the_files_own_truncation_and_padding_are_not_obeyed() -> None:
    tokenizer = bert_like()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    ids, length = text_ids(as_bytes(tokenizer), ["a dog runs on grass"], 32)
    assert ids.shape == (1, 32)
    assert length.tolist() == [7]


def test_the_pad_id_is_the_tokenizers_own() -> None:
    assert pad_id(as_bytes(bert_like())) == 0
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "dog": 3}
    roberta_like = Tokenizer(models.WordLevel(vocabulary, "dog"))
    assert pad_id(as_bytes(roberta_like)) == 1
    assert text_ids(as_bytes(roberta_like), ["dog"], 16)[0][0, 1:].tolist() == [1] * 15
    roberta_like.enable_padding(pad_id=2, pad_token="</s>")
    assert pad_id(as_bytes(roberta_like)) == 2
    assert pad_id(as_bytes(Tokenizer(models.WordLevel({"dog": 0}, "dog")))) == 0


def test_no_captions_give_no_rows() -> None:
    ids, length = text_ids(as_bytes(bert_like()), [], 64)
    assert ids.shape == (0, 64)
    assert length.shape == (0,)


def test_room_for_special_tokens_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 2 tokens, of which 2 are special"):
        text_ids(as_bytes(bert_like()), ["dog"], 2)


def test_a_tokenizer_json_is_kept_byte_for_byte(tmp_path: Path) -> None:
    content = json.dumps(json.loads(bert_like().to_str()), indent=3).encode()
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert read_tokenizer(tmp_path) == content


def test_a_vocabulary_file_alone_becomes_the_same_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "[MASK]"]) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    captions = ["A DOG runs", "running on zebras"]
    made = text_ids(read_tokenizer(tmp_path), captions, 32)
    expected = text_ids(as_bytes(bert_like()), captions, 32)
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_vocab_json_and_merges_become_a_byte_level_tokenizer(tmp_path: Path) -> None:
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "d", "o", "g", "do", "dog", "Ġ", "Ġdog"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\ndo g\nĠ dog\n")
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    ids, length = text_ids(read_tokenizer(tmp_path), ["dog dog"], 16)
    assert ids[0, :5].tolist() == [0, 9, 11, 2, 1]
    assert length.tolist() == [4]


def test_no_tokenizer_and_a_broken_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailable, match="has no tokenizer"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedNetwork, match="cannot be read"):
        read_tokenizer(tmp_path)


def trained_spm(path: Path) -> Path:
    """A tiny sentencepiece model at `path`, with the special pieces where fairseq expects them."""
    import sentencepiece

    captions = ["a dog runs on grass", "two dogs run", "a cat sleeps on a mat", "the grass is green", "a running cat"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions * 4), model_writer=model, vocab_size=28, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    return path


CAPTIONS = ["a dog runs", "Ünknown zebras on grass", "", "the " * 100, "two  dogs\trun "]


@pytest.mark.parametrize("eos_policy", ["keep", "drop"])
def test_sentencepieces_are_numbered_as_fairseq_does(eos_policy: EosPolicy, tmp_path: Path) -> None:
    path = trained_spm(tmp_path / "beit3.spm")
    tokenizer = tokenizer_of(path, eos_policy)
    ids, length = text_ids(tokenizer, CAPTIONS, 20)
    assert ids.shape == (5, 32)
    assert pad_id(tokenizer) == 1
    theirs = SentencePieceProcessor(model_file=str(path))
    unknown_seen = False
    for row, caption in enumerate(CAPTIONS):
        pieces = theirs.encode_as_pieces(caption)
        numbers = [theirs.piece_to_id(piece) for piece in pieces]
        numbers = [3 if number == 0 else number + 1 for number in numbers]
        unknown_seen = unknown_seen or 3 in numbers
        last = [2] if eos_policy == "keep" else []
        expected = [0, *numbers[: 19 - len(last)], *last]
        assert ids[row].tolist() == expected + [1] * (32 - len(expected))
        assert length[row] == len(expected)
    assert unknown_seen
    assert length[2] == 1 + (eos_policy == "keep")
    assert length[3] == 20


def test_the_eos_policy_is_part_of_the_tokenizers_bytes_and_the_same_file_gives_the_same(tmp_path: Path) -> None:
    path = trained_spm(tmp_path / "beit3.spm")
    assert tokenizer_of(path) == tokenizer_of(path, "keep") != tokenizer_of(path, "drop")
    kept = json.loads(tokenizer_of(path))
    assert {key: kept[key] for key in ("type", "offset", "bos", "pad", "eos", "unk", "eos_policy")} == {
        "type": "sentencepiece", "offset": 1, "bos": 0, "pad": 1, "eos": 2, "unk": 3, "eos_policy": "keep",
    }  # fmt: skip


def test_a_kept_tokenizer_of_sentencepiece_is_read_from_a_folder(tmp_path: Path) -> None:
    content = tokenizer_of(trained_spm(tmp_path / "beit3.spm"))
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert read_tokenizer(tmp_path) == content


def test_sentencepieces_need_room_beside_their_special_tokens(tmp_path: Path) -> None:
    path = trained_spm(tmp_path / "beit3.spm")
    with pytest.raises(UsageError, match="at most 2 tokens, of which 2 are special"):
        text_ids(tokenizer_of(path), ["dog"], 2)
    assert text_ids(tokenizer_of(path, "drop"), ["dog"], 2)[1].tolist() == [2]
    with pytest.raises(UsageError, match="at most 1 tokens, of which 1 are special"):
        text_ids(tokenizer_of(path, "drop"), ["dog"], 1)


def test_a_torn_model_of_sentencepiece_and_a_torn_wrapper_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "beit3.spm"
    path.write_bytes(b"no model")
    with pytest.raises(UnsupportedNetwork, match=r"beit3\.spm cannot be read"):
        tokenizer_of(path)
    path.write_bytes(b"")
    with pytest.raises(UnsupportedNetwork, match=r"beit3\.spm cannot be read: an empty model"):
        tokenizer_of(path)
    kept = json.loads(tokenizer_of(trained_spm(path)))
    for broken in ({"model": "%%%"}, {"eos_policy": "perhaps"}, {"offset": None}):
        with pytest.raises(UnsupportedNetwork, match="a tokenizer of sentencepiece cannot be read"):
            text_ids(json.dumps(kept | broken).encode(), ["dog"], 16)
