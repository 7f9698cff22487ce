"""Captions with Ray Data: those of the plain path, each image once, also after failures."""

import io
import logging
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ray = pytest.importorskip("ray", reason='pip install "hf_attncap[ray]"')
pytest.importorskip("ray.data", reason='pip install "hf_attncap[ray]"')
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from hf_attncap import Captioner  # noqa: E402
from hf_attncap.ray_captions import CPUS_PER_MODEL, caption_dataset, caption_with_ray, find_units  # noqa: E402
from tests.odd_pictures import encode  # noqa: E402

pytestmark = pytest.mark.slow  # starting a cluster and its models takes half a minute
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 150 * 2**20}
ONE = {"concurrency": 1}  # each further model takes seconds to start


def picture(number: int) -> bytes:
    """A small JPEG, other for each number."""
    image = Image.new("RGB", (40, 30), (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    image.paste((255 - number % 256, 0, number % 256), (number % 30, 0, number % 30 + 10, 20))
    return encode(image, "JPEG", quality=90)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU, which has room for one model. The driver runs on the first."""
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def write_inputs(folder: Path) -> list[bytes]:
    """Thirty image files, a tar file and a Parquet file with ten images each: their bytes in the order of the output."""
    folder.mkdir()
    pictures = [picture(number) for number in range(50)]
    with tarfile.open(folder / "a.tar", "w") as file:
        for number in range(10):
            for ending, content in (("jpg", pictures[number]), ("json", b"{}")):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    pq.write_table(pa.table({"image": [{"bytes": data, "path": None} for data in pictures[10:20]]}), folder / "b.parquet")
    (folder / "c").mkdir()
    for number in range(20, 50):
        (folder / "c" / f"{number:03d}.jpg").write_bytes(pictures[number])
    return pictures


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(file).to_pylist()]


def plain_captions(checkpoint: Path, pictures: list[bytes]) -> list[str]:
    return [result.text for result in Captioner.from_pretrained(checkpoint).caption(pictures)]


def test_captions_of_all_kinds_of_inputs_equal_those_of_the_plain_path(cluster, tiny_checkpoint, tmp_path):
    pictures = write_inputs(tmp_path / "in")
    (tmp_path / "in" / "c" / "049.jpg").write_bytes(pictures[49][:100])
    out = tmp_path / "out"
    assert caption_with_ray([str(tmp_path / "in")], str(out), str(tiny_checkpoint), shard_size=12, batch_size=7, **ONE) == 1
    found = rows(out)
    assert [row["row"] for row in found] == [*range(10), *range(10), *[0] * 30]
    assert [row["key"] for row in found[:2]] == ["000.jpg", "001.jpg"]
    assert [Path(row["path"]).name for row in found[20:22]] == ["020.jpg", "021.jpg"]
    assert [row["caption"] for row in found[:-1]] == plain_captions(tiny_checkpoint, pictures[:-1])
    assert [row["error"] for row in found[:-1]] == [""] * 49
    assert found[-1]["caption"] == "" and "049.jpg is truncated" in found[-1]["error"]
    names = [file.name for file in sorted(out.iterdir())]
    assert names == ["attncap_run.json", *(f"part-{number:05d}.parquet" for number in range(5))]


def test_finished_shards_are_kept_and_other_settings_refused(cluster, tiny_checkpoint, tmp_path):
    pictures = write_inputs(tmp_path / "in")
    inputs, out = [str(tmp_path / "in")], tmp_path / "out"
    options = {"shard_size": 10, "num_beams": 1, **ONE}
    assert caption_with_ray(inputs, str(out), str(tiny_checkpoint), **options) == 0
    expected = rows(out)
    times = {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    (out / "part-00002.parquet").unlink()
    assert caption_with_ray(inputs, str(out), str(tiny_checkpoint), **options) == 0
    assert rows(out) == expected and len(expected) == len(pictures)
    assert [file.name for file, time in times.items() if file.stat().st_mtime_ns != time] == ["part-00002.parquet"]
    with pytest.raises(ValueError, match="other values of num_beams: give another folder, or remove it"):
        caption_with_ray(inputs, str(out), str(tiny_checkpoint), **{**options, "num_beams": 2})
    (tmp_path / "in" / "c" / "new.jpg").write_bytes(pictures[0])
    with pytest.raises(ValueError, match="other values of the input files"):
        caption_with_ray(inputs, str(out), str(tiny_checkpoint), **options)
    assert rows(out) == expected


def test_broken_inputs_are_rows_with_their_reason(cluster, tiny_checkpoint, tmp_path):
    folder, data = tmp_path / "in", picture(0)
    folder.mkdir()
    (folder / "cut.tar").write_bytes(b"no tar")
    pq.write_table(pa.table({"other": [1]}), folder / "other.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), folder / "none.parquet")
    (folder / "text.jpg").write_bytes(b"text")
    (folder / "sound.jpg").write_bytes(data)
    assert caption_with_ray([str(folder)], str(tmp_path / "out"), str(tiny_checkpoint), **ONE) == 1
    found = {Path(row["path"]).name: row for row in rows(tmp_path / "out")}
    assert set(found) == {"cut.tar", "other.parquet", "text.jpg", "sound.jpg"}
    assert "cut.tar cannot be read" in found["cut.tar"]["error"]
    assert "there is no column 'image' but other" in found["other.parquet"]["error"]
    assert found["text.jpg"]["error"].endswith("text.jpg is not an image in a known format; save it as JPEG or PNG")
    assert found["sound.jpg"]["caption"] and not found["sound.jpg"]["error"]


def test_a_dataset_gets_captions(cluster, tiny_checkpoint):
    pictures = [*map(picture, range(5)), b"no image"]
    dataset = ray.data.from_items([{"photo": data, "id": number} for number, data in enumerate(pictures)])
    found = caption_dataset(dataset, tiny_checkpoint, image_column="photo", concurrency=1, num_beams=1).take_all()
    found.sort(key=lambda row: row["id"])
    expected = [result.text for result in Captioner.from_pretrained(tiny_checkpoint).caption(pictures[:5], num_beams=1)]
    assert [row["caption"] for row in found] == [*expected, ""]
    assert "not an image" in found[5]["error"]


def test_a_lost_node_loses_and_repeats_nothing(cluster, tiny_checkpoint, tmp_path):
    """The second node is killed once the first shards are there."""
    (tmp_path / "in").mkdir()
    pictures = [picture(number) for number in range(300)]
    for number, data in enumerate(pictures):
        (tmp_path / "in" / f"{number:03d}.jpg").write_bytes(data)
    out = tmp_path / "out"
    [second] = cluster.worker_nodes
    killed_after = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while not (list(out.glob("part-*")) and has_model(second)) and time.monotonic() < deadline:
            time.sleep(0.05)
        killed_after.append(len(list(out.glob("part-*"))))
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    used = {"concurrency": 2, "shard_size": 20, "batch_size": 5}
    assert caption_with_ray([str(tmp_path / "in")], str(out), str(tiny_checkpoint), **used) == 0
    killer.join()
    cluster.add_node(**NODE)
    assert 0 < killed_after[0] < 15, "the node was killed in the middle"
    found = rows(out)
    assert [Path(row["path"]).name for row in found] == [f"{number:03d}.jpg" for number in range(300)]
    assert [row["caption"] for row in found] == plain_captions(tiny_checkpoint, pictures)


def has_model(node: Any) -> bool:
    """Whether an actor with a model occupies a node."""
    free = ray._private.state.available_resources_per_node()
    return node.node_id in free and free[node.node_id].get("CPU", 0) <= 1 - CPUS_PER_MODEL


def test_a_killed_run_goes_on(tiny_checkpoint, tmp_path):
    """Without the cluster of the other tests: the driver's process and its own Ray are killed."""
    pictures = write_inputs(tmp_path / "in")
    out = tmp_path / "out"
    start = "import ray, sys; ray.init(address='local', num_cpus=2); from hf_attncap.ray_captions import caption_with_ray as run; "
    call = "print(run([sys.argv[1]], sys.argv[2], sys.argv[3], shard_size=5, batch_size=2, concurrency=1))"
    command = [sys.executable, "-c", start + call, str(tmp_path / "in"), str(out), str(tiny_checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list(out.glob("part-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in out.glob("part-*")}
    assert 0 < len(done) < 8
    again = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert again.returncode == 0 and again.stdout.endswith("0\n"), again.stderr[-2000:]
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert [row["caption"] for row in rows(out)] == plain_captions(tiny_checkpoint, pictures)


def test_the_order_and_the_shards_of_inputs_are_fixed(tmp_path):
    write_inputs(tmp_path / "in")
    (tmp_path / "in" / ".hidden").mkdir()
    (tmp_path / "in" / ".hidden" / "a.jpg").write_bytes(b"")
    (tmp_path / "in" / "notes.txt").write_bytes(b"")
    twice = [str(tmp_path / "in" / "c" / "021.jpg"), str(tmp_path / "in")]
    units = find_units(twice, 10)
    assert [Path(unit.path).name for unit in units[:4]] == ["021.jpg", "a.tar", "b.parquet", "020.jpg"]
    assert [unit.shard for unit in units] == [0, 1, 2, *[3] * 10, *[4] * 10, *[5] * 9]
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_units([str(tmp_path / "nowhere")], 10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There is no image, Parquet or tar file in"):
        find_units([str(tmp_path / "empty")], 10)
