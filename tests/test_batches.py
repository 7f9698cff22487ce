"""`BatchCaptioner`: the captions of a column, with datasets and by hand; broken images, pickling and imports."""

import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_attncap import Captioner
from hf_attncap.batches import BatchCaptioner
from hf_attncap.images import load_image


@pytest.fixture(scope="module")
def texts(tiny_checkpoint, pictures) -> list[str]:
    """The captions of the pictures."""
    return [one.text for one in Captioner.from_pretrained(tiny_checkpoint, device="cpu").caption(pictures)]


@pytest.fixture
def caption(tiny_checkpoint) -> BatchCaptioner:
    return BatchCaptioner(tiny_checkpoint, device="cpu")


def test_a_batch_gets_captions_and_reasons(caption, pictures, texts):
    batch = {"id": np.arange(5), "image": [pictures[0], b"no image", str(pictures[1]), None, load_image(pictures[2])]}
    images = list(batch["image"])
    found = caption(batch)
    assert list(found) == ["id", "image", "caption", "error"] and list(batch) == ["id", "image"]
    assert found["image"] == images and (found["id"] == np.arange(5)).all()
    assert found["caption"] == [texts[0], "", texts[1], "", texts[2]]
    assert found["error"][0] == found["error"][2] == found["error"][4] == ""
    assert "not an image" in found["error"][1] and "NoneType" in found["error"][3]


def test_arrays_of_images_as_ray_gives_them(caption, pictures, texts):
    arrays = [np.asarray(load_image(file)) for file in pictures]
    several = np.empty(3, dtype=object)
    several[:] = arrays
    assert caption({"image": several})["caption"] == texts
    assert caption({"image": np.stack(arrays[:1])})["caption"] == texts[:1]
    assert caption({"image": np.array([str(file) for file in pictures])})["caption"] == texts
    assert caption({"image": []}) == {"image": [], "caption": [], "error": []}


def test_options_reach_the_model_and_the_captions(tiny_checkpoint, pictures):
    columns = BatchCaptioner(
        tiny_checkpoint, image_column="photo", output_column="text", dtype="bfloat16", num_beams=1, max_new_tokens=2, workers=1
    )
    found = columns({"photo": pictures})
    captioner = Captioner.from_pretrained(tiny_checkpoint, device="cpu", dtype="bfloat16")
    assert found["text"] == [one.text for one in captioner.caption(pictures, num_beams=1, max_new_tokens=2)]
    with pytest.raises(ValueError, match="`temprature` is not an argument"):
        BatchCaptioner(tiny_checkpoint, temprature=1)({"image": pictures})


def test_a_pickled_captioner_has_no_model(caption, pictures, texts):
    new = pickle.dumps(caption)
    assert caption({"image": pictures})["caption"] == texts
    assert pickle.dumps(caption) == new and len(new) < 2000
    assert pickle.loads(new)({"image": pictures})["caption"] == texts
    assert datasets.fingerprint.Hasher.hash(caption) == datasets.fingerprint.Hasher.hash(pickle.loads(new))


@pytest.mark.parametrize("processes", [None, 2])
def test_datasets_map(caption, pictures, texts, processes):
    table = datasets.Dataset.from_dict({"id": [0, 1, 2], "image": [str(file) for file in pictures]})
    table = table.cast_column("image", datasets.Image())
    found = table.map(caption, batched=True, batch_size=2, num_proc=processes, load_from_cache_file=False)
    assert found.column_names == ["id", "image", "caption", "error"]
    assert found["caption"][:] == texts and found["error"][:] == [""] * 3
    # the images are those files still, and not stored anew
    stored = found.cast_column("image", datasets.Image(decode=False))["image"][:]
    assert [one["path"] for one in stored] == [str(file) for file in pictures] and not any(one["bytes"] for one in stored)


def test_datasets_map_of_broken_images(caption, pictures, texts, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(pictures[0].read_bytes()[:300])
    files = [str(pictures[0]), str(tmp_path / "cut.jpg"), str(pictures[1])]
    table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="cannot be decoded .*cast_column.'image', datasets.Image.decode=False"):
        table.map(caption, batched=True, load_from_cache_file=False)
    bytes_too = [{"bytes": pictures[2].read_bytes(), "path": None}, {"bytes": b"broken", "path": "x.jpg"}]
    for source, expected in ((table, [texts[0], "", texts[1]]), (bytes_too, [texts[2], ""])):
        if isinstance(source, list):
            source = datasets.Dataset.from_dict({"image": source}, datasets.Features({"image": datasets.Image()}))
        raw = source.cast_column("image", datasets.Image(decode=False))
        found = raw.map(caption, batched=True, batch_size=1, load_from_cache_file=False)
        assert found["caption"][:] == expected
        assert [bool(error) for error in found["error"]] == [not text for text in expected]


def test_streamed_datasets(caption, pictures, texts):
    table = datasets.Dataset.from_dict({"image": [str(file) for file in pictures]}).cast_column("image", datasets.Image())
    rows = list(table.to_iterable_dataset().map(caption, batched=True, batch_size=2))
    assert [row["caption"] for row in rows] == texts and all(isinstance(row["image"], Image.Image) for row in rows)


def test_columns_that_do_not_exist_or_clash_are_named(caption):
    with pytest.raises(ValueError, match="There is no column 'image', but photo, id: give its name as `image_column`"):
        caption({"photo": [], "id": []})
    for name in ("image", "error"):
        with pytest.raises(ValueError, match=f"`output_column` is '{name}', which is another column"):
            BatchCaptioner(output_column=name)


def test_importing_it_needs_no_torch_and_no_datasets():
    code = "import hf_attncap.batches, sys; print({'torch', 'transformers', 'datasets', 'pyarrow', 'ray'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert ran.stdout == "set()\n"
