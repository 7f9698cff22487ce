"""`generate(stop_strings=..., tokenizer=...)` with word and subword vocabularies."""

import pytest
import torch

from hf_attncap import AttnCapForConditionalGeneration, AttnCapProcessor

kinds = pytest.mark.parametrize("kind", ["word", "bpe"])
PICTURES = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 2, 8])[:, None, None, None]
GREEDY = {"num_beams": 1, "early_stopping": None, "length_penalty": None, "max_new_tokens": 12}


@pytest.fixture
def captioner(make_checkpoint, kind):
    folder = make_checkpoint(tokenizer=kind)
    model, processor = AttnCapForConditionalGeneration.from_pretrained(folder).eval(), AttnCapProcessor.from_pretrained(folder)

    def caption(**settings) -> list[str]:
        ids = model.generate(pixel_values=PICTURES, **{**GREEDY, **settings})
        return processor.batch_decode(ids, skip_special_tokens=True)

    return caption, processor.tokenizer


@kinds
@pytest.mark.parametrize("length", ["a word", "part of a word", "two words"])
def test_captions_end_with_the_stop_string(captioner, length):
    caption, tokenizer = captioner
    whole = caption()
    words = next(text.split() for text in whole if len(set(text.split())) > 2)
    place = next(i for i in range(1, len(words)) if words[i] != words[i - 1] and len(words[i]) > 2)
    text = {"a word": words[place], "part of a word": words[place][:2], "two words": " ".join(words[place - 1 : place + 1])}[length]
    stopped = caption(stop_strings=[text, "never said"], tokenizer=tokenizer)
    assert stopped != whole
    for short, full in zip(stopped, whole):
        assert full.startswith(short)
        if text in full:
            # The token that completes the text may go on behind it.
            assert text in short and text not in tokenizer.decode(tokenizer(short)["input_ids"][:-1])
        else:
            assert short == full


@kinds
def test_stop_string_in_the_prompt_is_ignored(captioner):
    caption, tokenizer = captioner
    prompt = tokenizer(["two red dogs"] * 3, return_tensors="pt")["input_ids"]
    without = caption(input_ids=prompt)
    said = " ".join(text.removeprefix("two red dogs") for text in without)
    silent = next(word for word in ("two", "red", "dogs") if word not in said)
    assert said.strip() and caption(input_ids=prompt, stop_strings=silent, tokenizer=tokenizer) == without


@kinds
def test_stop_strings_with_beam_search(captioner):
    caption, tokenizer = captioner
    beams = {"num_beams": 3, "early_stopping": False, "length_penalty": 1.0}
    word = caption(**beams)[0].split()[-1]
    assert all(word not in text[:-1].rpartition(" ")[0] for text in caption(**beams, stop_strings=word, tokenizer=tokenizer))


@kinds
def test_stop_strings_need_a_tokenizer(captioner):
    with pytest.raises(ValueError, match="tokenizer"):
        captioner[0](stop_strings="dog")
